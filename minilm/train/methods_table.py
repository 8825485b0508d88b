"""The table of several methods: a row a recipe, its figures as mean and standard deviation over seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from minilm.evaluate.result import aligned, json_number, json_numbers
from minilm.train.methods import Outcome
from minilm.train.runs import entries

HEADLINE = "average"


@dataclass(frozen=True)
class Method:
    """The runs of one recipe.

    Attributes:
        outcomes: of its runs, one a seed.
    """

    outcomes: Sequence[Outcome]

    @property
    def name(self) -> str:
        """The recipe's name."""
        return self.outcomes[0].recipe.name

    @property
    def objective(self) -> str:
        """The objective's name."""
        return str(self.outcomes[0].recipe.objective["name"])

    @property
    def done(self) -> list[Outcome]:
        """The outcomes of runs that did not fail."""
        return [outcome for outcome in self.outcomes if not outcome.failure]

    def values(self, figure: str) -> list[float]:
        """Return a figure of each run that did not fail."""
        return [outcome.figures[figure] for outcome in self.done]

    def mean(self, figure: str) -> float:
        """Return a figure's mean over seeds; nan if all failed."""
        return float(np.mean(values)) if (values := self.values(figure)) else math.nan

    def deviation(self, figure: str) -> float:
        """Return a figure's standard deviation over seeds, that of a sample (n - 1); nan for fewer than two."""
        return float(np.std(values, ddof=1)) if len(values := self.values(figure)) > 1 else math.nan

    def score(self, figure: str) -> str:
        """Write a score as `79.46 ± 0.12`, without deviation where there is one seed; `failed` where there is none."""
        if not self.done:
            return "failed"
        return f"{self.mean(figure):.2f}" + (f" ± {self.deviation(figure):.2f}" if len(self.done) > 1 else "")

    def count(self, figure: str) -> str:
        """Write the mean of a whole number; nothing where all runs failed."""
        return f"{self.mean(figure):.0f}" if self.done else ""


@dataclass(frozen=True)
class MethodTable:
    """What several methods made of the same start.

    Attributes:
        start: the start's figures by name.
        outcomes: of all runs, in any order.
    """

    start: Mapping[str, float]
    outcomes: Sequence[Outcome]

    @cached_property
    def methods(self) -> list[Method]:
        """The outcomes by recipe, in the order in which recipes first come."""
        grouped: dict[str, list[Outcome]] = {}
        for outcome in self.outcomes:
            grouped.setdefault(outcome.recipe.name, []).append(outcome)
        return [Method(outcomes) for outcomes in grouped.values()]

    def failures(self) -> dict[str, str]:
        """Return why runs failed, by the names of those that did."""
        return {outcome.name: outcome.failure for outcome in self.outcomes if outcome.failure}

    def differences(self) -> dict[str, dict[str, Any]]:
        """Return the entries in which recipes differ, objective and seed aside: each one's value by recipe."""
        said = {method.name: entries(method.outcomes[0].recipe) for method in self.methods}
        found: dict[str, dict[str, Any]] = {}
        for entry, first in next(iter(said.values()), {}).items():
            aside = entry.startswith("objective.") or entry == "training.seed"
            if not aside and any(recipe[entry] != first for recipe in said.values()):
                found[entry] = {name: recipe[entry] for name, recipe in said.items()}
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return everything as a dictionary that JSON can hold: unrounded, `None` for nan."""
        figures = [*self.start, "steps", "seconds"]
        recipes = {
            method.name: {
                "objective": method.objective,
                "seeds": [outcome.recipe.training.seed for outcome in method.done],
                "mean": {figure: json_number(method.mean(figure)) for figure in figures},
                "deviation": {figure: json_number(method.deviation(figure)) for figure in figures},
            }
            for method in self.methods
        }
        runs = {outcome.name: json_numbers(outcome.figures) for method in self.methods for outcome in method.done}
        aside = {"failures": self.failures(), "differences": self.differences()}
        return {"start": json_numbers(self.start), "recipes": recipes, "runs": runs, **aside}

    def text(self) -> str:
        """Lay it out in columns, and below it what to know of it."""
        return "\n".join([aligned(self._rows()), "", *self._notes()]).rstrip()

    def markdown(self) -> str:
        """Lay it out as a table of GitHub's Markdown, and below it what to know of it."""
        head, *rows = self._rows()
        lines = [head, ["---", "---", *["---:"] * (len(head) - 2)], *rows]
        parts = [*(f"| {' | '.join(line)} |" for line in lines), "", *(f"- {note}" for note in self._notes())]
        return "\n".join(parts).rstrip() + "\n"

    def _rows(self) -> list[list[str]]:
        """Return the cells: a head, the start, a row a recipe."""
        scores = [name for name in self.start if name != "dimensions"]
        rows = [["recipe", "objective", "dims", "seeds", *scores, "steps", "seconds"]]
        numbers = [f"{self.start[score]:.2f}" for score in scores]
        rows.append(["start", "", f"{self.start['dimensions']:.0f}", "", *numbers, "", ""])
        for method in self.methods:
            failed = len(method.outcomes) - len(method.done)
            seeds = f"{len(method.done)}" + (f", {failed} failed" if failed else "")
            numbers = [method.score(score) for score in scores]
            counts = [method.count("steps"), method.count("seconds")]
            rows.append([method.name, method.objective, method.count("dimensions"), seeds, *numbers, *counts])
        return rows

    def _notes(self) -> list[str]:
        """Say what ± is, in what recipes differ, and why runs failed."""
        notes = ["mean ± standard deviation over seeds"] if any(len(m.done) > 1 for m in self.methods) else []
        for entry, values in self.differences().items():
            names: dict[str, list[str]] = {}
            for name, value in values.items():
                names.setdefault(json.dumps(value), []).append(name)
            notes.append(f"{entry} is " + "; ".join(f"{value} in {', '.join(its)}" for value, its in names.items()))
        return notes + [f"{name} failed: {reason}" for name, reason in self.failures().items()]
