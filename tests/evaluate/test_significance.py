"""Intervals and p-values against theory, scipy's bootstrap, Williams' test, and how often they are wrong."""

import math

import numpy as np
import pytest
from scipy import stats

from minilm.evaluate import UniformityResult, with_intervals
from minilm.evaluate.significance import bootstrap, paired_difference, percentile_interval
from minilm.evaluate.sts import STSResult, STSScore
from minilm.evaluate.triplets import TripletResult


def graded(random, size):
    """Scores that people gave: with ties."""
    return random.integers(0, 26, size) / 5


def score(name, similarities, gold):
    return STSScore(name, np.round(similarities, 7), gold)


def difference_of(first, second, samples=1000, figure="average"):
    """Judge two models' difference in one figure."""
    column = list(first.figures).index(figure)
    draws = [bootstrap(result, samples)[:, column] for result in (first, second)]
    return paired_difference(second.figures[figure] - first.figures[figure], *draws)


def test_interval_of_a_proportion_is_binomial():
    margins = np.where(np.arange(400) < 300, 0.1, -0.1)
    interval = with_intervals(TripletResult(margins), samples=4000).intervals["accuracy"]
    expected = stats.binom(400, 0.75).ppf([0.025, 0.975]) / 400
    assert [interval.low, interval.high] == pytest.approx(expected, abs=0.006)


def test_interval_of_a_correlation_is_scipys():
    random = np.random.default_rng(0)
    gold = graded(random, 250)
    similarities = gold + random.normal(size=250) * 2
    result = with_intervals(STSResult((score("stsb", similarities, gold),)), samples=2000)
    theirs = stats.bootstrap(
        (result.tasks[0].similarities, gold),
        lambda a, b: 100 * stats.spearmanr(a, b).statistic,
        paired=True,
        vectorized=False,
        n_resamples=2000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    ours = result.intervals["stsb"]
    assert [ours.low, ours.high] == pytest.approx(theirs, abs=0.7)  # they are 18 apart
    assert result.intervals["average"] == ours


def test_interval_of_the_average_is_that_of_independent_tasks():
    """A mean of independent figures has the mean of their variances over their number."""
    random = np.random.default_rng(0)
    golds = [graded(random, size) for size in (150, 300, 600)]
    tasks = tuple(score(str(len(gold)), gold + 2 * random.normal(size=len(gold)), gold) for gold in golds)
    result = with_intervals(STSResult(tasks), samples=3000)
    widths = [result.intervals[task.name].high - result.intervals[task.name].low for task in tasks]
    average = result.intervals["average"]
    assert average.high - average.low == pytest.approx(math.hypot(*widths) / 3, rel=0.05)
    assert average.low < result.average < average.high


def williams(a, b, gold):
    """The p-value of Williams' t for two correlations with one variable in common, of ranks (Steiger, 1980, eq. 7)."""
    a, b, gold = (stats.rankdata(values) for values in (a, b, gold))
    size, r_a, r_b, r_ab = len(a), *(np.corrcoef(x, y)[0, 1] for x, y in ((a, gold), (b, gold), (a, b)))
    determinant = 1 - r_a**2 - r_b**2 - r_ab**2 + 2 * r_a * r_b * r_ab
    mean = (r_a + r_b) / 2
    t = (r_b - r_a) * np.sqrt(
        (size - 1) * (1 + r_ab) / (2 * determinant * (size - 1) / (size - 3) + mean**2 * (1 - r_ab) ** 3)
    )
    return 2 * stats.t(size - 3).sf(abs(t))


@pytest.mark.parametrize("noise", [1.0, 1.03, 1.06, 1.1], ids=str)
def test_p_value_is_near_that_of_williams_test(noise):
    random = np.random.default_rng(3)
    gold, shared = random.normal(size=1000), random.normal(size=1000)
    first = gold + shared + 0.5 * random.normal(size=1000)
    second = gold + noise * shared + 0.5 * random.normal(size=1000)
    results = [STSResult((score("stsb", similarities, gold),)) for similarities in (first, second)]
    found = difference_of(*results, samples=2000)
    ours, theirs = (stats.norm.isf(p / 2) for p in (found.p_value, williams(first, second, gold)))
    assert ours == pytest.approx(theirs, rel=0.15, abs=0.1)  # theirs takes ranks for normal, so it is a little larger
    assert found.value == pytest.approx(
        100 * (stats.spearmanr(second, gold).statistic - stats.spearmanr(first, gold).statistic), abs=1e-3
    )


def test_p_value_is_below_a_twentieth_once_in_twenty_where_there_is_no_difference():
    p_values = []
    for seed in range(200):
        random = np.random.default_rng(seed)
        gold = random.normal(size=200)
        shared = gold + random.normal(size=200)
        results = [STSResult((score("x", shared + random.normal(size=200), gold),)) for _ in range(2)]
        p_values.append(difference_of(*results, samples=100).p_value)
    assert 0.01 <= np.mean(np.array(p_values) < 0.05) <= 0.1
    assert 0.4 <= np.mean(p_values) <= 0.6


def test_pairing_finds_what_separate_intervals_hide():
    random = np.random.default_rng(0)
    gold, shared = graded(random, 1000), 2 * random.normal(size=1000)
    results = [STSResult((score("x", gold + shared * hardness, gold),)) for hardness in (1, 0.93)]
    first, second = (with_intervals(result).intervals["average"] for result in results)
    assert first.high > second.low
    found = difference_of(*results)
    assert found.interval.low > 0
    assert found.p_value == pytest.approx(2 / 1001)  # as small as 1,000 samples allow


def test_interval_and_p_value_agree_about_zero():
    random = np.random.default_rng(0)
    for shift in np.linspace(-0.2, 0.2, 21):
        found = paired_difference(shift, random.normal(size=999) * 0, shift + 0.1 * random.normal(size=999))
        assert (found.interval.low > 0 or found.interval.high < 0) == (found.p_value < 0.05)


def test_a_model_does_not_differ_from_itself():
    result = TripletResult(np.array([0.5, 0.1, -0.2, 0.3]))
    found = difference_of(result, result, figure="accuracy")
    assert (found.value, found.interval.low, found.interval.high, found.p_value) == (0, 0, 0, 1)


def test_draws_depend_on_the_seed_alone():
    result = TripletResult(np.random.default_rng(0).normal(size=50))
    assert (bootstrap(result, 20, seed=1) == bootstrap(result, 20, seed=1)).all()
    assert (bootstrap(result, 20, seed=1) != bootstrap(result, 20, seed=2)).any()
    assert with_intervals(result, 20, seed=1) != with_intervals(result, 20, seed=2)


def test_undefined_figures_have_no_interval():
    undefined = percentile_interval(np.array([1.0, np.nan, 2.0]))
    assert undefined.to_dict() == {"low": None, "high": None}
    found = paired_difference(np.nan, np.ones(5), np.array([1, 2, 3, 4, np.nan]))
    assert found.to_dict() == {"value": None, "low": None, "high": None, "p_value": None}


def test_what_can_not_be_resampled():
    result = UniformityResult(0.2, -2.0, 10, 20)
    assert with_intervals(result) is result
    with pytest.raises(ValueError, match="uniformity has no units to resample"):
        bootstrap(result)
    with pytest.raises(ValueError, match="at least 1 bootstrap sample, got 0"):
        with_intervals(TripletResult(np.ones(3)), samples=0)
