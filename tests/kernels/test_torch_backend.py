"""The plain-torch backend against formulas written out in float64 numpy, sequence by sequence."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from scipy.special import erf, softmax

from minilm import MiniLM, MiniLMConfig, PackedBatch
from minilm.kernels.torch_backend import TorchBackend

CONFIG = MiniLMConfig(vocab_size=99, hidden_size=24, num_layers=2, num_heads=3, feed_forward_size=40, max_positions=600)
RAGGED = {
    "one-token": [1],
    "one-sequence": [7],
    "ragged": [1, 2, 15, 16, 17, 31],
    "equal": [5] * 8,
    "long": [512, 1, 129],
    "many": [1 + i % 7 for i in range(300)],
}
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 6e-3}


def packed(lengths):
    generator = torch.Generator().manual_seed(sum(lengths))
    return PackedBatch.from_sequences([torch.randint(0, 99, (n,), generator=generator).tolist() for n in lengths])


def model(dtype=torch.float64):
    torch.manual_seed(0)
    made = MiniLM(CONFIG).to(dtype).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("lengths", RAGGED.values(), ids=RAGGED.keys())
def test_attention_equals_the_formula(lengths, dtype):
    batch, backend = packed(lengths), TorchBackend(CONFIG)
    heads = torch.randn(batch.num_tokens, 3, 3, 8, dtype=torch.float64).to(dtype)
    query, key, value = heads.unbind(1)  # not contiguous, as the projection gives them
    context = backend.attention(query, key, value, batch)
    probabilities = backend.attention_probabilities(query, key, batch)
    assert context.dtype == dtype
    assert context.shape == (batch.num_tokens, 3, 8)
    for index in range(batch.num_sequences):
        q, k, v = (batch.sequence(x, index).double().numpy() for x in (query, key, value))
        pattern = softmax(np.einsum("ihd,jhd->hij", q, k) / math.sqrt(8), axis=-1)
        expected = np.einsum("hij,jhd->ihd", pattern, v)
        np.testing.assert_allclose(batch.sequence(context, index).double(), expected, atol=LIMITS[dtype])
        np.testing.assert_allclose(probabilities[index].double(), pattern, atol=LIMITS[dtype])


def test_extreme_logits_stay_finite():
    batch, backend = packed([3, 5]), TorchBackend(CONFIG)
    query = torch.full((8, 3, 8), 100.0)
    key = torch.randn(8, 3, 8).sign() * 100
    context = backend.attention(query, key, torch.ones(8, 3, 8), batch)
    torch.testing.assert_close(context, torch.ones(8, 3, 8))


@pytest.mark.parametrize("lengths", RAGGED.values(), ids=RAGGED.keys())
@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "mean_sqrt_len", "avg_top2", "avg_first_last"])
def test_pooling_equals_the_formula(lengths, pooling):
    batch, backend = packed(lengths), TorchBackend(CONFIG)
    states = [torch.randn(batch.num_tokens, 24, dtype=torch.float64) for _ in range(3)]
    for first in (0, 1):
        pooled = backend.pool(states, batch, pooling, first)
        for index in range(batch.num_sequences):
            last, previous, start = (batch.sequence(states[i], index) for i in (-1, -2, first))
            expected = {
                "mean": last.mean(0),
                "cls": last[0],
                "max": last.max(0).values,
                "mean_sqrt_len": last.sum(0) / math.sqrt(len(last)),
                "avg_top2": ((last + previous) / 2).mean(0),
                "avg_first_last": ((last + start) / 2).mean(0),
            }[pooling]
            torch.testing.assert_close(pooled[index], expected, atol=1e-12, rtol=0)


def test_gelu_is_the_exact_one():
    x = torch.linspace(-8, 8, 1_001, dtype=torch.float64)
    expected = x.numpy() * 0.5 * (1 + erf(x.numpy() / math.sqrt(2)))
    np.testing.assert_allclose(TorchBackend(CONFIG).gelu(x), expected, atol=1e-14)


def test_add_layer_norm_equals_the_formula():
    norm = torch.nn.LayerNorm(24, eps=1e-12, dtype=torch.float64)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    a, b = torch.randn(2, 5, 24, dtype=torch.float64)
    total = (a + b).numpy()
    centred = total - total.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
    expected = scaled * norm.weight.detach().numpy() + norm.bias.detach().numpy()
    np.testing.assert_allclose(TorchBackend(CONFIG).add_layer_norm(a, b, norm).detach(), expected, atol=1e-12)


@pytest.mark.parametrize("lengths", RAGGED.values(), ids=RAGGED.keys())
def test_a_sequence_does_not_see_its_neighbours(lengths):
    batch, made = packed(lengths), model()
    together = made(batch).last_hidden_state
    for index in {0, len(lengths) // 2, len(lengths) - 1}:
        alone = made(PackedBatch.from_sequences([batch.sequence(batch.ids, index).tolist()])).last_hidden_state
        torch.testing.assert_close(batch.sequence(together, index), alone, atol=1e-12, rtol=0)


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "avg_first_last"])
def test_gradients(pooling):
    """The whole encoder's gradient against finite differences, in float64."""
    batch, made = packed([3, 1, 3]), model()
    names = ["embeddings.word.weight", "layers.0.attention.qkv.weight", "layers.1.feed_forward_norm.bias"]

    def pooled(*values):
        parameters = dict(zip(names, values, strict=True))
        output = torch.func.functional_call(made, parameters, (batch,), {"hidden_states": True})
        return made.backend.pool(output.hidden_states, batch, pooling)

    inputs = tuple(made.get_parameter(name).detach().clone().requires_grad_() for name in names)
    assert torch.autograd.gradcheck(pooled, inputs, fast_mode=True)


def test_dropout_only_in_training():
    batch, made = packed([4, 9]), model(torch.float32)
    assert torch.equal(made(batch).last_hidden_state, made(batch).last_hidden_state)
    made.train()
    assert not torch.equal(made(batch).last_hidden_state, made(batch).last_hidden_state)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_dropout_is_where_bert_has_it(monkeypatch, training):
    """After the embeddings, on the attention probabilities, and on the output of each of a layer's two blocks."""
    hidden, attention = [], []
    plain, plain_attention = F.dropout, F.scaled_dot_product_attention
    monkeypatch.setattr(F, "dropout", lambda x, p, t: hidden.append((tuple(x.shape), p, t)) or plain(x, p, t))
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda *a, dropout_p: attention.append(dropout_p) or plain_attention(*a, dropout_p=dropout_p),
    )
    config = dataclasses.replace(CONFIG, hidden_dropout=0.3, attention_dropout=0.2)
    MiniLM(config).train(training)(packed([4, 4]))
    assert hidden == [((8, 24), 0.3, training)] * (1 + 2 * config.num_layers)
    assert attention == [0.2 if training else 0.0] * config.num_layers


def test_attention_dropout_keeps_the_expectation():
    batch, backend = packed([6]), TorchBackend(CONFIG)
    query, key, value = torch.randn(3, 6, 3, 8)
    torch.manual_seed(0)
    mean = torch.stack([backend.attention(query, key, value, batch, dropout=0.1) for _ in range(4_000)]).mean(0)
    torch.testing.assert_close(mean, backend.attention(query, key, value, batch), atol=0.04, rtol=0)


class Loud(TorchBackend):
    """A backend of someone's own."""

    name = "loud"

    def gelu(self, x):
        return super().gelu(x) + 1


def test_a_backend_of_ones_own_is_used():
    torch.manual_seed(0)
    mine = MiniLM(CONFIG, backend=Loud)
    plain = MiniLM(CONFIG)
    plain.load_state_dict(mine.state_dict())
    batch = packed([5])
    assert mine.backend.name == "loud"
    assert not torch.allclose(mine(batch).last_hidden_state, plain(batch).last_hidden_state)


def test_unknown_pooling():
    with pytest.raises(ValueError, match="pooling must be one of"):
        TorchBackend(CONFIG).pool([torch.zeros(1, 24)], packed([1]), "median")
