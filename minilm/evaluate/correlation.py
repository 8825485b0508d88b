"""Correlation coefficients in numpy: Pearson's r, and Spearman's rho with average ranks for ties."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def average_ranks(values: ArrayLike) -> NDArray[np.float64]:
    """Rank values `[n]` from 1 to n, float64; equal values share the average of the ranks they span."""
    _, group, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last_ranks = np.cumsum(counts)
    shared: NDArray[np.float64] = last_ranks - (counts - 1) / 2
    return shared[group]


def pearson(a: ArrayLike, b: ArrayLike) -> float:
    """Return Pearson's linear correlation of `a [n]` and `b [n]`; nan where it has no value (a constant, or n < 2).

    Raises:
        ValueError: the two are not one-dimensional and equally long, or hold a nan or an infinity.
    """
    pair = _checked(a, b)
    # A mean is rounded, so a constant would be left with a tiny "variance" that correlates with anything.
    if pair.shape[1] < 2 or (pair == pair[:, :1]).all(axis=1).any():
        return float("nan")
    centred = pair - pair.mean(axis=1, keepdims=True)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    return float(np.clip(unit[0] @ unit[1], -1.0, 1.0))


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Return Spearman's rank correlation of `a [n]` and `b [n]`: Pearson's of their average ranks, nan where that is.

    Raises:
        ValueError: as for `pearson`.
    """
    first, second = _checked(a, b)
    return pearson(average_ranks(first), average_ranks(second))


def _checked(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    """Stack both as float64 `[2, n]` after checking them."""
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(f"expected two one-dimensional arrays of one length, got {first.shape} and {second.shape}")
    pair = np.stack((first, second))
    if not np.isfinite(pair).all():
        raise ValueError("cannot correlate values that are nan or infinite")
    return pair
