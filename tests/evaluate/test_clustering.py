"""Clustering: V-measure by its formula, and what k-means finds."""

import sys
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from minilm.evaluate import ClusteringResult, EvaluationDataError, evaluate_clustering, with_intervals


@pytest.fixture(autouse=True)
def _sklearn():
    pytest.importorskip("sklearn", reason="needs scikit-learn, which the extra test brings")


def entropy(values):
    return stats.entropy(list(Counter(values).values()))


def test_v_measure_by_its_formula():
    random = np.random.default_rng(0)
    labels = tuple(random.choice(["a", "b", "c"], 200, p=[0.6, 0.3, 0.1]).tolist())
    clusters = tuple((random.integers(0, 4, 200) * (np.array(labels) != "a")).tolist())
    both = entropy(list(zip(labels, clusters, strict=True)))
    homogeneity = 1 - (both - entropy(clusters)) / entropy(labels)
    completeness = 1 - (both - entropy(labels)) / entropy(clusters)
    expected = 2 * homogeneity * completeness / (homogeneity + completeness)
    assert ClusteringResult(labels, clusters).figures == pytest.approx(
        {"V-measure": expected, "homogeneity": homogeneity, "completeness": completeness}, abs=1e-12
    )


def test_groups_are_found(lines, angle_encoder):
    rows = [
        (label, f"{centre + offset} x") for label, centre in (("a", 0), ("b", 90), ("c", 200)) for offset in range(9)
    ]
    result = evaluate_clustering(angle_encoder, lines(*rows))
    assert result.sizes == {"texts": 27, "labels": 3}
    assert result.figures["V-measure"] == pytest.approx(1)
    assert with_intervals(result) is result
    mislabelled = evaluate_clustering(angle_encoder, lines(("b", rows[0][1]), *rows[1:]))
    assert 0.8 < mislabelled.figures["V-measure"] < 1


def test_one_seed_gives_one_clustering(lines, angle_encoder):
    path = lines(*((number % 5, f"{number * 3.6} x") for number in range(100)))
    first, again, other = (evaluate_clustering(angle_encoder, path, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.clusters != other.clusters


def test_one_label(lines, angle_encoder):
    with pytest.raises(EvaluationDataError, match="expected several labels, got only 'a'"):
        evaluate_clustering(angle_encoder, lines(("a", "1 x"), ("a", "2 x")))


def test_without_scikit_learn(lines, angle_encoder, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ImportError, match=r'clustering needs scikit-learn: pip install "minilm\[eval\]"'):
        evaluate_clustering(angle_encoder, lines(("a", "1 x")))
