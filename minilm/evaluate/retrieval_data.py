"""Retrieval data in the layouts of BEIR and TREC.

A folder holds one file of each kind, plain or ending in `.gz` or `.xz`:

- `corpus.jsonl`, a line `{"_id": "d1", "title": "...", "text": "..."}` (the title may be missing; it is put before the
  text), or `corpus.tsv`, a line `d1<TAB>text`;
- `queries.jsonl`, a line `{"_id": "q1", "text": "..."}`, or `queries.tsv`, a line `q1<TAB>text`;
- `qrels/SPLIT.tsv` or `qrels/SPLIT.txt`, which document is how relevant to which query: a line
  `q1<TAB>d1<TAB>1` as in BEIR (whose header `query-id<TAB>corpus-id<TAB>score` is skipped) or `q1 0 d1 1` as in TREC.
  A relevance above 0 is relevant; documents that are not named are not.

Sources: https://github.com/beir-cellar/beir/wiki/Load-your-custom-dataset, https://trec.nist.gov/data/qrels_eng/
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from minilm.evaluate.files import EvaluationDataError, line_error, read_columns, read_lines, read_records

logger = logging.getLogger(__name__)

LAYOUT = "DIR/corpus.jsonl or .tsv, DIR/queries.jsonl or .tsv and DIR/qrels/SPLIT.tsv or .txt (.gz and .xz too)"
BEIR_HEADER = ["query-id", "corpus-id", "score"]

Qrels = dict[str, dict[str, int]]
"""How relevant documents are to a query, by the ids of both."""


@dataclass(frozen=True)
class RetrievalData:
    """A retrieval task.

    Attributes:
        corpus: documents by id.
        queries: the queries that were judged, by id.
        qrels: the judgements of each of these queries.
    """

    corpus: dict[str, str]
    queries: dict[str, str]
    qrels: Qrels


def read_retrieval(folder: str | os.PathLike[str], split: str = "test") -> RetrievalData:
    """Read the task that a folder holds.

    Raises:
        EvaluationDataError: a file is missing or there are two of a kind, a line is malformed (it is named), an id is
            there twice, or a query is judged that there is not.
    """
    folder = Path(folder)
    corpus = _read_texts(_find(folder, "corpus", "jsonl", "tsv"))
    queries = _read_texts(_find(folder, "queries", "jsonl", "tsv"))
    qrels = _read_qrels(_find(folder, f"qrels/{split}", "tsv", "txt"), queries)
    unknown = sum(document not in corpus for judged in qrels.values() for document in judged)
    if unknown:
        logger.warning("%d judged documents are not in the corpus of %s; they count as not found", unknown, folder)
    return RetrievalData(corpus, {query: queries[query] for query in qrels}, qrels)


def _find(folder: Path, name: str, *suffixes: str) -> Path:
    """Return the one file of that name."""
    names = [f"{name}.{suffix}{packed}" for suffix in suffixes for packed in ("", ".gz", ".xz")]
    found = [folder / name for name in names if (folder / name).is_file()]
    if len(found) != 1:
        what = f"there are {', '.join(map(str, found))}: keep one" if found else f"{folder} has no {names[0]}"
        raise EvaluationDataError(f"{what}; retrieval data is expected as {LAYOUT}")
    return found[0]


def _read_texts(path: Path) -> dict[str, str]:
    """Read texts by id."""
    texts: dict[str, str] = {}
    for number, name, text in _jsonl_texts(path) if ".jsonl" in path.suffixes else _tsv_texts(path):
        if name in texts:
            raise line_error(path, number, "each id once", f"{name!r} again")
        texts[name] = text
    return texts


def _tsv_texts(path: Path) -> Iterator[tuple[int, str, str]]:
    for number, (name, text) in read_columns(path, "id<TAB>text"):
        yield number, name, text


def _jsonl_texts(path: Path) -> Iterator[tuple[int, str, str]]:
    for number, record in read_records(path, "_id", "text"):
        title = record.get("title")
        yield number, record["_id"], f"{title} {record['text']}" if title else record["text"]


def _read_qrels(path: Path, queries: dict[str, str]) -> Qrels:
    """Read the judgements of queries that are there."""
    qrels: Qrels = {}
    for number, line in read_lines(path):
        columns = line.split("\t") if "\t" in line else line.split()
        if number == 1 and columns == BEIR_HEADER:
            continue
        try:
            query, document, relevance = columns[0], columns[-2], int(columns[-1])
            if len(columns) not in (3, 4):
                raise ValueError
        except (IndexError, ValueError):
            expected = "query<TAB>document<TAB>relevance or query 0 document relevance, the relevance an integer"
            raise line_error(path, number, expected, repr(line)) from None
        if query not in queries:
            raise line_error(path, number, "a query of the queries file", repr(query))
        if document in qrels.setdefault(query, {}):
            raise line_error(path, number, "each document once a query", f"{document!r} again for {query!r}")
        qrels[query][document] = relevance
    if not qrels:
        raise EvaluationDataError(f"{path} has no judgements")
    return qrels
