"""Scores between embeddings, and exact search. Every score is larger for more similar vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypedDict

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from numpy.typing import ArrayLike
from torch import Tensor

from minilm.config import SIMILARITIES
from minilm.threads import fork_safe

Vectors = Tensor | ArrayLike | list[Tensor]

_ALL_PAIRS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": lambda a, b: F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T,
    "dot": lambda a, b: a @ b.T,
    "euclidean": lambda a, b: -torch.cdist(a, b, p=2.0),
    "manhattan": lambda a, b: -torch.cdist(a, b, p=1.0),
}
_PAIRWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": lambda a, b: (F.normalize(a, dim=-1) * F.normalize(b, dim=-1)).sum(dim=-1),
    "dot": lambda a, b: (a * b).sum(dim=-1),
    "euclidean": lambda a, b: -(a - b).norm(dim=-1),
    "manhattan": lambda a, b: -(a - b).abs().sum(dim=-1),
}
_QUERY_BLOCK = 64  # queries scored at a time


class SearchHit(TypedDict):
    """One search result: the row of the corpus, and its score."""

    corpus_id: int
    score: float


@fork_safe
def similarity(a: Vectors, b: Vectors, metric: str = "cosine") -> Tensor:
    """Score every vector of a against every vector of b: `[n, C]` and `[m, C]` -> `[n, m]`.

    Args:
        a: vectors `[n, C]`, or one vector `[C]`.
        b: vectors `[m, C]`, or one vector `[C]`.
        metric: `cosine`, `dot`, `euclidean` or `manhattan` (the last two are distances, negated).

    Raises:
        ValueError: an unknown metric, or widths that differ.
    """
    a, b = _matrix(a, "a"), _matrix(b, "b")
    _check(a, b, metric)
    return _ALL_PAIRS[metric](a, b.to(a))


@fork_safe
def similarity_pairwise(a: Vectors, b: Vectors, metric: str = "cosine") -> Tensor:
    """Score each vector of a against the same row of b: `[n, C]` and `[n, C]` -> `[n]`; of two vectors, a scalar.

    Raises:
        ValueError: an unknown metric, or shapes that differ.
    """
    single = np.ndim(a) == np.ndim(b) == 1
    a, b = _matrix(a, "a"), _matrix(b, "b")
    _check(a, b, metric)
    if a.shape != b.shape:
        raise ValueError(f"expected as many rows in a as in b, got {list(a.shape)} and {list(b.shape)}")
    scores = _PAIRWISE[metric](a, b.to(a))
    return scores[0] if single else scores


@fork_safe
def search(
    queries: Vectors, corpus: Vectors, top_k: int = 10, metric: str = "cosine", block_size: int = 65_536
) -> list[list[SearchHit]]:
    """Find the `top_k` most similar rows of the corpus for each query, exactly.

    The corpus is scored block by block, for a few queries at a time, so that memory stays bounded.

    Args:
        queries: `[n, C]`, or one vector `[C]`.
        corpus: `[m, C]`.
        top_k: results a query; fewer where the corpus is smaller.
        metric: see `similarity`.
        block_size: rows of the corpus scored at a time.

    Returns:
        For each query a list of `{"corpus_id", "score"}`, best first; of equal scores the lower row first.

    Raises:
        ValueError: an unknown metric, widths that differ, or a count below 1.
    """
    queries, corpus = _matrix(queries, "queries"), _matrix(corpus, "corpus")
    _check(queries, corpus, metric)
    for name, value in (("top_k", top_k), ("block_size", block_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    scale: Callable[[Tensor], Tensor] = F.normalize if metric == "cosine" else (lambda rows: rows)
    score = _ALL_PAIRS["dot" if metric == "cosine" else metric]  # each vector is scaled once, not for every block
    queries = scale(queries)
    none = queries.new_empty(len(queries), 0)
    best = [(rows, rows.long()) for rows in none.split(_QUERY_BLOCK)]  # scores and corpus rows of a few queries each
    for start in range(0, len(corpus), block_size):
        block = scale(corpus[start : start + block_size].to(queries))
        for index, rows in enumerate(queries.split(_QUERY_BLOCK)):
            scores, columns = _top(score(rows, block), top_k)
            candidates = torch.cat([best[index][0], scores], dim=1)
            ids = torch.cat([best[index][1], columns + start], dim=1)
            scores, order = _top(candidates, top_k)
            best[index] = scores, ids.gather(1, order)
    return [
        [SearchHit(corpus_id=i, score=s) for i, s in zip(row_ids, row_scores, strict=True)]
        for scores, ids in best
        for row_ids, row_scores in zip(ids.tolist(), scores.tolist(), strict=True)
    ]


def _top(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return each row's best scores and their columns, of equal ones the lower first: `[n, m]` -> two of `[n, k]`."""
    count = min(count, scores.shape[1])
    values, columns = scores.topk(count, dim=1)
    least = values[:, -1:]
    cut = (scores == least).sum(dim=1) > (values == least).sum(dim=1)  # equal scores fall on both sides of the end
    columns[cut] = scores[cut].argsort(dim=1, descending=True, stable=True)[:, :count]
    columns = columns.sort(dim=1).values
    values, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)


def are_vectors(inputs: Any) -> bool:
    """Tell vectors (tensors, numeric arrays, lists of them) from texts."""
    if isinstance(inputs, list | tuple) and inputs:
        inputs = inputs[0]
        if isinstance(inputs, list | tuple) and inputs and isinstance(inputs[0], int | float):
            return True
    return isinstance(inputs, Tensor | float) or getattr(getattr(inputs, "dtype", None), "kind", "O") in "fiu"


def _matrix(vectors: Vectors, name: str) -> Tensor:
    """Return vectors as a matrix `[n, C]`, in float32 unless they are float64 arrays or tensors."""
    if not isinstance(vectors, Tensor):
        if isinstance(vectors, list | tuple):
            array = np.asarray([row.cpu() if isinstance(row, Tensor) else row for row in vectors])
            array = array.astype(np.float32) if array.dtype == np.float64 else array
        else:
            array = np.asarray(vectors)
        if array.dtype.kind not in "fiub":
            raise TypeError(f"expected {name} to be vectors of numbers, got {type(vectors).__name__} of {array.dtype}")
        vectors = torch.from_numpy(array)
    if vectors.dim() == 1:
        vectors = vectors.unsqueeze(0)
    if vectors.dim() != 2:
        raise ValueError(f"expected {name} to be vectors [n, C] or one vector [C], got shape {list(vectors.shape)}")
    return vectors if vectors.dtype == torch.float64 else vectors.float()


def _check(a: Tensor, b: Tensor, metric: str) -> None:
    """Check the metric and that the vectors have one width."""
    if metric not in SIMILARITIES:
        raise ValueError(f"metric must be one of {', '.join(SIMILARITIES)}; got {metric!r}")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"expected vectors of one width, got {a.shape[1]} and {b.shape[1]}")
