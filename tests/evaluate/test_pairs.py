"""Pair classification against scikit-learn, also on resamples."""

import json
import math

import numpy as np
import pytest

from minilm.evaluate import EvaluationDataError, PairResult, evaluate_pairs, with_intervals


@pytest.fixture
def metrics():
    return pytest.importorskip("sklearn.metrics", reason="needs scikit-learn, which the extra test brings")


def theirs(metrics, labels, similarities):
    """scikit-learn's figures; of the thresholds with the best F1 the highest."""
    precision, recall, thresholds = metrics.precision_recall_curve(labels, similarities)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    best = len(thresholds) - 1 - f1[:-1][::-1].argmax()
    return {
        "average precision": metrics.average_precision_score(labels, similarities),
        "F1": metrics.f1_score(labels, similarities >= thresholds[best]),
        "precision": precision[best],
        "recall": recall[best],
        "threshold": thresholds[best],
    }


@pytest.mark.parametrize("decimals", [1, 2, 7], ids=["many_ties", "some_ties", "no_ties"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9], ids=str)
def test_equals_scikit_learn(metrics, decimals, share):
    random = np.random.default_rng(decimals)
    labels = random.random(400) < share
    similarities = np.round(0.2 * labels + 0.2 * random.normal(size=400), decimals)
    result = PairResult(similarities, labels)
    assert result.figures == pytest.approx(theirs(metrics, labels, similarities), abs=1e-9)
    drawn = random.integers(0, 400, 400)
    resampled = result.recount([np.bincount(drawn, minlength=400)])
    assert resampled == pytest.approx(theirs(metrics, labels[drawn], similarities[drawn]), abs=1e-9)


def test_evaluation(lines, angle_encoder):
    path = lines((1, "0 a", "10 b"), (0, "0 a", "50 b"), (1, "20 a", "45 b"), (0, "0 a", "90 b"), (1, "0 a", "60 b"))
    result = with_intervals(evaluate_pairs(angle_encoder, path), samples=50)
    assert result.sizes == {"pairs": 5, "positive": 3}
    assert result.figures["average precision"] == pytest.approx((1 + 1 + 3 / 4) / 3)
    assert result.figures["F1"] == pytest.approx(2 * 3 / 4 * 1 / (3 / 4 + 1))
    assert result.figures["threshold"] == pytest.approx(math.cos(math.radians(60)), abs=1e-6)
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["measure"] == "pairs"
    assert result.table().splitlines()[2].split() == ["figure", "value", "95%", "interval"]


def test_a_resample_without_positives_has_no_figures():
    result = PairResult(np.array([0.5, 0.2]), np.array([True, False]))
    assert all(math.isnan(value) for value in result.recount([np.array([0, 2])]).values())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [(1, "a", "b"), ("yes", "a", "b")],
            r"line 2: expected label<TAB>text1<TAB>text2 with label 0 or 1, got .*'yes'",
        ),
        ([(1, "a")], "line 1: expected label<TAB>text1<TAB>text2, got 2 columns"),
        ([(1, "a", "b")], "expected pairs of both labels, 0 and 1; got only 1"),
    ],
    ids=["label", "columns", "one_label"],
)
def test_malformed_data(lines, angle_encoder, rows, message):
    with pytest.raises(EvaluationDataError, match=message):
        evaluate_pairs(angle_encoder, lines(*rows))
