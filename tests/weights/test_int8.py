"""Weights stored in 8 bits: read as what they stand for, kept as they are stored, refused when a part is missing."""

import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from minilm.weights import int8
from minilm.weights.checkpoint import fingerprint
from minilm.weights.files import WeightsError
from minilm.weights.load import read_checkpoint

QKV = "layers.0.attention.qkv"


@pytest.fixture
def stored(bert_folder):
    """Small random tensors in the stored form, and the checkpoint they belong to."""
    checkpoint = read_checkpoint(bert_folder())
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, tensor in checkpoint.model_tensors.items():
        if tensor.dim() == 1:
            tensors[name] = tensor
            continue
        tensors[name] = torch.randint(-127, 128, tensor.shape, generator=generator, dtype=torch.int8)
        tensors[f"{name}_scale"] = torch.rand(len(tensor), generator=generator)
        if name.startswith("layers"):
            module = name.removesuffix(".weight")
            tensors[f"{module}.input_step"] = 0.1 + torch.rand(tensor.shape[1], generator=generator)
            tensors[f"{module}.input_range"] = torch.randn(2, tensor.shape[1], generator=generator)
    return checkpoint, tensors


def as_checkpoint(checkpoint, tensors):
    return replace(checkpoint, tensors=int8.restore(tensors, "here"), int8=tensors)


def test_a_matrix_is_scale_times_values_by_step(stored):
    checkpoint, tensors = stored
    restored = int8.restore(tensors, "here")
    assert restored.keys() == checkpoint.model_tensors.keys()
    weight, scale = tensors[f"{QKV}.weight"].double(), tensors[f"{QKV}.weight_scale"].double()
    exact = weight * scale[:, None] / tensors[f"{QKV}.input_step"].double()
    torch.testing.assert_close(restored[f"{QKV}.weight"].double(), exact, rtol=3e-7, atol=0)
    table = tensors["embeddings.word.weight"][3].double() * tensors["embeddings.word.weight_scale"][3].double()
    torch.testing.assert_close(restored["embeddings.word.weight"][3].double(), table, rtol=1e-7, atol=0)
    assert restored[f"{QKV}.bias"] is tensors[f"{QKV}.bias"]
    assert {tensor.dtype for tensor in restored.values()} == {torch.float32}


def test_what_is_saved_is_read_again(stored, tmp_path):
    saved = as_checkpoint(*stored)
    folder = saved.save(tmp_path / "model")
    assert {name: tensor.dtype for name, tensor in load_file(folder / "model.safetensors").items()} == {
        name: tensor.dtype for name, tensor in saved.int8.items()
    }
    read = read_checkpoint(folder)
    assert fingerprint(read) == fingerprint(saved) == read.stored_fingerprint
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in saved.tensors.items())
    assert torch.equal(read.input_ranges[QKV], saved.int8[f"{QKV}.input_range"])
    assert len(read.input_ranges) == 8
    again = load_file(read.save(tmp_path / "again") / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in saved.int8.items())


def test_another_dtype_is_no_longer_8_bit(stored, tmp_path):
    folder = as_checkpoint(*stored).with_dtype(torch.float16).save(tmp_path / "half")
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.float16}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{QKV}.weight_scale": None}, f"expected {QKV}.weight_scale with one number for each row"),
        ({f"{QKV}.weight_scale": torch.ones(3)}, f"expected {QKV}.weight_scale with one number for each row"),
        ({f"{QKV}.input_step": None}, f"{QKV} has an input_step and input_range of shapes [None, (2, 32)]"),
        ({f"{QKV}.input_range": torch.ones(2, 5)}, f"{QKV} has an input_step and input_range of shapes [(32,), (2, 5)"),
        ({f"{QKV}.weight": None}, f"missing (1): {QKV}.weight"),
        ({f"{QKV}.weight_scale": torch.full((96,), float("nan"))}, "with wrong values (NaN"),
        ({f"{QKV}.input_step": torch.zeros(32)}, "with wrong values (NaN"),
    ],
    ids=["no scale", "short scale", "no step", "wide range", "no values", "NaN scale", "zero step"],
)
def test_what_does_not_fit_is_refused(stored, tmp_path, change, message):
    checkpoint, tensors = stored
    folder = as_checkpoint(checkpoint, tensors).save(tmp_path / "model")
    damaged = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
    from minilm.weights.files import read_safetensors, write_safetensors

    write_safetensors(folder / "model.safetensors", damaged, read_safetensors(folder / "model.safetensors")[1])
    with pytest.raises(WeightsError, match=re.escape(message)):
        read_checkpoint(folder)


def test_a_flipped_bit_is_seen(stored, tmp_path):
    folder = as_checkpoint(*stored).save(tmp_path / "model")
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 4
    path.write_bytes(data)
    with pytest.raises(WeightsError, match="is damaged"):
        read_checkpoint(folder)
