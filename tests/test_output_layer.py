"""Models with an output layer: a linear map behind pooling, here, in files, and in sentence-transformers folders."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

import minilm
from minilm.compress import compress
from minilm.internals import capture
from minilm.verify import verify, with_golden
from minilm.weights.checkpoint import fingerprint
from minilm.weights.export import export_modelscope, export_sentence_transformers
from minilm.weights.files import WeightsError
from minilm.weights.load import read_checkpoint

WIDTH = 128
LONG = "one two three " * 100  # 302 tokens
LAYER = "output_layer.weight"


@pytest.fixture(scope="module")
def weight():
    """Some W [D, C], its entries no multiples of a coarser dtype's."""
    return torch.randn(WIDTH, 384, generator=torch.Generator().manual_seed(0)) / 20


@pytest.fixture(scope="module")
def checkpoint(canonical_folder, weight):
    """The real model with W behind it."""
    plain = read_checkpoint(canonical_folder)
    tensors = {**plain.tensors, LAYER: weight}
    return with_golden(replace(plain, tensors=tensors, golden=None, calibration=None, stored_fingerprint=None))


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    return checkpoint.save(tmp_path_factory.mktemp("output layer") / "model")


@pytest.fixture(scope="module")
def projected(folder):
    return minilm.load(folder, device="cpu")


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    return export_sentence_transformers(checkpoint, tmp_path_factory.mktemp("exported") / "model")


@pytest.fixture(scope="module")
def expected(canonical_folder, weight):
    """Return a function that encodes without the layer, and multiplies and scales in numpy."""
    plain = minilm.load(canonical_folder, device="cpu", normalize=False)

    def encode(texts, normalize=True, **options):
        rows = plain.encode(texts, **options) @ weight.numpy().T
        return rows / np.linalg.norm(rows, axis=1, keepdims=True) if normalize else rows

    return encode


@pytest.mark.parametrize("options", [{}, {"on_truncate": "chunk"}, {"deterministic": True}], ids=str)
@pytest.mark.filterwarnings("ignore::minilm.embed.TruncationWarning")
def test_vectors_are_those_before_normalisation_times_the_layer(projected, expected, texts, options):
    rows = projected.encode([*texts, LONG, ""], **options)
    assert rows.shape == (len(texts) + 2, WIDTH)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, expected([*texts, LONG, ""], **options), atol=1e-6)
    if "deterministic" in options:
        np.testing.assert_array_equal(projected.encode(texts[0], **options), rows[0])


def test_sizes_follow_the_layer(projected, texts):
    assert projected.get_embedding_dimension() == projected.get_sentence_embedding_dimension() == WIDTH
    assert projected.encode(texts, precision="int8").shape == (len(texts), WIDTH)
    assert projected.encode(texts, precision="ubinary").shape == (len(texts), WIDTH // 8)
    assert projected.encode(texts[0], truncate_dim=100).shape == (100,)
    with pytest.raises(ValueError, match="truncate_dim must be at most 128, got 200"):
        projected.encode(texts, truncate_dim=200)
    (tokens,) = projected.encode(texts[:1], output_value="token_embeddings")
    assert tokens.shape[1] == 384


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-6), ("float64", 1e-6), ("bfloat16", 0.02)])
def test_vectors_that_are_not_scaled(folder, expected, texts, dtype, limit):
    unscaled = minilm.load(folder, device="cpu", normalize=False, dtype=dtype)
    assert unscaled.model.output_layer.weight.dtype is getattr(torch, dtype)
    rows, truth = unscaled.encode(texts), expected(texts, normalize=False)
    assert np.abs(rows - truth).max() < limit * np.linalg.norm(truth, axis=1).max()


def test_the_folder_is_verified(folder, checkpoint, tmp_path):
    encoder = minilm.load(folder, device="cpu")
    report = verify(encoder)
    assert report.ok, report.lines()
    assert len(report.checks) == 5
    assert encoder.save(tmp_path / "again")
    assert fingerprint(read_checkpoint(tmp_path / "again")) == fingerprint(checkpoint)


def test_the_layer_is_part_of_the_fingerprint(checkpoint, encoder, weight):
    assert fingerprint(checkpoint) != encoder.fingerprint()
    other = replace(checkpoint, tensors={**checkpoint.tensors, LAYER: weight.roll(1)})
    assert fingerprint(other) != fingerprint(checkpoint)


def test_a_layer_that_is_taken_away_is_gone(folder, encoder, texts, tmp_path):
    own = minilm.load(folder, device="cpu")
    own.model.output_layer = None
    np.testing.assert_array_equal(own.encode(texts), encoder.encode(texts))
    assert LAYER not in load_file(own.save(tmp_path / "plain") / "model.safetensors")


@pytest.mark.parametrize("shape", [(WIDTH, 383), (WIDTH,), ()], ids=str)
def test_a_layer_that_does_not_fit_is_refused(checkpoint, tmp_path, shape):
    misfit = replace(checkpoint, tensors={**checkpoint.tensors, LAYER: torch.ones(shape)})
    with pytest.raises(WeightsError, match=r"misshapen \(1\): output_layer.weight is"):
        misfit.save(tmp_path / "model")


def test_in_8_bits_the_layer_stays_as_it_is(checkpoint, tmp_path, weight, expected, texts):
    folder = compress(checkpoint).save(tmp_path / "model")
    assert torch.equal(load_file(folder / "model.safetensors")[LAYER], weight)
    small = minilm.load(folder, device="cpu")
    assert small.model.backend.name == "int8"
    assert (small.encode(texts) * expected(texts)).sum(axis=1).min() > 0.98


# In sentence-transformers folders.


def test_sentence_transformers_computes_the_same_from_the_export(exported, projected, texts):
    theirs = SentenceTransformer(str(exported), device="cpu")
    assert [type(module).__name__ for module in theirs] == ["Transformer", "Pooling", "Dense", "Normalize"]
    assert theirs.get_embedding_dimension() == WIDTH
    np.testing.assert_allclose(theirs.encode(texts), projected.encode(texts), atol=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
def test_the_layer_comes_back(checkpoint, tmp_path, texts, normalize):
    changed = checkpoint.with_encoding(normalize=normalize)
    export_sentence_transformers(changed, tmp_path / "exported")
    SentenceTransformer(str(tmp_path / "exported"), device="cpu").save(str(tmp_path / "theirs"))
    for folder in ("exported", "theirs"):
        again = read_checkpoint(tmp_path / folder)
        assert again.encoding.normalize is normalize
        assert torch.equal(again.tensors[LAYER], checkpoint.tensors[LAYER])
        assert again.golden is None  # of the default model, whose other tensors these are
        rows = minilm.load(tmp_path / folder, device="cpu").encode(texts[:3])
        assert rows.shape == (3, WIDTH)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": True}, "bias must be False, got True"),
        ({"bias": None}, "bias must be False, got True"),
        (
            {"activation_function": "torch.nn.modules.activation.Tanh"},
            "activation_function must be .*Identity', got",
        ),
        ({"activation_function": None}, "activation_function must be .*Identity', got '.*Tanh'"),
        ({"use_residual": True}, "use_residual must be False, got True"),
        ({"module_input_name": "token_embeddings"}, "module_input_name must be sentence_embedding"),
    ],
    ids=str,
)
def test_another_dense_module_is_refused(exported, tmp_path, changes, message):
    folder = copied(exported, tmp_path)
    path = folder / "2_Dense" / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    with pytest.raises(WeightsError, match=message):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"linear.weight": torch.ones(WIDTH, 100)}, r"output_layer.weight is \[128, 100\], expected \[128, 384\]"),
        ({"linear.weight": torch.full((WIDTH, 384), torch.nan)}, "NaN.*: output_layer.weight"),
        ({"linear.weight": torch.ones(WIDTH, 384), "linear.bias": torch.ones(WIDTH)}, "must hold linear.weight and no"),
        ({"weight": torch.ones(WIDTH, 384)}, "must hold linear.weight and nothing else, got weight"),
    ],
    ids=["misshapen", "not finite", "bias", "another name"],
)
def test_other_weights_of_it_are_refused(exported, tmp_path, tensors, message):
    folder = copied(exported, tmp_path)
    (folder / "2_Dense" / "model.safetensors").unlink()
    save_file(tensors, folder / "2_Dense" / "model.safetensors")
    with pytest.raises(WeightsError, match=message):
        read_checkpoint(folder)


def copied(folder, tmp_path):
    """Lay a folder out again, its large file as a link."""
    target = tmp_path / "copy"
    for path in folder.rglob("*"):
        there = target / path.relative_to(folder)
        if path.is_file():
            there.parent.mkdir(parents=True, exist_ok=True)
            there.symlink_to(path) if path.suffix == ".safetensors" else there.write_bytes(path.read_bytes())
    return target


# What does without.


def test_modelscope_has_no_such_layer(checkpoint, tmp_path):
    with pytest.raises(WeightsError, match="ModelScope has no output layer"):
        export_modelscope(checkpoint, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_internals_end_before_it(projected):
    with pytest.raises(ValueError, match="has an output layer behind them; take it away with"):
        capture(projected, "a cat")
