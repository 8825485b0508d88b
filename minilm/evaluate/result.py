"""The one shape of every measurement: named figures, their intervals, a dictionary, a table."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
"""How often each unit (a pair, a query, a triplet) counts, `[units]`: once each, or as a resample drew it."""


@dataclass(frozen=True)
class Interval:
    """A confidence interval: both ends nan where the figure has no value."""

    low: float
    high: float

    def to_dict(self) -> dict[str, float | None]:
        """Return both ends, `None` for nan."""
        return {"low": json_number(self.low), "high": json_number(self.high)}

    def text(self, digits: int, sign: str = "") -> str:
        """Write it as `[77.95, 79.71]`; with sign `+` as `[-0.21, +1.55]`."""
        return f"[{self.low:{sign}.{digits}f}, {self.high:{sign}.{digits}f}]"


@dataclass(frozen=True, kw_only=True)
class Result(ABC):
    """What an evaluator measured.

    Attributes:
        measure: what was measured, as `minilm eval` calls it.
        headline: the name of the figure by which models are compared.
        digits: decimals shown.
        intervals: the figures' confidence intervals, once `significance.with_intervals` has added them.
    """

    measure: ClassVar[str]
    headline: ClassVar[str]
    digits: ClassVar[int] = 4
    intervals: Mapping[str, Interval] = field(default_factory=dict)

    @property
    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """How much was measured, such as `{"queries": 300, "documents": 5183}`."""

    @property
    def strata(self) -> tuple[int, ...]:
        """The numbers of units that a bootstrap draws from, each group by itself; none if it can't be resampled."""
        return ()

    @abstractmethod
    def recount(self, counts: Sequence[Counts]) -> dict[str, float]:
        """Compute the figures with each unit counted so many times: an array `[units]` a group of `strata`."""

    @cached_property
    def figures(self) -> dict[str, float]:
        """The figures by name; nan where one has no value."""
        return self.recount([np.ones(size, dtype=np.int64) for size in self.strata])

    def to_dict(self) -> dict[str, Any]:
        """Return everything as a dictionary that JSON can hold: unrounded, `None` for nan."""
        return {
            "measure": self.measure,
            **self.sizes,
            "figures": json_numbers(self.figures),
            "intervals": {name: interval.to_dict() for name, interval in self.intervals.items()},
        }

    def table(self) -> str:
        """Lay the figures out as text, a row a figure."""
        rows = [["figure", "value", *(["95% interval"] if self.intervals else [])]]
        for name, value in self.figures.items():
            interval = [self.intervals[name].text(self.digits)] if name in self.intervals else []
            rows.append([name, f"{value:.{self.digits}f}", *interval])
        sizes = ", ".join(f"{count:,} {what}" for what, count in self.sizes.items())
        return f"{self.measure}: {sizes}\n\n{aligned(rows)}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Lay rows out in columns, the first flush left and the others flush right."""
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(max(map(len, rows)))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=False))
        ).rstrip()
        for row in rows
    )


def json_number(value: float) -> float | None:
    """Return the number, or `None` for nan, which JSON does not have."""
    return None if math.isnan(value) else float(value)


def json_numbers(figures: Mapping[str, float]) -> dict[str, float | None]:
    """Return named numbers, `None` for nan."""
    return {name: json_number(value) for name, value in figures.items()}
