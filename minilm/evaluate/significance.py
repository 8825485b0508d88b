"""How sure the figures are: bootstrap confidence intervals, and a paired test of the difference of two models.

The bootstrap draws as many units (sentence pairs, queries, triplets) as there are, with replacement, and computes every
figure again. Each task of STS is drawn from by itself, and their average is computed from what was drawn. An interval
runs between percentiles of what comes out (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13).

The test of a difference is paired: both models are computed on the same draws, so that what makes units hard for both
cancels. Its p-value is the smallest level at which the percentile interval of the difference leaves zero out:

    p = 2 (1 + min(#{d* <= 0}, #{d* >= 0})) / (1 + samples), at most 1

with the 1s that keep a p-value off zero (Davison and Hinkley, Bootstrap Methods and their Application, 1997, ch. 4). It
is not corrected for the number of models or tasks that are looked at.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from minilm.evaluate.result import Interval, Result, json_number

SAMPLES = 1000
LEVEL = 0.95

AnyResult = TypeVar("AnyResult", bound=Result)


@dataclass(frozen=True)
class Difference:
    """How much one model's figure is above another's.

    Attributes:
        value: the difference.
        interval: its confidence interval.
        p_value: of the hypothesis that there is none, two-sided; nan where a figure has no value.
    """

    value: float
    interval: Interval
    p_value: float

    def to_dict(self) -> dict[str, Any]:
        """Return it as a dictionary that JSON can hold, `None` for nan."""
        return {"value": json_number(self.value), **self.interval.to_dict(), "p_value": json_number(self.p_value)}


def bootstrap(result: Result, samples: int = SAMPLES, seed: int = 0) -> NDArray[np.float64]:
    """Compute a result's figures on resamples of its units: `[samples, figures]`.

    The draws depend on the seed and the numbers of units alone, so those of two models on the same data are paired.

    Raises:
        ValueError: the result has no units to resample, or `samples` is less than 1.
    """
    if not result.strata:
        raise ValueError(f"{result.measure} has no units to resample, so its figures have no bootstrap interval")
    if samples < 1:
        raise ValueError(f"expected at least 1 bootstrap sample, got {samples}")
    random = np.random.default_rng(seed)
    return np.array(
        [
            list(
                result.recount(
                    [np.bincount(random.integers(0, size, size), minlength=size) for size in result.strata]
                ).values()
            )
            for _ in range(samples)
        ]
    )


def percentile_interval(values: NDArray[np.float64]) -> Interval:
    """Return the interval that holds the middle 95% of resampled values `[samples]`; nan if one of them is."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))


def with_intervals(result: AnyResult, samples: int = SAMPLES, seed: int = 0) -> AnyResult:
    """Return the result with 95% confidence intervals of its figures; as it is if it has no units to resample.

    Raises:
        ValueError: `samples` is less than 1.
    """
    return add_intervals(result, bootstrap(result, samples, seed)) if result.strata else result


def add_intervals(result: AnyResult, draws: NDArray[np.float64]) -> AnyResult:
    """Return the result with the intervals that its figures on resamples, `[samples, figures]`, give."""
    columns = zip(result.figures, draws.T, strict=True)
    return replace(result, intervals={name: percentile_interval(values) for name, values in columns})


def paired_difference(value: float, first: NDArray[np.float64], second: NDArray[np.float64]) -> Difference:
    """Judge the difference of a figure between two models.

    Args:
        value: the difference on all the units, second minus first.
        first: the first model's figure on resamples, `[samples]`.
        second: the second model's on the same resamples, `[samples]`.
    """
    differences = second - first
    tail = min((differences <= 0).sum(), (differences >= 0).sum())
    p_value = min(1.0, 2 * (1 + float(tail)) / (1 + len(differences))) if np.isfinite(differences).all() else math.nan
    return Difference(value, percentile_interval(differences), p_value)
