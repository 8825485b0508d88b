"""The module itself: its parameters, its limits, and that it trains."""

import subprocess
import sys

import pytest
import torch

from minilm import MiniLM, MiniLMConfig, PackedBatch

SMALL = MiniLMConfig(vocab_size=50, hidden_size=16, num_layers=2, num_heads=2, feed_forward_size=32, max_positions=12)


def test_default_sizes():
    with torch.device("meta"):
        model = MiniLM()
    assert sum(parameter.numel() for parameter in model.parameters()) == 22_565_376


def test_output_holds_what_was_asked_for():
    model, batch = MiniLM(SMALL), PackedBatch.from_sequences([[1, 2, 3], [4]])
    plain = model(batch)
    assert plain.hidden_states is None
    assert plain.attentions is None
    full = model.eval()(batch, hidden_states=True, attentions=True)
    assert [state.shape for state in full.hidden_states] == [(4, 16)] * 3
    assert full.hidden_states[-1] is full.last_hidden_state
    assert [[p.shape for p in layer] for layer in full.attentions] == [[(2, 3, 3), (2, 1, 1)]] * 2


def test_a_sequence_beyond_the_position_table():
    with pytest.raises(ValueError, match="at most 12 tokens a sequence, got 13"):
        MiniLM(SMALL)(PackedBatch.from_sequences([[1] * 13]))


def test_initialisation_is_berts():
    torch.manual_seed(0)
    model = MiniLM(MiniLMConfig(num_layers=1))
    assert model.embeddings.word.weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert model.layers[0].attention.qkv.bias.abs().max() == 0
    assert model.layers[0].attention_norm.weight.eq(1).all()


def test_it_learns():
    """Two classes of sequences are told apart after a few steps, with dropout on."""
    torch.manual_seed(0)
    model = MiniLM(SMALL).train()
    head = torch.nn.Linear(16, 2)
    batch = PackedBatch.from_sequences([[1, 2], [3, 4, 5], [2, 1, 1], [5]])
    labels = torch.tensor([0, 1, 0, 1])
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=3e-3)
    losses = []
    for _ in range(60):
        states = model(batch, hidden_states=True).hidden_states
        loss = torch.nn.functional.cross_entropy(head(model.backend.pool(states, batch, "mean")), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_it_can_be_compiled():
    """In a process of its own: torch's compiler looks functions up by identity, and other tests replace some."""
    code = """
import torch
from minilm import MiniLM, MiniLMConfig, PackedBatch
config = MiniLMConfig(vocab_size=50, hidden_size=16, num_layers=2, num_heads=2, feed_forward_size=32, max_positions=12)
batch = PackedBatch.from_sequences([[1, 2, 3], [4, 5, 6]])
for backend in ("torch", "packed"):
    model = MiniLM(config, backend).eval()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        expected = model(batch).last_hidden_state
        torch.testing.assert_close(compiled(batch).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
