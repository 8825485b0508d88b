"""From texts to batches and back to rows: what is computed once, in which batches, and in how much memory."""

import warnings

import numpy as np
import pytest

from minilm.embed import Embedder, TruncationWarning, plan_batches
from minilm.kernels.torch_backend import TorchBackend

LONG = "one two three " * 100  # 302 tokens


@pytest.fixture
def batches(encoder, monkeypatch):
    """The lengths of the sequences in each batch that the model gets."""
    seen = []
    forward = type(encoder.model).forward
    monkeypatch.setattr(type(encoder.model), "forward", lambda *a, **k: seen.append(a[1].lengths) or forward(*a, **k))
    return seen


def test_equal_texts_are_computed_once(encoder, batches):
    rows = encoder.encode(["a cat", "a black dog", "a cat", "a cat"])
    assert batches == [(5, 4)]  # the longest first
    assert np.array_equal(rows[0], rows[2])
    assert not np.array_equal(rows[0], rows[1])


def test_equal_texts_are_counted_and_named_like_others(encoder):
    with pytest.warns(TruncationWarning, match="3 texts were longer"):
        encoder.encode(["a", LONG, LONG, "a", LONG + "b", "b"])
    with pytest.raises(ValueError, match="text 3 has 302 tokens"):
        encoder.encode(["a", "a", "b", LONG, LONG], on_truncate="error")


def test_blocks_of_texts_come_back_in_order(encoder, texts, monkeypatch):
    expected = encoder.encode(texts)
    monkeypatch.setattr("minilm.embed.BLOCK_TOKENS", 60)
    np.testing.assert_allclose(encoder.encode(texts), expected, atol=1e-6)
    with pytest.raises(ValueError, match="text 24 has 302 tokens"):
        encoder.encode([*texts, LONG], on_truncate="error")


def test_long_texts_in_windows_come_in_small_blocks(encoder, monkeypatch):
    """However many windows there are, few of them are in memory."""
    sizes = []
    fill = Embedder._fill
    monkeypatch.setattr("minilm.embed.BLOCK_TOKENS", 1_000)
    monkeypatch.setattr(
        Embedder, "_fill", lambda self, rows, block, *a: sizes.append(len(block)) or fill(self, rows, block, *a)
    )
    rows = encoder.encode([f"{LONG} {index}" for index in range(7)] + ["a"], on_truncate="chunk")
    assert sizes == [3, 3, 2]  # 3 windows of a text and their overlaps are 370 tokens
    np.testing.assert_allclose(rows[4], encoder.encode(f"{LONG} 4", on_truncate="chunk"), atol=1e-6)


@pytest.mark.parametrize(("batch_size", "best", "limit"), [(1, None, 128), (32, 100, 100), (1, 1_000, 128)])
def test_a_batch_keeps_to_what_the_caller_allows_and_the_backend_likes(
    own_encoder, texts, batches, batch_size, best, limit
):
    class Choosy(TorchBackend):
        best_batch_tokens = best

    texts = [f"{text} {number}" for text in texts for number in range(3)]
    with own_encoder.model.use_backend(Choosy):
        own_encoder.encode(texts, batch_size=batch_size)
    tokens = [sum(lengths) for lengths in batches]
    assert max(tokens) <= limit
    assert min(tokens[:-1]) > limit - 40  # no sequence is longer
    flat = [length for lengths in batches for length in lengths]
    assert flat == sorted(own_encoder.token_counts(texts), reverse=True)


@pytest.mark.parametrize("budget", [1, 10, 100])
def test_batches_hold_every_sequence_once_within_budget(budget):
    lengths = [3, 1, 4, 1, 5, 9, 2, 6, 30]
    batches = plan_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(9))
    assert all(len(batch) == 1 or sum(lengths[i] for i in batch) <= budget for batch in batches)


@pytest.mark.parametrize("part", ["the model", "a layer", "the embeddings"])
def test_a_model_in_training_encodes_without_dropout(own_encoder, encoder, part):
    model = own_encoder.model
    {"the model": model, "a layer": model.layers[3], "the embeddings": model.embeddings}[part].train()
    assert np.array_equal(own_encoder.encode("x"), encoder.encode("x"))
    assert not any(module.training for module in model.modules())


def test_fewer_dimensions_take_less_memory(encoder, texts):
    narrow = encoder.encode(texts, truncate_dim=8, convert_to_tensor=True)
    assert narrow.untyped_storage().nbytes() == narrow.numel() * 4
    wide = encoder.encode(texts)[:, :8]
    np.testing.assert_allclose(narrow, wide, atol=1e-6)
    scaled = encoder.encode(texts, truncate_dim=8, normalize_embeddings=True)
    np.testing.assert_allclose(scaled, wide / np.linalg.norm(wide, axis=1, keepdims=True), atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        windows = encoder.encode([LONG], truncate_dim=8, on_truncate="chunk", normalize_embeddings=True)
    whole = encoder.encode([LONG], on_truncate="chunk")[:, :8]
    np.testing.assert_allclose(windows, whole / np.linalg.norm(whole), atol=1e-6)
