"""Retrieval: how high a query's relevant documents stand among all documents, ordered by cosine similarity.

Figures are means over queries, each defined as by trec_eval (https://github.com/usnistgov/trec_eval):

- nDCG@10: the sum over ranks r <= 10 of relevance / log2(1 + r), over that of the best order there is (Jarvelin and
  Kekalainen, 2002);
- MRR@10: 1 / rank of the first relevant document, 0 if it is not among ten;
- Recall@k: the part of the relevant documents that are among the first k;
- MAP: the mean, over the relevant documents, of the precision at each one's rank (0 for those not found), of the first
  1,000 documents, the depth of a TREC run.

Documents of equal score are ordered by falling id, and scores are compared in single precision, as trec_eval does. A
query whose documents were all judged irrelevant counts as 0.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from minilm.evaluate.result import Counts, Result
from minilm.evaluate.retrieval_data import RetrievalData, read_retrieval
from minilm.evaluate.vectors import Encoder, unit_vectors
from minilm.progress import progress_bar
from minilm.similarities import search

DEPTH = 1000
RECALL_AT = (10, 100)
QUERIES_AT_A_TIME = 64


@dataclass(frozen=True)
class RetrievalResult(Result):
    """What `evaluate_retrieval` measured.

    Attributes:
        queries: the queries' ids.
        per_query: each figure by query, float64 `[queries]`.
        num_documents: the size of the corpus.
    """

    measure: ClassVar[str] = "retrieval"
    headline: ClassVar[str] = "nDCG@10"
    queries: tuple[str, ...]
    per_query: Mapping[str, NDArray[np.float64]]
    num_documents: int

    @property
    def sizes(self) -> dict[str, int]:
        """The numbers of queries and documents."""
        return {"queries": len(self.queries), "documents": self.num_documents}

    @property
    def strata(self) -> tuple[int, ...]:
        """The number of queries."""
        return (len(self.queries),)

    def recount(self, counts: Sequence[Counts]) -> dict[str, float]:
        """Compute the means over counted queries."""
        (drawn,) = counts
        return {name: float(drawn @ values / drawn.sum()) for name, values in self.per_query.items()}


def evaluate_retrieval(
    encoder: Encoder,
    data: str | os.PathLike[str],
    *,
    split: str = "test",
    recall_at: Sequence[int] = RECALL_AT,
    ignore_identical_ids: bool = False,
    show_progress_bar: bool | None = None,
) -> RetrievalResult:
    """Measure an encoder on a retrieval task.

    Args:
        encoder: any object with `encode`; `encode_query` and `encode_document` are used where it has them.
        data: the folder that holds the task (`minilm.evaluate.retrieval_data` describes it).
        split: which judgements, `qrels/SPLIT`.
        recall_at: the k of Recall@k.
        ignore_identical_ids: leave the document out that has the query's own id (as BEIR does for ArguAna and Quora,
            whose queries are documents).
        show_progress_bar: `None` shows it if the `minilm` logger is at level INFO or below.

    Raises:
        EvaluationDataError: data is missing or malformed.
        ValueError: the encoder's vectors are unusable, or a k is not in 1 ... 1,000.
    """
    task = read_retrieval(data, split)
    run = retrieve(encoder, task, ignore_identical_ids=ignore_identical_ids, show_progress_bar=show_progress_bar)
    per_query = score_run(run, task.qrels, recall_at)
    return RetrievalResult(tuple(task.qrels), per_query, len(task.corpus))


def retrieve(
    encoder: Encoder,
    task: RetrievalData,
    *,
    ignore_identical_ids: bool = False,
    show_progress_bar: bool | None = None,
) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield each query's id with the cosines of its 1,000 nearest documents by their ids.

    Raises:
        ValueError: the encoder's vectors are unusable.
    """
    names = sorted(task.corpus, reverse=True)  # search puts the lower row first where scores are equal
    encode_document = getattr(encoder, "encode_document", encoder.encode)
    documents = unit_vectors(encode_document, task.corpus.values(), show_progress_bar)
    corpus = documents[[task.corpus[name] for name in names]].astype(np.float32)
    del documents
    query_vectors = unit_vectors(getattr(encoder, "encode_query", encoder.encode), task.queries.values(), False)
    queries = list(task.queries)
    with progress_bar(show_progress_bar, len(queries), "search", "query") as advance:
        for start in range(0, len(queries), QUERIES_AT_A_TIME):
            chunk = queries[start : start + QUERIES_AT_A_TIME]
            vectors = query_vectors[[task.queries[query] for query in chunk]].astype(np.float32)
            # Scaled already, so dot is the cosine; one more than is kept, since one may be left out.
            for query, hits in zip(chunk, search(vectors, corpus, DEPTH + 1, "dot"), strict=True):
                scores = {names[hit["corpus_id"]]: round(hit["score"], 7) for hit in hits}  # equal texts tie
                if ignore_identical_ids:
                    scores.pop(query, None)
                yield query, dict(list(scores.items())[:DEPTH])
            advance(len(chunk))


def score_run(
    run: Mapping[str, Mapping[str, float]] | Iterable[tuple[str, Mapping[str, float]]],
    qrels: Mapping[str, Mapping[str, int]],
    recall_at: Sequence[int] = RECALL_AT,
) -> dict[str, NDArray[np.float64]]:
    """Score a ranking, however it was made: each figure by query, `[queries]` in the order of `qrels`.

    Args:
        run: for each query the scores of the documents found, by their ids; a query that is not there found none.
        qrels: for each query how relevant documents are, by their ids.
        recall_at: the k of Recall@k.

    Raises:
        ValueError: a k is not in 1 ... 1,000.
    """
    if not all(1 <= k <= DEPTH for k in recall_at):
        raise ValueError(f"expected recall at 1 to {DEPTH} documents, got {', '.join(map(str, recall_at))}")
    queries = run.items() if isinstance(run, Mapping) else run
    judged = ((query, scores) for query, scores in queries if query in qrels)
    scored = {query: _score_query(_rank(scores), qrels[query], recall_at) for query, scores in judged}
    none = _score_query([], {}, recall_at)
    return {name: np.array([scored.get(query, none)[name] for query in qrels]) for name in none}


def _rank(scores: Mapping[str, float]) -> list[str]:
    """Order documents by falling score, of equal scores by falling id."""
    by_id = sorted(scores, reverse=True)
    return sorted(by_id, key=lambda document: np.float32(scores[document]), reverse=True)  # a stable sort


def _score_query(ranking: Sequence[str], judged: Mapping[str, int], recall_at: Sequence[int]) -> dict[str, float]:
    """Score one query's ranking against what is relevant."""
    gains = np.array([max(judged.get(document, 0), 0) for document in ranking], dtype=np.float64)
    best = np.array(sorted((relevance for relevance in judged.values() if relevance > 0), reverse=True))
    relevant, num_relevant = gains > 0, max(len(best), 1)
    precision = np.cumsum(relevant) / np.arange(1, len(gains) + 1)
    return {
        "nDCG@10": _dcg(gains[:10]) / _dcg(best[:10]) if len(best) else 0.0,
        "MRR@10": 1 / (1 + int(relevant.argmax())) if relevant[:10].any() else 0.0,
        **{f"Recall@{k}": int(relevant[:k].sum()) / num_relevant for k in recall_at},
        "MAP": float(precision[relevant].sum()) / num_relevant,
    }


def _dcg(gains: NDArray[Any]) -> float:
    """Discount the gains of the first ranks and add them up."""
    return float((gains / np.log2(np.arange(2, len(gains) + 2))).sum())
