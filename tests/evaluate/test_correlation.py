"""Correlations equal scipy's, ties included, and are nan where they have no value."""

import math

import numpy as np
import pytest
from scipy import stats

from minilm.evaluate.correlation import ResampledSpearman, pearson, spearman

RANDOM = np.random.default_rng(0)
SAMPLES = {
    "no_ties": (RANDOM.normal(size=500), RANDOM.normal(size=500)),
    "many_ties": (RANDOM.integers(0, 6, 500), RANDOM.integers(0, 3, 500)),
    "ties_in_one": (RANDOM.normal(size=300).round(1), RANDOM.normal(size=300)),
    "linear": (np.arange(20.0), -3 * np.arange(20.0) + 1),
    "two": ([1.0, 2.0], [5.0, 4.0]),
    "far_from_zero": (1e8 + RANDOM.normal(size=200), RANDOM.normal(size=200)),
}


@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)
def test_equals_scipy(sample):
    assert spearman(*sample) == pytest.approx(stats.spearmanr(*sample).statistic, abs=1e-12)
    assert pearson(*sample) == pytest.approx(stats.pearsonr(*sample).statistic, abs=1e-12)


@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)
def test_a_pair_counted_twice_is_there_twice(sample):
    size = len(sample[0])
    resampled = ResampledSpearman(*sample)
    for seed in range(3):
        drawn = np.random.default_rng(seed).integers(0, size, 2 * size)
        expected = stats.spearmanr(*(np.asarray(values)[drawn] for values in sample)).statistic
        assert resampled(np.bincount(drawn, minlength=size)) == pytest.approx(expected, abs=1e-12)


def test_resamples_without_a_correlation_are_nan():
    resampled = ResampledSpearman([1, 1, 2], [3, 4, 4])
    assert math.isnan(resampled(np.array([1, 1, 0])))
    assert math.isnan(resampled(np.array([0, 0, 3])))
    assert math.isnan(resampled(np.array([0, 0, 0])))


@pytest.mark.parametrize(
    "sample",
    [([0.1] * 7, np.arange(7)), (np.arange(7), [0.1] * 7), ([], []), ([1.0], [2.0])],
    ids=["constant_first", "constant_second", "empty", "one"],
)
def test_undefined_is_nan(sample):
    assert math.isnan(spearman(*sample))
    assert math.isnan(pearson(*sample))


@pytest.mark.parametrize(
    ("sample", "message"),
    [(([1, 2], [1, 2, 3]), "one length"), (([[1, 2]], [[1, 2]]), "one-dimensional"), (([1, math.nan], [1, 2]), "nan")],
    ids=["lengths", "dimensions", "nan"],
)
def test_unusable_input(sample, message):
    with pytest.raises(ValueError, match=message):
        spearman(*sample)
