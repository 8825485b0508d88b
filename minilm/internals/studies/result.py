"""What a study returns: what was asked, measured and found, and pictures of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minilm.evaluate.result import aligned

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class StudyResult:
    """A question, what was measured, and what it says.

    Attributes:
        question: what the study asks.
        columns: the names of the measurements.
        rows: by place (a layer, a component), a number for each column.
        findings: what they say, a sentence or two each.
        pictures: draws them, by name; needs matplotlib.
    """

    question: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[float]]
    findings: Sequence[str]
    pictures: Callable[[], dict[str, Figure]]

    def table(self) -> str:
        """Return all but the pictures as text."""
        lines = [[place, *(f"{number:.4f}" for number in numbers)] for place, numbers in self.rows.items()]
        return "\n".join([self.question, "", aligned([["", *self.columns], *lines]), "", *self.findings])

    __repr__ = table
