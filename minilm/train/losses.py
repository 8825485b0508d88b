"""Losses: pure functions of vectors, each a scalar. What a run does with them is in `objectives` and `distillation`.

Notation: n rows of a batch, C and D widths of vectors, cos(a, b) = a·b / (‖a‖‖b‖), τ > 0 a temperature. Narrower inputs
than float32 are computed in float32, autocast or not; all take the dtype of the first. Every function raises ValueError
for shapes that don't fit together, and for a setting out of range.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import ParamSpec

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

Arguments = ParamSpec("Arguments")


def _in_full_precision(loss: Callable[Arguments, Tensor]) -> Callable[Arguments, Tensor]:
    """Make a loss compute in the dtype of its first tensor, but in float32 at least, and outside of autocast."""

    @wraps(loss)
    def compute(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Tensor:
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        dtype = torch.promote_types(first.dtype, torch.float32)

        def widened(value: object) -> object:
            return value.to(dtype) if isinstance(value, Tensor) else value

        with torch.autocast(first.device.type, enabled=False):
            return loss(*map(widened, args), **{name: widened(value) for name, value in kwargs.items()})  # type: ignore[arg-type]

    return compute


# Contrastive: the right one among many.


@_in_full_precision
def info_nce(
    queries: Tensor,
    positives: Tensor,
    negatives: Tensor | None = None,
    temperature: float = 0.05,
    symmetric: bool = False,
) -> Tensor:
    """InfoNCE, also called multiple negatives ranking: pick a query's positive among all texts of the batch.

        loss = mean_i -log( exp(cos(q_i, p_i)/τ) / Σ_j exp(cos(q_i, d_j)/τ) ),  d = all positives, then all negatives

    Sources: Henderson et al. 2017 (in-batch negatives), van den Oord et al. 2018 (InfoNCE), Radford et al. 2021 (both
    directions).

    Args:
        queries: `[n, C]`.
        positives: `[n, C]`, the right one for each query.
        negatives: hard negatives or a memory bank, `[m, C]` (or `[n, k, C]`); negatives of every query.
        temperature: τ > 0.
        symmetric: whether to average with the loss of finding each positive's query among the queries.

    Raises:
        ValueError: also where there are no negatives: a batch of one without hard ones, or one to be `symmetric`.
    """
    _check_same_shape("queries", queries, "positives", positives)
    candidates = positives
    if negatives is not None:
        candidates = torch.cat([positives, _rows("negatives", negatives, queries.shape[1])])
    if len(candidates) < 2 or (symmetric and len(queries) < 2):
        raise ValueError(f"expected at least two rows, so that there are negatives, got {len(queries)}")
    scores = _cosines(queries, candidates) / check_positive("temperature", temperature)  # [n, n + m]
    targets = torch.arange(len(queries), device=scores.device)
    loss = F.cross_entropy(scores, targets)
    if symmetric:
        loss = (loss + F.cross_entropy(scores[:, : len(queries)].T, targets)) / 2
    return loss


def simcse_unsupervised(first: Tensor, second: Tensor, temperature: float = 0.05) -> Tensor:
    """Unsupervised SimCSE: the same texts encoded twice, with different dropout, find each other.

        loss = mean_i -log( exp(cos(h_i, h'_i)/τ) / Σ_j exp(cos(h_i, h'_j)/τ) )

    Source: Gao et al. 2021, equation 4. Shapes, errors: see `info_nce`.
    """
    return info_nce(first, second, temperature=temperature)


def simcse_supervised(anchors: Tensor, entailed: Tensor, contradictions: Tensor, temperature: float = 0.05) -> Tensor:
    """Supervised SimCSE: a premise finds what it entails, among all entailed and all contradicting texts of the batch.

        loss = mean_i -log( exp(cos(h_i, e_i)/τ) / Σ_j [exp(cos(h_i, e_j)/τ) + exp(cos(h_i, c_j)/τ)] )

    Source: Gao et al. 2021, equation 5. Shapes, errors: see `info_nce`.
    """
    return info_nce(anchors, entailed, contradictions, temperature)


@_in_full_precision
def ranking(queries: Tensor, passages: Tensor) -> Tensor:
    """The reference trainer's loss: cross-entropy over plain inner products, without temperature or normalisation.

        loss = mean_i -log( exp(q_i·d_{ig}) / Σ_j exp(q_i·d_j) ),  g = passages a query

    Source: ModelScope 1.40.2, its fine-tuning of sentence embeddings.

    Args:
        queries: `[n, C]`.
        passages: `[n·g, C]`: for each query in turn its positive, then its g - 1 negatives.

    Raises:
        ValueError: also where there is but one passage.
    """
    passages = _rows("passages", passages, _width("queries", queries))
    if len(passages) < 2 or len(passages) % len(queries):
        raise ValueError(
            f"expected at least two passages, equally many for each of {len(queries)} queries, got {len(passages)}"
        )
    targets = torch.arange(0, len(passages), len(passages) // len(queries), device=queries.device)
    return F.cross_entropy(queries @ passages.T, targets)


# Distillation: be like the teacher.


@_in_full_precision
def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error over rows and dimensions: loss = mean_ic (s_ic - t_ic)².

    Source: Reimers and Gurevych 2020. Shapes: `[n, D]` each, in the teacher's space.
    """
    _check_same_shape("student", student, "teacher", teacher)
    return F.mse_loss(student, teacher)


@_in_full_precision
def similarity_squared_error(student: Tensor, teacher: Tensor, stretch: float = 1.0) -> Tensor:
    """Squared error between the two matrices of cosines within a batch: mean_{i≠j} (cos(s_i, s_j) - T_ij)².

        T_ij = 1 - k·(1 - cos(t_i, t_j))

    A stretch k above 1 spreads out a teacher's cosines that are all near 1, and leaves their order and a text's own 1.
    Sources: Tung and Mori 2019 and Park et al. 2019, who match such matrices under other norms. Shapes: `[n, C]` and
    `[n, D]`; at least two rows.
    """
    _check_same_length("student", student, "teacher", teacher, at_least=2)
    check_positive("stretch", stretch)
    return F.mse_loss(_cosines_to_others(student), 1 - stretch * (1 - _cosines_to_others(teacher)))


@_in_full_precision
def similarity_kl(student: Tensor, teacher: Tensor, temperature: float = 0.05, stretch: float = 1.0) -> Tensor:
    """Divergence of how a text's neighbours in the batch are weighted, by the teacher and by the student.

        loss = mean_i KL(P_i ‖ Q_i),  P_i = softmax_{j≠i}(k·cos(t_i, t_j)/τ),  Q_i = softmax_{j≠i}(cos(s_i, s_j)/τ)

    with the stretch k of `similarity_squared_error`, whose constant the softmax cancels. Not multiplied by τ². A text
    itself is left out: its cosine, always 1, would take nearly all of the weight.
    Sources: Hinton et al. 2015 (softened targets), Passalis and Tefas 2018 and Fang et al. 2021 (over neighbours).
    Shapes: `[n, C]` and `[n, D]`; at least two rows.
    """
    _check_same_length("student", student, "teacher", teacher, at_least=2)
    check_positive("temperature", temperature)
    check_positive("stretch", stretch)
    log_q = (_cosines_to_others(student) / temperature).log_softmax(dim=1)
    log_p = (stretch * _cosines_to_others(teacher) / temperature).log_softmax(dim=1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


@_in_full_precision
def crd(anchors: Tensor, candidates: Tensor, log_constant: Tensor | float = 0.0, temperature: float = 0.07) -> Tensor:
    """Contrastive representation distillation, one direction: tell each pair from noise, one decision a candidate.

        h(a, b) = exp(cos(a, b)/τ) / (exp(cos(a, b)/τ) + k·c)
        loss = mean_i -[ log h(a_i, b_i) + Σ_{j≠i} log(1 - h(a_i, b_j)) ]

    h is how likely a and b are of one text, k = m - 1 the number of noise candidates of a row, and c the constant that
    normalises exp(cos/τ) (`crd_log_constant`). A model's loss is the sum over both directions.
    Sources: Tian, Krishnan and Isola 2020 and their published code, where h = P/(P + k/N), P = exp(cos/τ)/Z, Z = N·c:
    the number N of texts cancels; Gutmann and Hyvärinen 2010 (noise-contrastive estimation).

    Args:
        anchors: `[n, C]`.
        candidates: `[m, C]`: for each anchor the vector of the same text, then further noise (a memory bank).
        log_constant: log c.
        temperature: τ > 0.

    Raises:
        ValueError: also where there is but one candidate.
    """
    scores = _crd_scores(anchors, candidates, temperature)
    bias = math.log(scores.shape[1] - 1) + log_constant
    pairs = torch.eye(*scores.shape, dtype=torch.bool, device=scores.device)
    return F.softplus(torch.where(pairs, bias - scores, scores - bias)).sum(dim=1).mean()


@torch.no_grad()
@_in_full_precision
def crd_log_constant(anchors: Tensor, candidates: Tensor, temperature: float = 0.07) -> Tensor:
    """Estimate the logarithm of `crd`'s constant c: the mean of exp(cos(a_i, b_j)/τ) over i ≠ j.

    Source: the published code of Tian, Krishnan and Isola 2020, which does so on the first batch and keeps the value.
    Shapes, errors: see `crd`.
    """
    scores = _crd_scores(anchors, candidates, temperature)
    n, m = scores.shape
    noise = scores.masked_fill(torch.eye(n, m, dtype=torch.bool, device=scores.device), -math.inf)
    return noise.logsumexp(dim=(0, 1)) - math.log(n * (m - 1))


@_in_full_precision
def hsic(x: Tensor, y: Tensor, gamma: float = 1.0) -> Tensor:
    """Hilbert-Schmidt independence criterion: how much x and y depend on each other; 0 if not at all.

        loss = tr(K H L H) / (n - 1)²,  K_ij = exp(-gamma·‖x_i - x_j‖²),  L_ij = exp(-gamma·‖y_i - y_j‖²),  H = I - 1/n

    Written out, this is n²/(n - 1)²·[ tr(KL)/n² + mean(K)·mean(L) - 2·mean(KL)/n ], the form that IBKD's published code
    has. The estimate is biased: for independent samples it is (1 - mean K)(1 - mean L)/n on average (means
    over i ≠ j, up to O(1/n²)). For vectors so far apart that K = L = I it is 1/(n - 1), whatever they are, and has no
    gradient: choose gamma by the distances.
    Sources: Gretton et al. 2005 (the estimate), Gretton et al. 2007 (its mean), Zhang et al. 2023 (IBKD).
    Shapes: `[n, C]` and `[n, D]`; at least two rows.
    """
    _check_same_length("x", x, "y", y, at_least=2)
    check_positive("gamma", gamma)
    return (_centred(_rbf_kernel(x, gamma)) * _rbf_kernel(y, gamma)).sum() / (len(x) - 1) ** 2


# Graded pairs.


@_in_full_precision
def cosine_regression(first: Tensor, second: Tensor, scores: Tensor) -> Tensor:
    """Squared error of the cosine against a score: loss = mean_i (cos(a_i, b_i) - y_i)².

    Source: Reimers and Gurevych 2019, the regression objective. Shapes: two of `[n, C]`, scores `[n]` from -1 to 1.
    """
    _check_pairs(first, second, scores)
    if not (scores.abs() <= 1).all():
        least, most = scores.min().item(), scores.max().item()
        raise ValueError(f"expected scores from -1 to 1, got {least:g} to {most:g}; scale them first")
    return F.mse_loss(F.cosine_similarity(first, second), scores)


@_in_full_precision
def cosent(first: Tensor, second: Tensor, scores: Tensor, temperature: float = 0.05) -> Tensor:
    """CoSENT: a pair with a higher score should have the higher cosine.

        loss = log( 1 + Σ_{y_i > y_j} exp((cos(a_j, b_j) - cos(a_i, b_i))/τ) )

    Only the order of the scores counts. Sources: Su 2022; Huang et al. 2024. Shapes: two of `[n, C]`, scores `[n]`; at
    least two pairs.
    """
    _check_pairs(first, second, scores)
    if len(scores) < 2:
        raise ValueError("expected at least two pairs to order, got 1")
    cosines = F.cosine_similarity(first, second) / check_positive("temperature", temperature)
    excess = (cosines - cosines[:, None])[scores[:, None] > scores]  # where i's score is higher: cos_j - cos_i
    return torch.cat([excess.new_zeros(1), excess]).logsumexp(dim=0)


# At several widths.


def matryoshka(
    loss: Callable[..., Tensor],
    vectors: Sequence[Tensor],
    widths: Sequence[int] = (384, 256, 128, 64),
    weights: Sequence[float] | None = None,
) -> Tensor:
    """Weighted sum of a loss over vectors cut to several widths: Σ_w weight_w·loss(first w dimensions).

    Cut vectors are not scaled to length 1 again; losses of cosines do so themselves.
    Source: Kusupati et al. 2022, equation 1.

    Args:
        loss: takes as many tensors as `vectors` holds.
        vectors: `[..., C]` each.
        widths: each at most C.
        weights: one for each width; 1 each by default.

    Raises:
        ValueError: a width that the vectors don't have, or not one weight for each.
    """
    weights = [1.0] * len(widths) if weights is None else weights
    least = min(x.shape[-1] for x in vectors)
    if not widths or len(weights) != len(widths) or min(widths) < 1 or max(widths) > least:
        raise ValueError(f"expected widths of 1 to {least} and as many weights, got {list(widths)}, {list(weights)}")
    parts = [weight * loss(*(x[..., :w] for x in vectors)) for w, weight in zip(widths, weights, strict=True)]
    return torch.stack(parts).sum()


# Checks, and what several losses share.


def check_positive(name: str, value: float) -> float:
    """Return a setting that must be a positive, finite number.

    Raises:
        ValueError: it is not.
    """
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive, got {value!r}")
    return value


def _width(name: str, vectors: Tensor) -> int:
    """Return C of vectors `[n, C]`, n > 0."""
    if vectors.dim() != 2 or not len(vectors):
        raise ValueError(f"expected {name} to be vectors [n, C], got shape {list(vectors.shape)}")
    return vectors.shape[1]


def _rows(name: str, vectors: Tensor, width: int) -> Tensor:
    """Flatten vectors `[..., C]` to `[m, C]`."""
    if vectors.dim() < 2 or vectors.shape[-1] != width:
        raise ValueError(f"expected {name} to be vectors of width {width}, got shape {list(vectors.shape)}")
    return vectors.flatten(0, -2)


def _check_same_length(name: str, x: Tensor, other_name: str, y: Tensor, at_least: int = 1) -> None:
    """Check vectors `[n, C]` and `[n, D]`."""
    _width(name, x), _width(other_name, y)
    if len(x) != len(y):
        raise ValueError(f"expected as many rows in {name} as in {other_name}, got {len(x)} and {len(y)}")
    if len(x) < at_least:
        raise ValueError(f"expected at least {at_least} rows, as they are compared with each other, got {len(x)}")


def _check_same_shape(name: str, x: Tensor, other_name: str, y: Tensor) -> None:
    """Check two of `[n, C]`."""
    _check_same_length(name, x, other_name, y)
    if x.shape != y.shape:
        raise ValueError(f"expected {name} and {other_name} of one width, got {x.shape[1]} and {y.shape[1]}")


def _check_pairs(first: Tensor, second: Tensor, scores: Tensor) -> None:
    """Check two of `[n, C]` and their scores `[n]`."""
    _check_same_shape("first", first, "second", second)
    if scores.shape != first.shape[:1]:
        raise ValueError(f"expected a score for each of {len(first)} pairs, got shape {list(scores.shape)}")


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    """cos(a_i, b_j): `[n, C]` and `[m, C]` -> `[n, m]`."""
    return F.normalize(a, dim=1) @ F.normalize(b, dim=1).T


def _cosines_to_others(x: Tensor) -> Tensor:
    """cos(x_i, x_j) for j ≠ i: `[n, C]` -> `[n, n - 1]`."""
    n = len(x)
    return _cosines(x, x).flatten()[1:].view(n - 1, n + 1)[:, :-1].reshape(n, n - 1)


def _crd_scores(anchors: Tensor, candidates: Tensor, temperature: float) -> Tensor:
    """cos(a_i, b_j)/τ, after checks: `[n, C]` and `[m, C]` -> `[n, m]`."""
    candidates = _rows("candidates", candidates, _width("anchors", anchors))
    if len(candidates) < max(2, len(anchors)):
        raise ValueError(f"expected {len(anchors)} candidates or more, and at least two, got {len(candidates)}")
    return _cosines(anchors, candidates) / check_positive("temperature", temperature)


def _rbf_kernel(x: Tensor, gamma: float) -> Tensor:
    """exp(-gamma·‖x_i - x_j‖²): `[n, C]` -> `[n, n]`."""
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")  # by differences: nothing cancels
    return (-gamma * distances.square()).exp()


def _centred(kernel: Tensor) -> Tensor:
    """H K H: rows and columns sum to 0."""
    return kernel - kernel.mean(dim=0) - kernel.mean(dim=1, keepdim=True) + kernel.mean()
