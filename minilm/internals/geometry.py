"""The geometry of vectors: how alike two representations are, and how evenly one fills its space.

Every function takes matrices `[n, C]` with one vector a row (numpy arrays, torch tensors, nested lists), computes in
float64 and returns a float. `minilm.internals.lens` applies them to every layer.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from minilm.evaluate.uniformity import uniformity as _uniformity_of_unit_vectors

Matrix = NDArray[np.float64]
KERNELS = ("linear", "rbf")


def cka(x: Any, y: Any, kernel: str = "linear", *, debiased: bool = False, bandwidth: float = 0.5) -> float:
    """Return the centred kernel alignment of two representations of the same n texts: 1 if alike, 0 if unrelated.

        CKA(X, Y) = HSIC(K, L) / sqrt(HSIC(K, K)·HSIC(L, L)),   K_ij = k(x_i, x_j),  L_ij = k(y_i, y_j)

    It does not change when X or Y is rotated, reflected, shifted or scaled as a whole (Kornblith et al., 2019,
    https://arxiv.org/abs/1905.00414). For few texts or wide vectors it is far above 0 even of unrelated ones;
    `debiased` takes the unbiased HSIC instead (Song et al., 2012; for CKA: Nguyen et al., 2021,
    https://arxiv.org/abs/2010.15327), which then is near 0 and may be below. Memory grows with n².

    Args:
        x: `[n, C]`.
        y: `[n, D]`, of the same texts in the same order.
        kernel: `linear`, x·y; or `rbf`, exp(-|x - y|² / 2·s²).
        debiased: whether to take the unbiased HSIC.
        bandwidth: s of `rbf`, as a multiple of the median distance between different rows.

    Returns:
        The alignment; nan if all rows of one are equal.

    Raises:
        ValueError: the two are not matrices of one height, of at least 2 rows (4 if debiased); an unknown kernel.
    """
    first, second = _matrix(x, "x"), _matrix(y, "y")
    if len(first) != len(second):
        raise ValueError(f"expected vectors of the same texts, got {len(first)} and {len(second)} rows")
    return alignment_of_kernels(
        centred_kernel(first, kernel, debiased=debiased, bandwidth=bandwidth),
        centred_kernel(second, kernel, debiased=debiased, bandwidth=bandwidth),
    )


def centred_kernel(x: Any, kernel: str = "linear", *, debiased: bool = False, bandwidth: float = 0.5) -> Matrix:
    """Return the centred kernel matrix `[n, n]` of a representation; two's inner product is HSIC, but for a factor.

    Biased: K less the means of its rows and columns, HKH. Unbiased: U-centring (Székely and Rizzo, 2014,
    https://arxiv.org/abs/1310.2926), for which <U(K), U(L)> / n(n - 3) is the unbiased HSIC of Song et al. (2012).
    Arguments and errors are those of `cka`; all zeros if all rows are equal.
    """
    rows = _matrix(x, "x")
    num_rows, least = len(rows), 4 if debiased else 2
    if num_rows < least:
        raise ValueError(f"expected at least {least} rows, got {num_rows}")
    if (rows == rows[0]).all():
        return np.zeros((num_rows, num_rows))
    gram = _kernel(rows, kernel, bandwidth)
    centred: Matrix
    if not debiased:
        means: Matrix = gram.mean(axis=0)
        centred = gram - means - means[:, None] + means.mean()
        return centred
    np.fill_diagonal(gram, 0)
    sums = gram.sum(axis=0)
    centred = gram - (sums + sums[:, None]) / (num_rows - 2) + sums.sum() / ((num_rows - 1) * (num_rows - 2))
    np.fill_diagonal(centred, 0)
    return centred


def alignment_of_kernels(k: Matrix, l: Matrix) -> float:  # noqa: E741 - the letters of the formula
    """Return <K, L> / |K||L| of two centred kernel matrices: their CKA; nan if one is zero."""
    scale = float(np.linalg.norm(k) * np.linalg.norm(l))
    return float((k * l).sum()) / scale if scale else math.nan


def effective_rank(x: Any) -> float:
    """Return the effective rank, exp(-Σ p·log p) for p = v / Σ v and v the singular values: 1 to min(n, C).

    It is k for k equal singular values (Roy and Vetterli, 2007, "The effective rank"). Vectors with a common direction
    look flat by it: centre them first to measure how they differ.

    Raises:
        ValueError: not a matrix, or all zero.
    """
    values = np.linalg.svd(_matrix(x, "x"), compute_uv=False)
    if not values[0] > 0:
        raise ValueError("vectors that are all zero have no rank to speak of")
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def isoscore(x: Any) -> float:
    """Return the share of directions that the vectors' variance spreads over: 0 (one direction) to 1 (all alike).

        IsoScore = (P - 1) / (C - 1),   P = (Σ λ)² / Σ λ²   with λ the eigenvalues of the covariance

    which is what the steps of Rudman et al. (2022, https://arxiv.org/abs/2108.07344) come to. It does not change with
    the mean, with scale or rotation. With fewer vectors than dimensions it is bound to be low.

    Raises:
        ValueError: not a matrix of at least 2 rows and 2 columns, or all rows are equal.
    """
    rows = _matrix(x, "x")
    if min(rows.shape) < 2 or (rows == rows[0]).all():
        raise ValueError(f"expected at least 2 different rows and 2 columns, got {list(rows.shape)}")
    covariance = np.cov(rows, rowvar=False)
    participation = np.trace(covariance) ** 2 / (covariance**2).sum()
    return float((participation - 1) / (rows.shape[1] - 1))


def partition_isotropy(x: Any) -> float:
    """Return min Z(c) / max Z(c) over unit vectors c, Z(c) = Σ exp(c·x): 0 to 1, 1 if no direction is preferred.

    The c are the eigenvectors of XᵀX, each in both directions (Mu and Viswanath, 2018, https://arxiv.org/abs/1702.01417).
    It changes with the vectors' lengths: compare vectors of like lengths only.

    Raises:
        ValueError: not a matrix.
    """
    rows = _matrix(x, "x")
    _, directions = np.linalg.eigh(rows.T @ rows)
    products = rows @ np.concatenate((directions, -directions), axis=1)
    largest = products.max(axis=0)
    partition = largest + np.log(np.exp(products - largest).sum(axis=0))
    return float(np.exp(partition.min() - partition.max()))


def mean_cosine(x: Any) -> float:
    """Return the mean cosine of two different rows; 0 if directions are spread evenly (Ethayarajh, 2019).

    Source: https://arxiv.org/abs/1909.00512, there called anisotropy when averaged over words in random contexts.

    Raises:
        ValueError: not a matrix of at least 2 rows, or a row is zero.
    """
    unit = _unit(x)
    num_rows = len(unit)
    if num_rows < 2:
        raise ValueError(f"expected at least 2 rows, got {num_rows}")
    return float(((unit.sum(axis=0) ** 2).sum() - num_rows) / (num_rows * (num_rows - 1)))


def uniformity(x: Any) -> float:
    """Return log mean exp(-2|a - b|²) over pairs of rows scaled to length 1; lower is more uniform.

    Source: Wang and Isola (2020); see `minilm.evaluate.uniformity`, which this calls.

    Raises:
        ValueError: not a matrix of at least 2 rows, or a row is zero.
    """
    unit = _unit(x)
    if len(unit) < 2:
        raise ValueError(f"expected at least 2 rows, got {len(unit)}")
    return _uniformity_of_unit_vectors(unit)


def alignment(x: Any, y: Any) -> float:
    """Return mean |a - b|² over rows a, b that belong together, scaled to length 1; lower is closer.

    Source: Wang and Isola (2020, https://arxiv.org/abs/2005.10242).

    Raises:
        ValueError: not two matrices of one shape, or a row is zero.
    """
    first, second = _unit(x), _unit(y)
    if first.shape != second.shape:
        raise ValueError(f"expected two matrices of one shape, got {list(first.shape)} and {list(second.shape)}")
    return float(((first - second) ** 2).sum(axis=1).mean())


def _kernel(rows: Matrix, kernel: str, bandwidth: float) -> Matrix:
    """Return k(x_i, x_j) of every two rows, `[n, n]`."""
    rows = rows - rows.mean(axis=0)  # neither centred kernel changes by it, and rounding is less
    gram: Matrix = rows @ rows.T
    if kernel == "linear":
        return gram
    if kernel != "rbf" or not bandwidth > 0:
        raise ValueError(
            f"expected a kernel of {', '.join(KERNELS)} and a bandwidth above 0, got {kernel!r}, {bandwidth}"
        )
    norms = np.diag(gram)
    squared = np.maximum(norms + norms[:, None] - 2 * gram, 0)
    median = float(np.median(np.sqrt(squared[np.triu_indices(len(rows), 1)])))
    if not median > 1e-6 * math.sqrt(norms.max()):  # what rounding leaves of 0
        raise ValueError("more than half of the pairs of rows are equal, so the median distance is no bandwidth")
    weights: Matrix = np.exp(-squared / (2 * (bandwidth * median) ** 2))
    return weights


def _unit(x: Any) -> Matrix:
    """Scale rows to length 1."""
    rows = _matrix(x, "x")
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if not norms.all():
        raise ValueError(f"row {int(np.argmin(norms))} is zero and has no direction")
    unit: Matrix = rows / norms
    return unit


def _matrix(values: Any, name: str) -> Matrix:
    """Return values as a float64 matrix.

    Raises:
        ValueError: they are none, or hold a nan or an infinity.
    """
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double().numpy()
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2 or not matrix.size or not np.isfinite(matrix).all():
        raise ValueError(
            f"{name} must be a matrix [n, C] of finite numbers, one vector a row; got {list(matrix.shape)}"
        )
    return matrix
