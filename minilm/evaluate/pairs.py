"""Pair classification: how well cosine similarities tell pairs that belong together from pairs that do not.

Average precision is the sum over falling thresholds of (R_n - R_(n-1)) P_n, with precision P and recall R of the pairs
at or above the threshold; F1 = 2 P R / (P + R) is given at the threshold where it is highest. Both are scikit-learn's
(`average_precision_score`, `precision_recall_curve`): nothing is interpolated, pairs of equal similarity go together.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from minilm.evaluate.files import EvaluationDataError, line_error, read_columns
from minilm.evaluate.result import Counts, Result
from minilm.evaluate.vectors import Encoder, unit_vectors

FORM = "label<TAB>text1<TAB>text2"


@dataclass(frozen=True, eq=False)
class PairResult(Result):
    """What `evaluate_pairs` measured.

    Attributes:
        similarities: the cosine of each pair, float64 `[n]`.
        labels: whether each pair belongs together, bool `[n]`.
    """

    measure: ClassVar[str] = "pairs"
    headline: ClassVar[str] = "average precision"
    similarities: NDArray[np.float64]
    labels: NDArray[np.bool_]

    @property
    def sizes(self) -> dict[str, int]:
        """The numbers of pairs, and of those that belong together."""
        return {"pairs": len(self.labels), "positive": int(self.labels.sum())}

    @property
    def strata(self) -> tuple[int, ...]:
        """The number of pairs."""
        return (len(self.labels),)

    @cached_property
    def _thresholds(self) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
        """The different similarities, falling, and the place of each pair's own among them."""
        negated, place = np.unique(-self.similarities, return_inverse=True)
        return -negated, place

    def recount(self, counts: Sequence[Counts]) -> dict[str, float]:
        """Compute the figures of counted pairs; nan where none of them belongs together."""
        (drawn,) = counts
        thresholds, place = self._thresholds
        positive = np.cumsum(np.bincount(place, drawn * self.labels))  # at or above each threshold
        called = np.cumsum(np.bincount(place, drawn))
        if positive[-1] == 0:
            return dict.fromkeys((self.headline, "F1", "precision", "recall", "threshold"), math.nan)
        precision = positive / np.maximum(called, 1)
        recall = positive / positive[-1]
        f1 = 2 * positive / (called + positive[-1])
        best = int(f1.argmax())
        return {
            self.headline: float(np.diff(recall, prepend=0) @ precision),
            "F1": float(f1[best]),
            "precision": float(precision[best]),
            "recall": float(recall[best]),
            "threshold": float(thresholds[best]),
        }


def evaluate_pairs(
    encoder: Encoder, data: str | os.PathLike[str], *, show_progress_bar: bool | None = None
) -> PairResult:
    """Measure an encoder on pair classification.

    Args:
        encoder: any object whose `encode(list of str)` returns an `[n, C]` array or CPU tensor.
        data: a file of `label<TAB>text1<TAB>text2` lines, label 1 (belong together) or 0, in UTF-8, without a header;
            it may be compressed as `.gz` or `.xz`.
        show_progress_bar: `None` shows it if the `minilm` logger is at level INFO or below.

    Raises:
        EvaluationDataError: the file is missing, a line is malformed (it is named), or one of the labels is missing.
        ValueError: the encoder's vectors are unusable.
    """
    labels, first, second = [], [], []
    for number, (label, *texts) in read_columns(data, FORM):
        if label not in ("0", "1"):
            raise line_error(data, number, f"{FORM} with label 0 or 1", f"label {label!r}")
        labels.append(label == "1")
        first.append(texts[0])
        second.append(texts[1])
    if len(set(labels)) != 2:
        raise EvaluationDataError(f"{data}: expected pairs of both labels, 0 and 1; got only {int(labels[0])}")
    similarities = unit_vectors(encoder.encode, first + second, show_progress_bar).cosines(first, second)
    return PairResult(similarities, np.array(labels))
