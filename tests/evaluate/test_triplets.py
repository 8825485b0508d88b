"""Triplet accuracy against figures by hand."""

import numpy as np
import pytest

from minilm.evaluate import EvaluationDataError, evaluate_triplets


def test_evaluation(lines, angle_encoder):
    rows = [("0 a", "10 p", "20 n"), ("0 a", "30 p", "20 n"), ("5 a", "5 p", "50 n"), ("0 a", "20 p", "20 p")]
    result = evaluate_triplets(angle_encoder, lines(*rows))
    cosines = np.cos(np.radians([[10, 20], [30, 20], [0, 45], [20, 20]]))
    assert result.sizes == {"triplets": 4}
    assert result.figures["accuracy"] == 0.5  # equally near is not nearer
    assert result.figures["mean margin"] == pytest.approx((cosines[:, 0] - cosines[:, 1]).mean(), abs=1e-6)
    assert result.recount([np.array([2, 0, 1, 0])])["accuracy"] == 1
    assert sorted(angle_encoder.seen) == sorted(set(angle_encoder.seen))


def test_malformed_data(lines, angle_encoder):
    path = lines(("a", "p", "n"), ("a", "p"))
    with pytest.raises(EvaluationDataError, match="line 2: expected anchor<TAB>positive<TAB>negative, got 2 columns"):
        evaluate_triplets(angle_encoder, path)
