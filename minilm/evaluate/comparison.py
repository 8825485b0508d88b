"""Several models on the same data: figures with intervals, and how sure it is that a model differs from the first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minilm.evaluate.result import Result, aligned
from minilm.evaluate.significance import (
    SAMPLES,
    Difference,
    add_intervals,
    bootstrap,
    paired_difference,
)

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        results: each model's figures, with intervals where its units can be resampled; the first is what the others are
            compared with.
        differences: of each other model, by figure, from the first; empty where units can't be resampled.
    """

    results: dict[str, Result]
    differences: dict[str, dict[str, Difference]]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as a dictionary that JSON can hold: unrounded, `None` for nan."""
        models = {name: result.to_dict() for name, result in self.results.items()}
        differences = {
            name: {figure: difference.to_dict() for figure, difference in figures.items()}
            for name, figures in self.differences.items()
        }
        return {"compared_with": next(iter(models)), "models": models, "differences": differences}

    def table(self) -> str:
        """Lay the figures out as text, a row a model; below it what a star means, and the headline's differences."""
        first = next(iter(self.results.values()))
        head, digits = first.headline, first.digits
        others = [figure for figure in first.figures if figure != head]
        rows = [["model", *others, head, *(["95% interval"] if first.intervals else [])]]
        for name, result in self.results.items():
            cells = [f"{result.figures[figure]:.{digits}f}{self._star(name, figure)}" for figure in (*others, head)]
            rows.append([name, *cells, *([result.intervals[head].text(digits)] if result.intervals else [])])
        parts = [aligned(rows)]
        if self.differences:
            lines = [[head, f"less {next(iter(self.results))}", "95% interval", "p"]]
            for name, differences in self.differences.items():
                found = differences[head]
                cells = [f"{found.value:+.{digits}f}", found.interval.text(digits, "+"), f"{found.p_value:.3f}"]
                lines.append([name, *cells])
            parts.append(aligned(lines))
            parts.append(f"* p < {SIGNIFICANT} that it differs from the first (paired bootstrap, one figure by itself)")
        return "\n\n".join(parts)

    def is_significant(self, model: str, figure: str) -> bool:
        """Tell whether a model's figure differs from the first's with p < 0.05; never of the first itself."""
        difference = self.differences.get(model, {}).get(figure)
        return difference is not None and difference.p_value < SIGNIFICANT

    def _star(self, model: str, figure: str) -> str:
        """Return the mark of a figure that differs from the first's, or its room; nothing where none was tested."""
        return ("*" if self.is_significant(model, figure) else " ") if self.differences else ""


def compare(results: Mapping[str, Result], samples: int = SAMPLES, seed: int = 0) -> Comparison:
    """Compare models by their results on the same data.

    Args:
        results: each model's result by its name; the first is what the others are compared with.
        samples: bootstrap samples; 0 for no intervals and no test.
        seed: of the bootstrap.

    Raises:
        ValueError: there is no result, or they are not of one measure on the same data.
    """
    if not results:
        raise ValueError("expected at least one result to compare, got none")
    first = next(iter(results.values()))
    for name, result in results.items():
        if (result.measure, result.sizes, result.strata, list(result.figures)) != (
            first.measure,
            first.sizes,
            first.strata,
            list(first.figures),
        ):
            raise ValueError(
                f"expected results on the same data, got {first.measure} of {first.sizes} and, for {name}, "
                f"{result.measure} of {result.sizes}"
            )
    if not first.strata or not samples:
        return Comparison(dict(results), {})
    draws = {name: bootstrap(result, samples, seed) for name, result in results.items()}
    baseline, *others = results
    differences = {name: _differences(first, results[name], draws[baseline], draws[name]) for name in others}
    return Comparison({name: add_intervals(result, draws[name]) for name, result in results.items()}, differences)


def _differences(
    first: Result, second: Result, first_draws: NDArray[np.float64], second_draws: NDArray[np.float64]
) -> dict[str, Difference]:
    """Judge each figure's difference, second less first, from both on the same resamples, `[samples, figures]`."""
    columns = zip(first.figures, first_draws.T, second_draws.T, strict=True)
    return {
        name: paired_difference(second.figures[name] - first.figures[name], of_first, of_second)
        for name, of_first, of_second in columns
    }
