"""A comparison's table and picture tell what its figures are; that the picture is legible was looked at by eye."""

import io
import json
import sys

import numpy as np
import pytest

from minilm.evaluate import TripletResult, UniformityResult, compare
from minilm.evaluate.comparison_plot import plot
from minilm.evaluate.sts import STSResult, STSScore


def model(noise, seed):
    """Make a model's result on two tasks whose hard pairs are hard for all models."""
    random, own = np.random.default_rng(0), np.random.default_rng(seed)
    tasks = []
    for name, size in (("sts13", 400), ("stsb", 700)):
        gold = random.integers(0, 6, size).astype(float)
        similarities = gold + noise * (random.normal(size=size) + 0.1 * own.normal(size=size))
        tasks.append(STSScore(name, similarities, gold))
    return STSResult(tuple(tasks))


@pytest.fixture(scope="module")
def comparison():
    return compare({"base": model(2, 1), "same": model(2, 2), "better": model(1.5, 3)}, samples=300)


def test_differences(comparison):
    assert list(comparison.differences) == ["same", "better"]
    first, better = comparison.results["base"], comparison.results["better"]
    found = comparison.differences["better"]["sts13"]
    assert found.value == pytest.approx(better.figures["sts13"] - first.figures["sts13"])
    assert 0 < found.interval.low < found.value < found.interval.high
    assert first.intervals["stsb"].low < first.figures["stsb"] < first.intervals["stsb"].high
    assert comparison.is_significant("better", "average")
    assert not comparison.is_significant("same", "average")
    assert not comparison.is_significant("base", "average")


def test_table(comparison):
    blocks = comparison.table().split("\n\n")
    header, base, same, better = (line.split() for line in blocks[0].splitlines())
    assert header == ["model", "sts13", "stsb", "average", "95%", "interval"]
    figures = comparison.results["better"].figures
    assert better[:4] == ["better", *(f"{figures[name]:.2f}*" for name in ("sts13", "stsb", "average"))]
    assert "*" not in " ".join(base + same)
    found = comparison.differences["better"]["average"]
    assert blocks[1].splitlines()[-1].split()[:2] == ["better", f"{found.value:+.2f}"]
    assert blocks[2].startswith("* p < 0.05")


def test_dictionary(comparison):
    report = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert report["compared_with"] == "base"
    assert report["models"]["same"]["figures"]["stsb"] == comparison.results["same"].figures["stsb"]
    assert report["differences"]["better"]["average"]["p_value"] == pytest.approx(2 / 301)


@pytest.fixture
def drawn(saved_figures):
    """Return a function that plots a comparison and returns its axes by title, having checked the PNG."""

    def draw(comparison):
        file = io.BytesIO()
        plot(comparison, file)
        assert file.getvalue().startswith(b"\x89PNG")
        return {axes.get_title(loc="left"): axes for axes in saved_figures[-1].axes}

    return draw


def test_picture(drawn, comparison):
    panels = drawn(comparison)
    assert list(panels) == ["average", "sts13", "stsb"]
    for name, axes in panels.items():
        named = name in ("average", "sts13")  # at the left
        assert [label.get_text() for label in axes.get_yticklabels()] == (["base", "same", "better"] if named else [])
        dots = [line for line in axes.lines if line.get_marker() == "o"]
        assert [tuple(line.get_xydata()[0]) for line in dots] == [
            (result.figures[name], row) for row, result in enumerate(comparison.results.values())
        ]
        assert [line.get_markerfacecolor() == "white" for line in dots] == [False, True, False]
        ends = [tuple(line.get_xdata()) for line in axes.lines if line.get_linewidth() == 2]
        assert ends == [(r.intervals[name].low, r.intervals[name].high) for r in comparison.results.values()]
    assert panels["average"].texts[-1].get_text().endswith("p = 0.007")


def test_figures_without_intervals(drawn):
    results = {"a": UniformityResult(0.2, -2.5, 5, 10), "b": UniformityResult(0.3, float("nan"), 5, 10)}
    comparison = compare(results)
    assert comparison.differences == {}
    assert comparison.table().splitlines() == [
        "model  alignment  uniformity",
        "a         0.2000     -2.5000",
        "b         0.3000         nan",
    ]
    assert list(drawn(comparison)) == ["uniformity", "alignment"]


def test_no_samples_no_test():
    comparison = compare({"a": TripletResult(np.ones(3)), "b": TripletResult(-np.ones(3))}, samples=0)
    assert comparison.differences == {}
    assert comparison.results["a"].intervals == {}


def test_results_on_other_data_are_refused():
    with pytest.raises(ValueError, match=r"expected results on the same data, got triplets of .*3.* and, for b, .*4"):
        compare({"a": TripletResult(np.ones(3)), "b": TripletResult(np.ones(4))})
    with pytest.raises(ValueError, match="expected at least one result"):
        compare({})


def test_without_matplotlib(comparison, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'plots need matplotlib: pip install "minilm\[plots\]"'):
        plot(comparison, io.BytesIO())
