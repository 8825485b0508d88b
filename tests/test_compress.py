"""The real weights in 8 bits: a quarter of the file, computed with in 8-bit integers, as good on real sentences."""

import numpy as np
import pytest
import torch

import minilm
from minilm.activations import ensure_input_ranges
from minilm.compress import compress
from minilm.kernels.int8_linear import QuantizedWeights, input_steps
from minilm.weights.load import read_checkpoint


@pytest.fixture(scope="module")
def folder(canonical_folder, tmp_path_factory):
    return compress(read_checkpoint(canonical_folder)).save(tmp_path_factory.mktemp("int8") / "model")


@pytest.fixture(scope="module")
def compressed(folder):
    return minilm.load(folder, device="cpu")


def cosines(ours, exact):
    return (ours * exact).sum(axis=1)


def test_the_file_is_a_quarter(folder):
    assert (folder / "model.safetensors").stat().st_size < 23.2e6


def test_it_is_computed_with_in_8_bits_by_default(folder, compressed):
    assert compressed.model.backend.name == "int8"
    assert minilm.load(folder, device="cpu", backend="packed").model.backend.name == "packed"


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_its_products_are_in_8_bits_whatever_the_dtype(folder, compressed, own_sentences, dtype):
    loaded = minilm.load(folder, device="cpu", dtype=dtype)
    assert loaded.model.backend.name == "int8"
    assert cosines(loaded.encode(own_sentences), compressed.encode(own_sentences)).min() > 0.99


def test_vectors_on_our_own_sentences(compressed, encoder, own_sentences):
    found = cosines(compressed.encode(own_sentences), encoder.encode(own_sentences))
    print(f"cosine to float32: {found.min():.4f} at least, {found.mean():.5f} on average")
    assert found.min() > 0.985
    assert found.mean() > 0.997


def test_vectors_on_sts(compressed, encoder, sts_sentences):
    texts = sts_sentences[::20]
    found = cosines(compressed.encode(texts), encoder.encode(texts))
    print(f"cosine to float32 on {len(texts)} STS sentences: {found.min():.4f} at least, {found.mean():.5f} on average")
    assert found.min() > 0.98
    assert found.mean() > 0.997


def test_the_same_weights_in_float32(folder, encoder, own_sentences):
    """What the rounding of the weights alone changes."""
    exact = minilm.load(folder, device="cpu", backend="torch")
    found = cosines(exact.encode(own_sentences), encoder.encode(own_sentences))
    assert found.min() > 0.99
    assert not np.array_equal(exact.encode(own_sentences), encoder.encode(own_sentences))


def test_rounded_weights_are_rounded_to_themselves(folder):
    """What the backend computes with is what the file holds."""
    checkpoint = read_checkpoint(folder)
    for name, limits in checkpoint.input_ranges.items():
        step = torch.ones(limits.shape[1]) if name.endswith("feed_forward.output") else input_steps(limits)[0]
        rounded = QuantizedWeights.round(checkpoint.tensors[f"{name}.weight"] * step)
        assert torch.equal(rounded.values, checkpoint.int8[f"{name}.weight"]), name


def test_ranges_come_with_the_file_or_are_measured_once(folder, canonical_folder):
    stored = read_checkpoint(folder).input_ranges
    measured = minilm.load(canonical_folder, device="cpu", backend="int8")
    assert measured.model.layers[0].attention.qkv.input_range is None
    measured.encode("a cat")
    for name, limits in stored.items():
        torch.testing.assert_close(measured.model.get_submodule(name).input_range, limits, atol=1e-4, rtol=1e-4)
    kept = measured.model.layers[0].attention.qkv.input_range
    ensure_input_ranges(measured.model, measured.tokenizer)
    assert measured.model.layers[0].attention.qkv.input_range is kept


def test_a_text_does_not_depend_on_its_neighbours(compressed, own_sentences):
    together = compressed.encode(own_sentences)
    alone = np.stack([compressed.encode(text) for text in own_sentences[:20]])
    assert cosines(alone, together[:20]).min() > 0.9999
    assert np.array_equal(compressed.encode(own_sentences), together)


def test_verified_by_plain_torch(folder, compressed, tmp_path):
    from minilm.verify import verify, with_golden

    golden = with_golden(read_checkpoint(folder)).save(tmp_path / "golden")
    report = verify(minilm.load(golden, device="cpu"))
    assert report.ok, report.lines()
    assert len(report.checks) == 5
    assert compressed.model.backend.name == "int8"


def test_trained_weights_are_saved_in_float32(folder, tmp_path):
    encoder = minilm.load(folder, device="cpu")
    assert encoder.to_checkpoint().int8 is not None
    with torch.no_grad():
        encoder.model.layers[0].feed_forward.output.bias += 1
    again = minilm.load(encoder.save(tmp_path / "trained"), device="cpu")
    assert again.checkpoint.int8 is None
    assert torch.equal(again.model.layers[0].feed_forward.output.bias, encoder.model.layers[0].feed_forward.output.bias)
