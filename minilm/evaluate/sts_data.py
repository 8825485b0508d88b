"""Semantic textual similarity data: from a folder of TSV files, or from the Hugging Face hub.

A folder holds `sts12/SUBSET.tsv` ... `sts16/SUBSET.tsv`, `stsb/test.tsv` and `sickr/test.tsv` (`dev.tsv` for the
development split of the last two). A line is `score<TAB>sentence1<TAB>sentence2`: UTF-8, no header, quotes are literal.

The hub's copies are those of MTEB (https://github.com/embeddings-benchmark/mteb), pinned to the revisions it evaluates:
one `SPLIT.jsonl.gz` a task with the fields score, sentence1 and sentence2, subsets not told apart. Its SICK-R is the
whole SICK set of 9,927 pairs and not the test split of 4,927, so that one figure differs from a folder's.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilm.evaluate.files import EvaluationDataError, as_number, read_columns, read_records
from minilm.weights.hubs import dataset_file

logger = logging.getLogger(__name__)

YEARS = ("sts12", "sts13", "sts14", "sts15", "sts16")
TASKS = (*YEARS, "stsb", "sickr")
SPLITS = ("test", "dev")
LAYOUT = (
    "DIR/sts12/SUBSET.tsv ... DIR/sts16/SUBSET.tsv, DIR/stsb/test.tsv and DIR/sickr/test.tsv (dev.tsv for the dev "
    "split), each line score<TAB>sentence1<TAB>sentence2 in UTF-8, without a header"
)
HUB_DATASETS = {
    "sts12": ("mteb/sts12-sts", "a0d554a64d88156834ff5ae9920b964011b16384"),
    "sts13": ("mteb/sts13-sts", "7e90230a92c190f1bf69ae9002b8cea547a64cca"),
    "sts14": ("mteb/sts14-sts", "6031580fec1f6af667f0bd2da0a551cf4f0b2375"),
    "sts15": ("mteb/sts15-sts", "ae752c7c21bf194d8b67fd573edf7ae58183cbe3"),
    "sts16": ("mteb/sts16-sts", "4d8694f8f0e0100860b497b999b3dbed754a0513"),
    "stsb": ("mteb/stsbenchmark-sts", "b0fddb56ed78048fa8b90373c8a3cfc37b684831"),
    "sickr": ("mteb/sickr-sts", "20a6d6f312dd54037fe07a32d58e5e168867909d"),
}


@dataclass(frozen=True)
class Pairs:
    """Sentence pairs with the similarity that people gave them: three equally long lists."""

    scores: list[float]
    first: list[str]
    second: list[str]

    def __len__(self) -> int:
        """Count the pairs."""
        return len(self.scores)


Task = Mapping[str, Pairs]
"""A task's pairs by subset name."""


def read_sts(data: str | os.PathLike[str] | None, tasks: Iterable[str], split: str) -> dict[str, Task]:
    """Read the tasks from the folder `data`, or from the hub where it is `None`.

    Raises:
        EvaluationDataError: a task's files are missing (all of them are listed), malformed or out of reach.
        ValueError: an unknown task or split.
    """
    tasks = tuple(tasks)
    unknown = sorted(set(tasks) - set(TASKS))
    if unknown or not tasks:
        raise ValueError(f"unknown STS task {', '.join(unknown) or '(none given)'}; choose from {', '.join(TASKS)}")
    if split not in SPLITS or (split == "dev" and set(tasks) & set(YEARS)):
        raise ValueError(
            f"split is 'test', or 'dev' for the tasks stsb and sickr; got {split!r} for {', '.join(tasks)}"
        )
    if data is None:
        return {task: _read_hub(task, split) for task in tasks}
    files = _find(Path(data), tasks, split)
    return {task: {path.stem: read_tsv(path) for path in paths} for task, paths in files.items()}


def read_tsv(path: Path) -> Pairs:
    """Read lines of `score<TAB>sentence1<TAB>sentence2`; nothing is unquoted or stripped.

    Raises:
        EvaluationDataError: the file is not UTF-8, or a line is not of that form (its number is given).
    """
    return _pairs(read_columns(path, "score<TAB>sentence1<TAB>sentence2"), path)


def read_jsonl(path: Path) -> Pairs:
    """Read lines of `{"score": ..., "sentence1": ..., "sentence2": ...}`, gzipped if the name ends so.

    Raises:
        EvaluationDataError: the file is damaged, or a line is not of that form (its number is given).
    """
    records = read_records(path, "sentence1", "sentence2")
    rows = ((number, [record.get("score"), record["sentence1"], record["sentence2"]]) for number, record in records)
    return _pairs(rows, path)


def _pairs(rows: Iterable[tuple[int, list[Any]]], path: Path) -> Pairs:
    """Turn numbered rows of score and two sentences into `Pairs`."""
    pairs = Pairs([], [], [])
    for number, (score, first, second) in rows:
        pairs.scores.append(as_number(score, path, number))
        pairs.first.append(first)
        pairs.second.append(second)
    return pairs


def _find(folder: Path, tasks: tuple[str, ...], split: str) -> dict[str, list[Path]]:
    """List each task's files, sorted, or say which tasks have none."""
    if not folder.is_dir():
        raise EvaluationDataError(f"there is no folder {folder}; the STS data is expected as {LAYOUT}")
    pattern = {task: "*.tsv" if task in YEARS else f"{split}.tsv" for task in tasks}
    files = {task: sorted((folder / task).glob(pattern[task])) for task in tasks}
    missing = [f"{task}/{pattern[task]}" for task in tasks if not files[task]]
    if missing:
        raise EvaluationDataError(
            f"{folder} lacks {', '.join(missing)}; choose other tasks, or complete it to {LAYOUT}"
        )
    return files


def _read_hub(task: str, split: str) -> Task:
    """Fetch one task from the hub (or find it in the hub's cache) and read it."""
    if task == "sickr":
        if split == "dev":
            raise EvaluationDataError(f"the hub has no dev split of SICK-R; give a folder that has it: {LAYOUT}")
        logger.warning("the hub's SICK-R is the whole set of 9,927 pairs, not the test split of 4,927 pairs")
    path = _download(task, "validation.jsonl.gz" if split == "dev" else "test.jsonl.gz")
    return {split: read_jsonl(path)}


def _download(task: str, filename: str) -> Path:
    """Return the hub's file on this machine: from its client's cache, or downloaded to it."""
    name, revision = HUB_DATASETS[task]
    try:
        return dataset_file(name, filename, revision)
    except OSError as error:
        raise EvaluationDataError(
            f"cannot fetch {filename} of the dataset {name} from the Hugging Face hub ({error}); "
            f"give the data as a folder instead: {LAYOUT}"
        ) from error
