"""Alignment and uniformity by their definitions."""

import gzip

import numpy as np
import pytest
from scipy.spatial.distance import pdist

from minilm.evaluate import EvaluationDataError, evaluate_uniformity
from minilm.evaluate import uniformity as module

ANGLES = [(0, 10), (5, 60), (90, 100), (0, 200)]
UNIT = np.array([[np.cos(a), np.sin(a)] for a in np.radians([0, 10, 5, 60, 90, 100, 200])])


def chord(first, second):
    """The squared distance of two unit vectors."""
    return 2 - 2 * np.cos(np.radians(first - second))


@pytest.mark.parametrize("rows_at_a_time", [1, 3, 1024])
def test_pairs_that_belong_together(lines, angle_encoder, monkeypatch, rows_at_a_time):
    monkeypatch.setattr(module, "ROWS", rows_at_a_time)
    path = lines(*((f"{first} x", f"{second} x") for first, second in ANGLES))
    result = evaluate_uniformity(angle_encoder, path)
    assert result.sizes == {"positive pairs": 4, "texts": 7}
    assert result.alignment == pytest.approx(np.mean([chord(*pair) for pair in ANGLES]), abs=1e-6)
    assert result.uniformity == pytest.approx(np.log(np.exp(-2 * pdist(UNIT) ** 2).mean()), abs=1e-6)
    assert list(result.figures) == ["alignment", "uniformity"]


def test_graded_pairs(lines, angle_encoder):
    scores = (5, 4, 4.2, 0)
    rows = [(score, f"{first} x", f"{second} x") for score, (first, second) in zip(scores, ANGLES, strict=True)]
    path = lines(*rows)
    packed = path.with_suffix(".tsv.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    for file in (path, packed):
        result = evaluate_uniformity(angle_encoder, file)
        assert result.sizes == {"positive pairs": 2, "texts": 7}
        assert result.alignment == pytest.approx((chord(0, 10) + chord(90, 100)) / 2, abs=1e-6)
        assert result.uniformity == pytest.approx(np.log(np.exp(-2 * pdist(UNIT) ** 2).mean()), abs=1e-6)


def test_the_bounds():
    spread = np.random.default_rng(0).normal(size=(3000, 384))
    spread /= np.linalg.norm(spread, axis=1, keepdims=True)
    assert module.uniformity(spread) == pytest.approx(
        -4 + 8 / 384, abs=0.002
    )  # log E exp(4 cos - 4), cos ~ N(0, 1 / 384)
    assert module.uniformity(np.tile(spread[:1], (50, 1))) == pytest.approx(0)
    assert module.alignment(spread, -spread) == pytest.approx(4)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a", "b"), ("a",)], "line 2: expected text1<TAB>text2 or score<TAB>text1<TAB>text2, got 1 column$"),
        ([("much", "a", "b")], "line 1: expected a number as score, got 'much'"),
        ([(4, "1 a", "2 b")], "no pair has a score above 4"),
        ([("1 a", "1 a")], "expected at least two different texts"),
    ],
    ids=["columns", "score", "none_above", "one_text"],
)
def test_malformed_data(lines, angle_encoder, rows, message):
    with pytest.raises(EvaluationDataError, match=message):
        evaluate_uniformity(angle_encoder, lines(*rows))
