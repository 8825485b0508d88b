"""Semantic textual similarity: how well cosine similarities order sentence pairs as people do.

The measure of the field is Spearman's rank correlation x 100 on seven tasks and their average: STS 2012-2016 (SemEval;
the subsets of a year are concatenated and correlated once, the "all" setting of SimCSE, https://arxiv.org/abs/2104.08821),
the STS benchmark's test set, and SICK relatedness (SICK-R). Pearson's correlation is given beside it.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from minilm.evaluate.correlation import pearson, spearman
from minilm.evaluate.sts_data import TASKS, Pairs, Task, read_sts
from minilm.progress import progress_bar

logger = logging.getLogger(__name__)

CHUNK = 1024
"""Sentences handed to the encoder at a time, between two steps of the progress bar."""


class Encoder(Protocol):
    """Anything that turns n texts into an `[n, C]` array or CPU tensor: this library's encoder, or another's."""

    def encode(self, sentences: list[str], /) -> Any:
        """Return one vector a text, in order."""


@dataclass(frozen=True)
class STSScore:
    """The figures of one task or subset; a correlation is nan where it is undefined (say, all scores equal).

    Attributes:
        name: the task or subset.
        num_pairs: sentence pairs.
        spearman: Spearman's correlation x 100.
        pearson: Pearson's correlation x 100.
        subsets: the figures of the task's subsets, where it has several.
    """

    name: str
    num_pairs: int
    spearman: float
    pearson: float
    subsets: tuple[STSScore, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as a dictionary that JSON can hold: unrounded, `None` for nan."""
        figures = {
            "num_pairs": self.num_pairs,
            "spearman": _json_number(self.spearman),
            "pearson": _json_number(self.pearson),
        }
        return (
            {**figures, "subsets": {subset.name: subset.to_dict() for subset in self.subsets}}
            if self.subsets
            else figures
        )


@dataclass(frozen=True)
class STSResult:
    """What `evaluate_sts` measured.

    Attributes:
        tasks: the figures of each task, in the order asked for.
        split: `test` or `dev`.
    """

    tasks: tuple[STSScore, ...]
    split: str = "test"

    @property
    def average(self) -> float:
        """The mean of the tasks' Spearman correlations x 100; nan if one of them is."""
        return sum(task.spearman for task in self.tasks) / len(self.tasks)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as a dictionary that JSON can hold."""
        tasks = {task.name: task.to_dict() for task in self.tasks}
        return {"split": self.split, "average_spearman": _json_number(self.average), "tasks": tasks}

    def table(self) -> str:
        """Lay the figures out as text, a row a task, and below it one a subset."""
        rows = [("task", "pairs", "Spearman", "Pearson")]
        for task in self.tasks:
            rows.append(_row(task))
            rows.extend(_row(subset, indent="  ") for subset in task.subsets)
        rows.append((f"average of {len(self.tasks)}", "", f"{self.average:.2f}", ""))
        width = max(len(row[0]) for row in rows)
        return "\n".join(f"{name:<{width}} {pairs:>6} {rho:>9} {r:>8}".rstrip() for name, pairs, rho, r in rows)


def evaluate_sts(
    encoder: Encoder,
    data: str | os.PathLike[str] | None = None,
    *,
    tasks: Iterable[str] = TASKS,
    split: str = "test",
    show_progress_bar: bool | None = None,
) -> STSResult:
    """Measure an encoder on semantic textual similarity, by the cosine of each pair's vectors.

    Args:
        encoder: any object whose `encode(list of str)` returns an `[n, C]` array or CPU tensor.
        data: the folder that holds the tasks (`minilm.evaluate.sts_data` describes it); `None` takes the public sets
            from the Hugging Face hub.
        tasks: which of `sts12` ... `sts16`, `stsb` and `sickr` to run.
        split: `test`, or `dev` for `stsb` and `sickr`.
        show_progress_bar: `None` shows it if the `minilm` logger is at level INFO or below.

    Raises:
        STSDataError: data is missing, malformed or out of reach.
        ValueError: an unknown task or split, or the encoder's vectors are unusable.
    """
    pairs = read_sts(data, tasks, split)
    sentences = [text for task in pairs.values() for part in task.values() for text in (*part.first, *part.second)]
    unit = _unit_vectors(encoder, list(dict.fromkeys(sentences)), show_progress_bar)
    scores = tuple(_score_task(name, task, unit) for name, task in pairs.items())
    undefined = [score.name for task in scores for score in (task, *task.subsets) if math.isnan(score.spearman)]
    if undefined:
        logger.warning("no correlation for %s: all scores or all similarities are equal", ", ".join(undefined))
    return STSResult(scores, split)


def _unit_vectors(
    encoder: Encoder, sentences: list[str], show_progress_bar: bool | None
) -> Mapping[str, NDArray[np.float64]]:
    """Encode each sentence once and scale its vector to length 1 (a zero vector stays zero)."""
    unit: dict[str, NDArray[np.float64]] = {}
    with progress_bar(show_progress_bar, len(sentences), "encode", "sentence") as advance:
        for start in range(0, len(sentences), CHUNK):
            chunk = sentences[start : start + CHUNK]
            vectors = np.asarray(encoder.encode(chunk), dtype=np.float64)
            if vectors.ndim != 2 or len(vectors) != len(chunk) or not np.isfinite(vectors).all():
                raise ValueError(f"expected finite vectors [{len(chunk)}, C] of encode(), got an array {vectors.shape}")
            norms = np.linalg.norm(vectors, axis=1, keepdims=True)
            unit.update(zip(chunk, vectors / np.where(norms == 0, 1, norms), strict=True))
            advance(len(chunk))
    return unit


def _score_task(name: str, task: Task, unit: Mapping[str, NDArray[np.float64]]) -> STSScore:
    """Score the concatenation of a task's subsets, and each of them if there are several."""
    similarities = {
        # Rounded to what float32 vectors tell apart, so that pairs of equal sentences tie.
        subset: np.round([unit[a] @ unit[b] for a, b in zip(pairs.first, pairs.second, strict=True)], 7)
        for subset, pairs in task.items()
    }
    subsets = tuple(_score(subset, pairs, similarities[subset]) for subset, pairs in task.items())
    together = np.concatenate(list(similarities.values()))
    return _score(name, Pairs.join(task.values()), together, subsets if len(subsets) > 1 else ())


def _score(name: str, pairs: Pairs, similarities: NDArray[np.float64], subsets: tuple[STSScore, ...] = ()) -> STSScore:
    """Correlate similarities `[n]` with what people said."""
    return STSScore(
        name, len(pairs), 100 * spearman(similarities, pairs.scores), 100 * pearson(similarities, pairs.scores), subsets
    )


def _row(score: STSScore, indent: str = "") -> tuple[str, str, str, str]:
    """Format one row of the table."""
    return indent + score.name, str(score.num_pairs), f"{score.spearman:.2f}", f"{score.pearson:.2f}"


def _json_number(value: float) -> float | None:
    """Return the number, or `None` for nan, which JSON does not have."""
    return None if math.isnan(value) else value
