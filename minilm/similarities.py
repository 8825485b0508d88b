"""Scores between embeddings, and exact search. Every score is larger for more similar vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from numpy.typing import ArrayLike
from torch import Tensor

from minilm.config import SIMILARITIES

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


class SearchHit(TypedDict):
    """One search result: the row of the corpus, and its score."""

    corpus_id: int
    score: float


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


def similarity_pairwise(a: Vectors, b: Vectors, metric: str = "cosine") -> Tensor:
    """Score each vector of a against the same row of b: `[n, C]` and `[n, C]` -> `[n]`; see `similarity`.

    Raises:
        ValueError: an unknown metric, or shapes that differ.
    """
    a, b = _matrix(a, "a"), _matrix(b, "b")
    _check(a, b, metric)
    if a.shape != b.shape:
        raise ValueError(f"expected as many rows in a as in b, got {list(a.shape)} and {list(b.shape)}")
    return _PAIRWISE[metric](a, b.to(a))


def search(
    queries: Vectors, corpus: Vectors, top_k: int = 10, metric: str = "cosine", block_size: int = 65_536
) -> list[list[SearchHit]]:
    """Find the `top_k` most similar rows of the corpus for each query, exactly.

    The corpus is scored block by block, and queries likewise, so that memory stays bounded whatever their number.

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
    return [hits for rows in queries.split(1_024) for hits in _search_block(rows, corpus, top_k, metric, block_size)]


def _search_block(queries: Tensor, corpus: Tensor, top_k: int, metric: str, block_size: int) -> list[list[SearchHit]]:
    """Search a few queries through the whole corpus, keeping the best so far."""
    scores = queries.new_empty(len(queries), 0)
    ids = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(corpus), block_size):
        block = _ALL_PAIRS[metric](queries, corpus[start : start + block_size].to(queries))
        block_ids = torch.arange(start, start + block.shape[1], device=ids.device).expand_as(block)
        scores, ids = torch.cat([scores, block], dim=1), torch.cat([ids, block_ids], dim=1)
        order = scores.argsort(dim=1, descending=True, stable=True)[:, :top_k]
        scores, ids = scores.gather(1, order), ids.gather(1, order)
    return [
        [SearchHit(corpus_id=i, score=s) for i, s in zip(row_ids, row_scores, strict=True)]
        for row_ids, row_scores in zip(ids.tolist(), scores.tolist(), strict=True)
    ]


def _matrix(vectors: Vectors, name: str) -> Tensor:
    """Return vectors as a float tensor `[n, C]`."""
    if not isinstance(vectors, Tensor):
        if isinstance(vectors, list):
            vectors = [row.cpu() if isinstance(row, Tensor) else row for row in vectors]
        vectors = torch.from_numpy(np.asarray(vectors))
    if vectors.dim() == 1:
        vectors = vectors.unsqueeze(0)
    if vectors.dim() != 2:
        raise ValueError(f"expected {name} to be vectors [n, C] or one vector [C], got shape {list(vectors.shape)}")
    return vectors if vectors.is_floating_point() else vectors.float()


def _check(a: Tensor, b: Tensor, metric: str) -> None:
    """Check the metric and that the vectors have one width."""
    if metric not in SIMILARITIES:
        raise ValueError(f"metric must be one of {', '.join(SIMILARITIES)}; got {metric!r}")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"expected vectors of one width, got {a.shape[1]} and {b.shape[1]}")
