"""The packed backend: plain torch's results, by packed weights and stretches of equally long sequences."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch

from minilm.batch import PackedBatch
from minilm.config import POOLINGS, MiniLMConfig
from minilm.kernels import packed_backend
from minilm.kernels.backend import BackendError, BackendWarning, make_backend
from minilm.kernels.packed_backend import PackedBackend, rows_to_compute
from minilm.model import MiniLM

CONFIG = MiniLMConfig(vocab_size=50, hidden_size=48, num_layers=2, num_heads=4, feed_forward_size=80, max_positions=160)
LENGTHS = {
    "one token": [1],
    "equal": [7] * 5,
    "longest first": [129, 33, 33, 16, 15, 15, 1],
    "in no order": [3, 9, 3, 9, 3, 9, 3, 9],
}


@pytest.fixture(params=LENGTHS)
def batch(request):
    return batch_of(LENGTHS[request.param])


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = MiniLM(CONFIG, "packed").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def batch_of(lengths):
    return PackedBatch.from_sequences([[(7 * i + n) % 50 for i in range(n)] for n in lengths])


def outputs(model, batch):
    with torch.no_grad():
        return model(batch, hidden_states=True).hidden_states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_hidden_states_against_float64_beside_plain_torch(model, batch, dtype, judge):
    model.to(dtype)
    exact = copy.deepcopy(model).double()
    with model.use_backend("torch"):
        plain = outputs(model, batch)
    judge(outputs(model, batch), plain, outputs(exact, batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_whole_encoder_against_float64_beside_plain_torch(model, batch, dtype, judge):
    """In one go the rows are rounded up, which no row may notice."""
    model.to(dtype)
    exact, backend = copy.deepcopy(model).double(), model.backend
    with model.use_backend("torch"):
        plain = outputs(model, batch)[-1]
    with torch.no_grad():
        judge(backend.whole(batch, model), plain, outputs(exact, batch)[-1])


def test_rows_are_rounded_up_to_few_numbers():
    rounded = {rows: rows_to_compute(rows) for rows in range(1, 2049)}
    assert all(rounded[rows] == rows for rows in (*range(1, 33), 40, 128, 192, 640, 2048))
    assert all(0 <= up - rows < (8 if rows <= 128 else 64 if rows <= 512 else 128) for rows, up in rounded.items())
    assert len(set(rounded.values())) == 32 + 12 + 6 + 12


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_equals_plain_torch(model, batch, pooling, normalize):
    states = outputs(model, batch)
    with torch.inference_mode():
        ours = model.backend.pool(states, batch, pooling, 1, normalize)
        plain = make_backend("torch", CONFIG).pool(states, batch, pooling, 1, normalize)
    torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-6)


def test_an_unknown_pooling_is_refused(model):
    with pytest.raises(ValueError, match="pooling must be one of"), torch.inference_mode():
        model.backend.pool([torch.zeros(3, 48)], batch_of([3]), "median")


def test_gradients_are_plain_torch_s(model, batch):
    def gradients(choice):
        model.zero_grad()
        with model.use_backend(choice):
            model(batch).last_hidden_state.square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(gradients("packed"), gradients("torch"), strict=True))


@pytest.mark.parametrize("fused", [False, True])  # torch's fused steps do not count as writes
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_training_step_is_seen(model, kind, fused):
    batch = batch_of([5, 5])
    before = outputs(model, batch)[-1]
    optimizer = kind(model.parameters(), lr=0.1, fused=fused)
    model(batch).last_hidden_state.square().sum().backward()
    optimizer.step()
    after = outputs(model, batch)[-1]
    assert not torch.equal(before, after)
    with model.use_backend("torch"):
        torch.testing.assert_close(after, outputs(model, batch)[-1], atol=1e-5, rtol=1e-5)


def test_dropout_is_applied_in_training_without_gradients(model):
    """As in Monte Carlo dropout: `train()` within `torch.no_grad()`."""
    model = MiniLM(replace(CONFIG, hidden_dropout=0.5), "packed").train()
    batch, layer = batch_of([6, 6]), model.layers[0]
    x = torch.randn(12, 48)
    with torch.no_grad():
        for block in (
            lambda: model.backend.attention_block(x, layer, batch),
            lambda: model.backend.feed_forward_block(x, layer),
        ):
            assert not torch.equal(block(), block())


@pytest.mark.parametrize("operation", ["linear", "gelu", "layer_norm", "add_layer_norm", "attention", "project_heads"])
def test_an_operation_of_a_subclass_is_used(model, operation, overriding):
    Own, called = overriding(PackedBackend, operation)  # noqa: N806 - a class
    with model.use_backend(Own):
        ours = outputs(model, batch_of([4, 4, 2]))
    assert called
    for mine, theirs in zip(ours, outputs(model, batch_of([4, 4, 2])), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_it_computes_only_on_a_cpu():
    with pytest.raises(BackendError, match="the packed backend can't run here: it computes on a CPU"):
        make_backend("packed", CONFIG, "cuda")


def test_left_to_plain_torch_visibly(monkeypatch):
    monkeypatch.setattr(packed_backend, "missing", lambda: "nothing is there")
    with pytest.warns(BackendWarning, match="products are left to plain torch, as nothing is there"):
        made = make_backend("packed", CONFIG)
    assert made.describe()["products"] == "plain torch, as nothing is there"


def test_copies_and_pickles_pack_anew(model):
    before = outputs(model, batch_of([4]))[-1]
    assert torch.equal(outputs(copy.deepcopy(model), batch_of([4]))[-1], before)
    assert torch.equal(outputs(pickle.loads(pickle.dumps(model)), batch_of([4]))[-1], before)
