"""Correlations equal scipy's, ties included, and are nan where they have no value."""

import math

import numpy as np
import pytest
from scipy import stats

from minilm.evaluate.correlation import average_ranks, pearson, spearman

RANDOM = np.random.default_rng(0)
SAMPLES = {
    "no_ties": (RANDOM.normal(size=500), RANDOM.normal(size=500)),
    "many_ties": (RANDOM.integers(0, 6, 500), RANDOM.integers(0, 3, 500)),
    "ties_in_one": (RANDOM.normal(size=300).round(1), RANDOM.normal(size=300)),
    "linear": (np.arange(20.0), -3 * np.arange(20.0) + 1),
    "two": ([1.0, 2.0], [5.0, 4.0]),
    "far_from_zero": (1e8 + RANDOM.normal(size=200), RANDOM.normal(size=200)),
}


def test_average_ranks_by_hand():
    assert average_ranks([30, 10, 20, 20, 10, 10]).tolist() == [6.0, 2.0, 4.5, 4.5, 2.0, 2.0]


@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)
def test_equals_scipy(sample):
    assert average_ranks(sample[0]).tolist() == stats.rankdata(sample[0]).tolist()
    assert spearman(*sample) == pytest.approx(stats.spearmanr(*sample).statistic, abs=1e-12)
    assert pearson(*sample) == pytest.approx(stats.pearsonr(*sample).statistic, abs=1e-12)


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
