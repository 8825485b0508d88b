"""Semantic textual similarity: how well cosine similarities order sentence pairs as people do.

The measure of the field is Spearman's rank correlation x 100 on seven tasks and their average: STS 2012-2016 (SemEval;
the subsets of a year are concatenated and correlated once, the "all" setting of SimCSE, https://arxiv.org/abs/2104.08821),
the STS benchmark's test set, and SICK relatedness (SICK-R). Pearson's correlation is given beside it.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from minilm.evaluate.correlation import ResampledSpearman, pearson
from minilm.evaluate.result import Counts, Result, aligned, json_number
from minilm.evaluate.sts_data import TASKS, Task, read_sts
from minilm.evaluate.vectors import Encoder, UnitVectors, unit_vectors

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class STSScore:
    """How one task or subset was scored.

    Attributes:
        name: the task or subset.
        similarities: the cosine of each pair, float64 `[n]`.
        gold: the similarity that people gave each pair, float64 `[n]`.
        subsets: the same for each of the task's subsets, where it has several.
    """

    name: str
    similarities: NDArray[np.float64]
    gold: NDArray[np.float64]
    subsets: tuple[STSScore, ...] = ()

    @property
    def num_pairs(self) -> int:
        """The number of sentence pairs."""
        return len(self.gold)

    @cached_property
    def spearman(self) -> float:
        """Spearman's correlation x 100; nan where it is undefined (say, all scores equal)."""
        return 100 * self.resampled_spearman(np.ones(self.num_pairs, dtype=np.int64))

    @cached_property
    def pearson(self) -> float:
        """Pearson's correlation x 100; nan where it is undefined."""
        return 100 * pearson(self.similarities, self.gold)

    @cached_property
    def resampled_spearman(self) -> ResampledSpearman:
        """A function that gives Spearman's correlation of a resample."""
        return ResampledSpearman(self.similarities, self.gold)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as a dictionary that JSON can hold: unrounded, `None` for nan."""
        figures = {
            "num_pairs": self.num_pairs,
            "spearman": json_number(self.spearman),
            "pearson": json_number(self.pearson),
        }
        subsets = {subset.name: subset.to_dict() for subset in self.subsets}
        return {**figures, "subsets": subsets} if subsets else figures


@dataclass(frozen=True)
class STSResult(Result):
    """What `evaluate_sts` measured: the figures are Spearman's correlation x 100 by task, and their average.

    Attributes:
        tasks: the scores of each task, in the order asked for.
        split: `test` or `dev`.
    """

    measure: ClassVar[str] = "sts"
    headline: ClassVar[str] = "average"
    digits: ClassVar[int] = 2
    tasks: tuple[STSScore, ...]
    split: str = "test"

    @property
    def average(self) -> float:
        """The mean of the tasks' Spearman correlations x 100; nan if one of them is."""
        return self.figures[self.headline]

    @property
    def sizes(self) -> dict[str, int]:
        """The number of pairs, all tasks together."""
        return {"pairs": sum(self.strata)}

    @property
    def strata(self) -> tuple[int, ...]:
        """The number of pairs of each task."""
        return tuple(task.num_pairs for task in self.tasks)

    def recount(self, counts: Sequence[Counts]) -> dict[str, float]:
        """Compute Spearman's correlation x 100 of each task, and their average, on counted pairs."""
        drawn = zip(self.tasks, counts, strict=True)
        figures = {task.name: 100 * task.resampled_spearman(task_counts) for task, task_counts in drawn}
        return {**figures, self.headline: sum(figures.values()) / len(figures)}

    def to_dict(self) -> dict[str, Any]:
        """Return everything as a dictionary that JSON can hold."""
        return {
            **super().to_dict(),
            "split": self.split,
            "average_spearman": json_number(self.average),
            "tasks": {task.name: task.to_dict() for task in self.tasks},
        }

    def table(self) -> str:
        """Lay the figures out as text, a row a task, and below it one a subset."""
        rows = [["task", "pairs", "Spearman", "Pearson", *(["95% interval"] if self.intervals else [])]]
        for task in self.tasks:
            rows.append([*_row(task), *self._interval(task.name)])
            rows.extend(_row(subset, indent="  ") for subset in task.subsets)
        rows.append([f"average of {len(self.tasks)}", "", f"{self.average:.2f}", "", *self._interval(self.headline)])
        return aligned(rows)

    def _interval(self, name: str) -> list[str]:
        """Return the cell of an interval, or none."""
        return [self.intervals[name].text(self.digits)] if name in self.intervals else []


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
        EvaluationDataError: data is missing, malformed or out of reach.
        ValueError: an unknown task or split, or the encoder's vectors are unusable.
    """
    pairs = read_sts(data, tasks, split)
    sentences = [text for task in pairs.values() for part in task.values() for text in (*part.first, *part.second)]
    unit = unit_vectors(encoder.encode, sentences, show_progress_bar)
    scores = tuple(_score_task(name, task, unit) for name, task in pairs.items())
    undefined = [score.name for task in scores for score in (task, *task.subsets) if math.isnan(score.spearman)]
    if undefined:
        logger.warning("no correlation for %s: all scores or all similarities are equal", ", ".join(undefined))
    return STSResult(scores, split)


def _score_task(name: str, task: Task, unit: UnitVectors) -> STSScore:
    """Score the concatenation of a task's subsets, and each of them if there are several."""
    subsets = tuple(
        STSScore(subset, unit.cosines(pairs.first, pairs.second), np.array(pairs.scores))
        for subset, pairs in task.items()
    )
    if len(subsets) == 1:
        return replace(subsets[0], name=name)
    similarities = np.concatenate([subset.similarities for subset in subsets])
    return STSScore(name, similarities, np.concatenate([subset.gold for subset in subsets]), subsets)


def _row(score: STSScore, indent: str = "") -> list[str]:
    """Format one row of the table."""
    return [indent + score.name, str(score.num_pairs), f"{score.spearman:.2f}", f"{score.pearson:.2f}"]
