"""Small embeddings: equal to sentence-transformers' formula, and a row does not depend on its batch."""

import numpy as np
import pytest
from sentence_transformers.util.quantization import quantize_embeddings

from minilm.quantization import calibration_ranges, normalized_ranges, quantize

VECTORS = np.random.default_rng(0).normal(size=(50, 16)).astype(np.float32)
RANGES = np.stack([VECTORS[:40].min(axis=0), VECTORS[:40].max(axis=0)])


@pytest.mark.parametrize("precision", ["float32", "int8", "uint8", "binary", "ubinary"])
def test_equals_sentence_transformers(precision):
    expected = quantize_embeddings(VECTORS, precision, ranges=RANGES)
    actual = quantize(VECTORS, precision, RANGES)
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual, expected)


def test_hand_computed_levels():
    ranges = np.array([[-51.0], [204.0]], dtype=np.float32)  # steps of 1
    values = np.array([[-60.0], [-51.0], [-0.5], [0.5], [204.0], [300.0]], dtype=np.float32)
    assert quantize(values, "uint8", ranges)[:, 0].tolist() == [0, 0, 50, 51, 255, 255]
    assert quantize(values, "int8", ranges)[:, 0].tolist() == [-128, -128, -78, -77, 127, 127]


def test_ranges_are_five_standard_deviations_wide():
    ranges = calibration_ranges(VECTORS)
    np.testing.assert_allclose(ranges.mean(axis=0), VECTORS.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(ranges[1] - ranges[0], 10 * VECTORS.std(axis=0), rtol=1e-5)


def test_a_prompt_is_part_of_the_text(encoder):
    options = {"precision": "int8", "truncate_dim": 32, "normalize_embeddings": True}
    np.testing.assert_array_equal(encoder.encode("q: x", **options), encoder.encode("x", prompt="q: ", **options))


def test_bits():
    vector = np.array([[1, -1, 1, 1, 0, 0, 0, 1]], dtype=np.float32)
    assert quantize(vector, "ubinary").tolist() == [[0b10110001]]
    assert quantize(vector, "binary").tolist() == [[0b10110001 - 128]]


def test_a_dimension_without_spread():
    ranges = np.array([[0.5], [0.5]], dtype=np.float32)
    assert quantize(np.array([[0.5]], dtype=np.float32), "uint8", ranges).tolist() == [[0]]


def test_bad_calls():
    with pytest.raises(ValueError, match=r"precision must be one of float32, int8.*got 'int4'"):
        quantize(VECTORS, "int4")
    with pytest.raises(ValueError, match="'int8' needs calibration ranges"):
        quantize(VECTORS, "int8")


def test_a_row_is_the_same_alone(encoder):
    texts = ["one sentence", "another, longer sentence", "no"]
    together = encoder.encode(texts, precision="int8", deterministic=True)
    for text, row in zip(texts, together, strict=True):
        np.testing.assert_array_equal(encoder.encode(text, precision="int8", deterministic=True), row)


@pytest.mark.parametrize("options", [{}, {"truncate_dim": 128}, {"truncate_dim": 128, "normalize_embeddings": True}])
def test_int8_keeps_similarities(encoder, options):
    texts = [f"a sentence about {topic}" for topic in ("boats", "ships", "tax law", "tax reform", "volcanoes", "no")]
    exact = encoder.encode(texts, **options)
    levels = encoder.encode(texts, precision="uint8", **options)
    varies = exact.std(axis=0) > 1e-6  # this model leaves three dimensions at 0
    assert varies.sum() >= exact.shape[1] - 3
    assert np.isin(levels[:, varies], (0, 255)).mean() < 1e-3  # the range is wide enough
    ranges = encoder.calibration.numpy()
    if options.get("normalize_embeddings"):
        lower, upper = normalized_ranges(ranges, exact.shape[1])
        scaled = (upper - lower).mean() / (ranges[1] - ranges[0])[: exact.shape[1]].mean()
        assert scaled == pytest.approx((384 / exact.shape[1]) ** 0.5, rel=0.1)
    else:
        lower, upper = encoder.calibration.numpy()[:, : exact.shape[1]]
        restored = lower + (levels + 0.5) * (upper - lower) / 255
        assert (np.abs(restored - exact) <= 1.01 * (upper - lower) / 2 / 255 + 1e-30).mean() > 0.999
