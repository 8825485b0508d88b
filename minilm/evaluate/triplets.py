"""Triplet accuracy: how often an anchor is nearer, by cosine, to its positive than to its negative."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from minilm.evaluate.files import read_columns
from minilm.evaluate.result import Counts, Result
from minilm.evaluate.vectors import Encoder, unit_vectors

FORM = "anchor<TAB>positive<TAB>negative"


@dataclass(frozen=True, eq=False)
class TripletResult(Result):
    """What `evaluate_triplets` measured.

    Attributes:
        margins: cosine to the positive less cosine to the negative, float64 `[n]`; a triplet is right above 0.
    """

    measure: ClassVar[str] = "triplets"
    headline: ClassVar[str] = "accuracy"
    margins: NDArray[np.float64]

    @property
    def sizes(self) -> dict[str, int]:
        """The number of triplets."""
        return {"triplets": len(self.margins)}

    @property
    def strata(self) -> tuple[int, ...]:
        """The number of triplets."""
        return (len(self.margins),)

    def recount(self, counts: Sequence[Counts]) -> dict[str, float]:
        """Compute the accuracy and the mean margin of counted triplets."""
        (drawn,) = counts
        total = drawn.sum()
        return {
            self.headline: float(drawn @ (self.margins > 0) / total),
            "mean margin": float(drawn @ self.margins / total),
        }


def evaluate_triplets(
    encoder: Encoder, data: str | os.PathLike[str], *, show_progress_bar: bool | None = None
) -> TripletResult:
    """Measure an encoder on triplets.

    Args:
        encoder: any object whose `encode(list of str)` returns an `[n, C]` array or CPU tensor.
        data: a file of `anchor<TAB>positive<TAB>negative` lines in UTF-8, without a header; it may be compressed as
            `.gz` or `.xz`.
        show_progress_bar: `None` shows it if the `minilm` logger is at level INFO or below.

    Raises:
        EvaluationDataError: the file is missing, or a line is malformed (it is named).
        ValueError: the encoder's vectors are unusable.
    """
    anchors, positives, negatives = zip(*(columns for _, columns in read_columns(data, FORM)), strict=True)
    unit = unit_vectors(encoder.encode, anchors + positives + negatives, show_progress_bar)
    return TripletResult(unit.cosines(anchors, positives) - unit.cosines(anchors, negatives))
