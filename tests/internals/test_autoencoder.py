"""Sparse autoencoders: the formula in numpy, files, what is measured of them, and what patching them in does."""

import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from minilm.internals import ablate, capture, captures, patch
from minilm.internals import autoencoder as module
from minilm.internals.autoencoder import (
    SparseAutoencoder,
    reconstruction_effect,
    reconstruction_quality,
    top_examples,
)
from minilm.internals.points import UnknownPointError
from minilm.weights.files import WeightsError


@pytest.fixture
def some():
    """An autoencoder of layers.2.output with numbers that make half of its features 0."""
    made = SparseAutoencoder("layers.2.output", 384, 64, seed=1)
    with torch.no_grad():
        made.encoder_bias.normal_(generator=torch.Generator().manual_seed(2))
        made.pre_bias.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
        made.scale.fill_(2.0)
    return made


def perfect(point, width=384):
    """x = relu(x) - relu(-x): features for both directions of every axis."""
    made = SparseAutoencoder(point, width, 2 * width)
    with torch.no_grad():
        both = torch.cat((torch.eye(width), -torch.eye(width)))
        made.encoder_weight.copy_(both)
        made.decoder_weight.copy_(both)
    return made


@pytest.fixture(scope="module")
def sts(tmp_path_factory, sts_folder):
    """The first 100 pairs of STS-B's test set, as a folder."""
    lines = (sts_folder / "stsb" / "test.tsv").read_text(encoding="utf-8").splitlines()[:100]
    folder = tmp_path_factory.mktemp("sts")
    (folder / "stsb").mkdir()
    (folder / "stsb" / "test.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_the_formula(some):
    x = torch.randn(5, 384, generator=torch.Generator().manual_seed(0))
    w_e, b_e, w_d, b_d = (
        getattr(some, name).detach().double().numpy()
        for name in ("encoder_weight", "encoder_bias", "decoder_weight", "pre_bias")
    )
    features = np.maximum(w_e @ (2 * x.double().numpy().T - b_d[:, None]) + b_e[:, None], 0)
    np.testing.assert_allclose(some.features(x).detach(), features.T, atol=1e-4)
    np.testing.assert_allclose(some(x).detach(), ((w_d.T @ features + b_d[:, None]) / 2).T, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(w_d, axis=1), 1, atol=1e-6)


def test_top_k_keeps_the_largest(some):
    x = torch.randn(50, 384, generator=torch.Generator().manual_seed(0))
    everything = some.features(x)
    some.top_k = 3
    kept = some.features(x)
    assert ((kept > 0).sum(dim=1) <= 3).all()
    torch.testing.assert_close(kept.sum(dim=1), everything.topk(3, dim=1).values.sum(dim=1))
    assert ((kept == 0) | (kept == everything)).all()


def test_heads_are_taken_side_by_side():
    made = perfect("layers.1.attention.head_outputs")
    heads = torch.randn(7, 12, 32)
    torch.testing.assert_close(made(heads), heads)


@pytest.mark.parametrize("top_k", [None, 5])
def test_save_and_load(tmp_path, some, top_k):
    some.top_k = top_k
    path = some.save(tmp_path / "new" / "autoencoder.safetensors")
    assert [file.name for file in path.parent.iterdir()] == ["autoencoder.safetensors"]
    loaded = SparseAutoencoder.load(path)
    assert (loaded.point, loaded.top_k, loaded.width, loaded.num_features) == ("layers.2.output", top_k, 384, 64)
    x = torch.randn(9, 384)
    assert torch.equal(loaded(x), some(x))
    assert torch.equal(loaded.mean, some.mean)


def test_a_save_that_fails_leaves_what_was_there(tmp_path, some, monkeypatch):
    path = some.save(tmp_path / "autoencoder.safetensors")
    before = path.read_bytes()

    def half(path, *_):
        path.write_bytes(before[:100])
        raise OSError("disk full")

    monkeypatch.setattr(module, "write_safetensors", half)
    with pytest.raises(OSError, match="disk full"):
        some.save(path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


def test_other_files_are_refused(tmp_path, some):
    with pytest.raises(WeightsError, match="missing"):
        SparseAutoencoder.load(tmp_path / "none.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="holds no sparse autoencoder"):
        SparseAutoencoder.load(tmp_path / "other.safetensors")
    path = some.save(tmp_path / "cut.safetensors")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        SparseAutoencoder.load(path)


@torch.no_grad()
def test_quality(encoder, own_sentences, some):
    rows = capture(encoder, own_sentences, some.point)[some.point].packed
    some.mean.copy_(rows[:50].mean(dim=0))
    some.encoder_bias[7] = -1e9
    some.top_k = 10
    quality = reconstruction_quality(encoder, some, own_sentences)
    features, rebuilt = some.features(rows), some(rows)
    expected = 1 - ((rows - rebuilt) ** 2).sum() / ((rows - rows.mean(dim=0)) ** 2).sum()
    assert quality.explained_variance == pytest.approx(expected.item(), abs=1e-4)
    assert quality.l0 == pytest.approx((features > 0).sum(dim=1).double().mean().item(), abs=1e-3)
    torch.testing.assert_close(quality.density, (features > 0).double().mean(dim=0), rtol=0, atol=1e-3)
    assert quality.num_rows == len(rows)
    assert 7 in quality.dead
    assert f"over {len(rows):,} activations" in repr(quality)
    whole = reconstruction_quality(encoder, perfect(some.point), own_sentences[:5])
    assert whole.explained_variance == pytest.approx(1)
    assert whole.l0 == pytest.approx(384, abs=0.5)


@pytest.mark.parametrize("point", ["layers.3.output", "layers.3.attention.head_outputs", "pooled"])
def test_a_perfect_reconstruction_changes_nothing(encoder, sts, point):
    effect = reconstruction_effect(encoder, perfect(point), sts)
    np.testing.assert_allclose(
        effect.reconstructed.tasks[0].similarities, effect.original.tasks[0].similarities, atol=2e-7
    )
    assert effect.recovered == pytest.approx(1, abs=1e-3)
    assert effect.reconstructed.average == pytest.approx(effect.original.average, abs=0.05)


def test_reconstructing_the_mean_recovers_nothing(encoder, sts, own_sentences):
    point = "layers.4.feed_forward.output"
    rows = capture(encoder, own_sentences, point)[point].packed
    made = SparseAutoencoder(point, 384, 8)
    with torch.no_grad():
        made.encoder_bias.fill_(-1e9)
        made.mean.copy_(rows.mean(dim=0))
        made.pre_bias.copy_(made.mean)
    effect = reconstruction_effect(encoder, made, sts)
    assert effect.recovered == pytest.approx(0, abs=1e-3)
    with ablate(encoder, point, "mean", source=own_sentences):
        vectors = encoder.encode(["A man is eating.", "Someone eats."])
    assert effect.mean.average != effect.original.average != effect.zero.average
    with patch(encoder, point, made):
        np.testing.assert_allclose(encoder.encode(["A man is eating.", "Someone eats."]), vectors, atol=1e-6)
    assert re.search(r"recovered: -?0.0%", effect.table())


def test_where_ablation_leaves_nothing_to_correlate(encoder, sts):
    effect = reconstruction_effect(encoder, perfect("layers.5.output"), sts)
    assert np.isnan(effect.zero.average)
    assert effect.recovered == pytest.approx(1, abs=1e-3)


def test_top_examples(encoder, own_sentences, some, monkeypatch):
    monkeypatch.setattr(captures, "BATCH_TOKENS", 512)  # so that there are several batches
    found = top_examples(encoder, some, [*own_sentences, own_sentences[0]], count=3)
    captured = capture(encoder, own_sentences, some.point)
    assert len(found) == 64
    for feature in (0, 17, 63):
        strengths = [some.features(rows)[:, feature].max().item() for rows in captured[some.point]]
        order = np.argsort(strengths)[::-1][:3]
        assert [example.activation for example in found[feature]] == pytest.approx(
            [strengths[i] for i in order], abs=1e-4
        )
        assert [example.text for example in found[feature]] == [own_sentences[i] for i in order]
        best = found[feature][0]
        assert best.position == int(some.features(captured[some.point][order[0]])[:, feature].argmax())
        assert best.tokens == captured.tokens[order[0]]
        assert f"[[{best.tokens[best.position]}]]" in repr(best)


def test_examples_are_of_features_above_0_only_and_of_texts_at_points_of_texts(encoder, texts):
    made = perfect("embedding")
    with torch.no_grad():
        made.encoder_bias[5] = -1e9
    found = top_examples(encoder, made, texts, count=2)
    assert found[5] == []
    vectors = encoder.encode(texts)
    assert found[9][0].text == texts[int(vectors[:, 9].argmax())]
    assert found[9][0].position is None
    assert "[[" not in repr(found[9][0])


def test_bad_input(encoder, some, sts):
    with pytest.raises(ValueError, match="top_k must be from 1 to num_features = 4, got 5"):
        SparseAutoencoder("pooled", 3, 4, 5)
    with pytest.raises(ValueError, match="at least 1"):
        SparseAutoencoder("pooled", 0, 4)
    with pytest.raises(ValueError, match="384 wide in this model, and the autoencoder takes 16"):
        reconstruction_quality(encoder, SparseAutoencoder("pooled", 16, 4), "a")
    with pytest.raises(UnknownPointError, match=r"layers\.9\.output"):
        reconstruction_effect(encoder, SparseAutoencoder("layers.9.output", 384, 4), sts)
    with pytest.raises(ValueError, match="count must be at least 1"):
        top_examples(encoder, some, "a", count=0)
