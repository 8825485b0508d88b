"""Correlation coefficients in numpy: Pearson's r, and Spearman's rho with average ranks for ties, also of resamples."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray


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
    correlation = ResampledSpearman(a, b)
    return correlation(np.ones(correlation.num_pairs, dtype=np.int64))


class ResampledSpearman:
    """Spearman's correlation of pairs of which each counts several times or not at all; values are sorted only once.

    Args:
        a: the first values, `[n]`.
        b: the second values, `[n]`.

    Raises:
        ValueError: as for `pearson`.
    """

    def __init__(self, a: ArrayLike, b: ArrayLike) -> None:
        pair = _checked(a, b)
        self.num_pairs = pair.shape[1]
        # The place of each value among the different ones in rising order.
        self._groups = [np.unique(values, return_inverse=True)[1] for values in pair]

    def __call__(self, counts: NDArray[np.int64]) -> float:
        """Return the correlation with pair i counted `counts[i]` times; nan where it has no value."""
        centred = [self._ranks(group, counts) - (counts.sum() + 1) / 2 for group in self._groups]
        covariance = float((counts * centred[0] * centred[1]).sum())
        scale = math.sqrt((counts * centred[0] ** 2).sum()) * math.sqrt((counts * centred[1] ** 2).sum())
        return float(np.clip(covariance / scale, -1.0, 1.0)) if scale else math.nan

    @staticmethod
    def _ranks(group: NDArray[np.intp], counts: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the average rank of each pair among all that are counted, `[n]`; their mean is (total + 1) / 2."""
        sizes = np.bincount(group, weights=counts)
        shared: NDArray[np.float64] = np.cumsum(sizes) - (sizes - 1) / 2
        return shared[group]


def _checked(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    """Stack both as float64 `[2, n]` after checking them."""
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(f"expected two one-dimensional arrays of one length, got {first.shape} and {second.shape}")
    pair = np.stack((first, second))
    if not np.isfinite(pair).all():
        raise ValueError("cannot correlate values that are nan or infinite")
    return pair
