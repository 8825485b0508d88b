"""Alignment and uniformity of unit vectors (Wang and Isola, 2020, https://arxiv.org/abs/2005.10242); lower is better.

    alignment  = mean of |f(x) - f(y)|^2 over pairs (x, y) that belong together
    uniformity = log of the mean of exp(-2 |f(x) - f(y)|^2) over all pairs of different texts

SimCSE (https://arxiv.org/abs/2104.08821) takes alignment over the pairs of STS-B that score above 4, and uniformity
over all its sentences.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from minilm.evaluate.files import EvaluationDataError, as_number, read_columns
from minilm.evaluate.result import Counts, Result
from minilm.evaluate.vectors import Encoder, unit_vectors

FORMS = ("text1<TAB>text2", "score<TAB>text1<TAB>text2")
POSITIVE_ABOVE = 4.0
ROWS = 1024


@dataclass(frozen=True)
class UniformityResult(Result):
    """What `evaluate_uniformity` measured; it has no intervals.

    Attributes:
        alignment: mean squared distance of positive pairs, 0 to 4.
        uniformity: log mean Gaussian potential of all pairs of texts, -8 to 0.
        num_pairs: positive pairs.
        num_texts: different texts.
    """

    measure: ClassVar[str] = "uniformity"
    headline: ClassVar[str] = "uniformity"
    alignment: float
    uniformity: float
    num_pairs: int
    num_texts: int

    @property
    def sizes(self) -> dict[str, int]:
        """The numbers of positive pairs and of different texts."""
        return {"positive pairs": self.num_pairs, "texts": self.num_texts}

    def recount(self, counts: Sequence[Counts]) -> dict[str, float]:  # noqa: ARG002 - there are no units
        """Return both figures."""
        return {"alignment": self.alignment, "uniformity": self.uniformity}


def evaluate_uniformity(
    encoder: Encoder,
    data: str | os.PathLike[str],
    *,
    positive_above: float = POSITIVE_ABOVE,
    show_progress_bar: bool | None = None,
) -> UniformityResult:
    """Measure alignment and uniformity; all pairs of texts are compared, so the time grows with their square.

    Args:
        encoder: any object whose `encode(list of str)` returns an `[n, C]` array or CPU tensor.
        data: a file of `text1<TAB>text2` lines, pairs that belong together, or of `score<TAB>text1<TAB>text2` lines
            (an STS task), in UTF-8, without a header; it may be compressed as `.gz` or `.xz`.
        positive_above: with scores, a pair belongs together above this.
        show_progress_bar: `None` shows it if the `minilm` logger is at level INFO or below.

    Raises:
        EvaluationDataError: the file is missing, a line is malformed (it is named), or no pair belongs together.
        ValueError: the encoder's vectors are unusable.
    """
    positives: list[tuple[str, str]] = []
    texts: list[str] = []
    for number, (*score, first, second) in read_columns(data, *FORMS):
        texts += first, second
        if not score or as_number(score[0], data, number) > positive_above:
            positives.append((first, second))
    if not positives:
        raise EvaluationDataError(f"{data}: no pair has a score above {positive_above:g}, so there is none to align")
    unit = unit_vectors(encoder.encode, texts, show_progress_bar)
    if len(unit.rows) < 2:
        raise EvaluationDataError(f"{data}: expected at least two different texts, got {list(unit.rows)}")
    firsts, seconds = zip(*positives, strict=True)
    aligned = alignment(unit[firsts], unit[seconds])
    return UniformityResult(aligned, uniformity(unit.matrix), len(positives), len(unit.rows))


def alignment(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Return the mean of |a - b|^2 over rows a of `first [n, C]` and b of `second [n, C]`, each of length 1."""
    return float(((first - second) ** 2).sum(axis=1).mean())


def uniformity(unit: NDArray[np.float64], t: float = 2.0) -> float:
    """Return the log of the mean of exp(-t |a - b|^2) over all pairs of rows of `unit [n, C]`, each of length 1."""
    num_rows, total = len(unit), 0.0
    for start in range(0, num_rows, ROWS):
        potentials = np.exp(-t * (2 - 2 * (unit[start : start + ROWS] @ unit.T)))
        np.fill_diagonal(potentials[:, start:], 0)  # a row with itself
        total += float(potentials.sum())
    return math.log(total / (num_rows * (num_rows - 1)))
