"""The int8 backend on a small model: near plain torch, the same alone and in company, and clear about what it lacks."""

import copy

import pytest
import torch

from minilm.activations import measure_input_ranges
from minilm.batch import PackedBatch
from minilm.config import MiniLMConfig
from minilm.kernels import int8_backend
from minilm.kernels.backend import BackendError, BackendWarning, make_backend
from minilm.kernels.int8_backend import Int8Backend, RangeRecorder
from minilm.kernels.torch_backend import TorchBackend
from minilm.model import MiniLM

CONFIG = MiniLMConfig(
    vocab_size=50, hidden_size=64, num_layers=2, num_heads=4, feed_forward_size=128, max_positions=160
)
LENGTHS = [129, 33, 33, 16, 15, 15, 1]


def batch_of(lengths, shift=0):
    return PackedBatch.from_sequences([[(7 * i + n + shift) % 50 for i in range(n)] for n in lengths])


@pytest.fixture
def model():
    """A model with weights large enough to attend to some tokens more than to others."""
    torch.manual_seed(0)
    model = MiniLM(CONFIG, "int8").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    measure_input_ranges(model, [batch_of(LENGTHS, shift) for shift in range(3)])
    return model


def output(model, batch):
    with torch.no_grad():
        return model(batch).last_hidden_state


def plain_output(model, batch):
    with model.use_backend("torch"):
        return output(model, batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_near_plain_torch(model, dtype):
    model.to(dtype)
    ours, exact = output(model, batch_of(LENGTHS, 20)), plain_output(model, batch_of(LENGTHS, 20))
    assert ours.dtype is dtype
    cosines = torch.cosine_similarity(ours.double(), exact.double())
    assert cosines.min() > 0.98
    assert not torch.equal(ours, exact)


def test_the_whole_encoder_is_what_its_steps_are(model):
    """In one go the rows are rounded up, which no row may notice."""
    batch = batch_of(LENGTHS)
    with torch.no_grad():
        steps = model(batch, hidden_states=True).last_hidden_state
        torch.testing.assert_close(model.backend.whole(batch, model), steps, atol=0.02, rtol=0)
    assert len(steps) % 64


@pytest.mark.parametrize("lengths", [LENGTHS, [129, 15, 33, 96] * 3], ids=["longest first", "scattered"])
def test_a_sequence_is_the_same_alone_and_in_company(model, lengths):
    """Ranges are fixed ahead of time: nothing of a neighbour's reaches it but the order in which floats are added."""
    batch = batch_of(lengths)
    together = output(model, batch)
    for index, length in enumerate(lengths):
        alone = output(model, PackedBatch.from_sequences([batch.sequence(batch.ids, index).tolist()]))
        torch.testing.assert_close(alone, batch.sequence(together, index), atol=0.02, rtol=0)
        assert alone.shape == (length, 64)


def test_gradients_are_plain_torch_s(model):
    def gradients(choice):
        model.zero_grad()
        with model.use_backend(choice):
            model(batch_of([5, 5])).last_hidden_state.square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(gradients("int8"), gradients("torch"), strict=True))


@pytest.mark.parametrize("operation", ["linear", "gelu", "layer_norm", "add_layer_norm", "attention", "project_heads"])
def test_an_operation_of_a_subclass_is_used(model, operation, overriding):
    Own, called = overriding(Int8Backend, operation)  # noqa: N806 - a class
    with model.use_backend(Own):
        ours = output(model, batch_of(LENGTHS))
    assert called
    assert torch.cosine_similarity(ours, plain_output(model, batch_of(LENGTHS))).min() > 0.99


def test_without_ranges_it_says_what_to_do():
    model = MiniLM(CONFIG, "int8").eval()
    with pytest.raises(BackendError, match=r"needs the ranges of activations.*ensure_input_ranges"):
        output(model, batch_of([3]))


def test_changed_weights_and_ranges_are_seen(model):
    before = output(model, batch_of(LENGTHS))
    with torch.no_grad():
        model.layers[0].feed_forward.output.weight.mul_(2)
    changed = output(model, batch_of(LENGTHS))
    assert not torch.equal(before, changed)
    measure_input_ranges(model, [batch_of([2])])
    assert not torch.equal(changed, output(model, batch_of(LENGTHS)))


def test_ranges_are_the_extremes_of_what_linear_maps_are_given(model):
    seen = {}

    class Watching(TorchBackend):
        def linear(self, x, weights):
            seen.setdefault(weights, []).append(x)
            return super().linear(x, weights)

    batches = [batch_of([9, 4]), batch_of([30], 3)]
    measure_input_ranges(model, batches)
    with model.use_backend(Watching):
        for batch in batches:
            output(model, batch)
    assert len(seen) == 8
    for linear, inputs in seen.items():
        together = torch.cat(inputs)
        assert torch.equal(linear.input_range, torch.stack([together.amin(dim=0), together.amax(dim=0)]))
        assert not linear.input_range.requires_grad


def test_ranges_are_no_weights_and_follow_the_model(model):
    assert not any("input_range" in name for name in model.state_dict())
    twin = copy.deepcopy(model)
    assert torch.equal(output(twin, batch_of(LENGTHS)), output(model, batch_of(LENGTHS)))


def test_left_to_plain_torch_visibly(monkeypatch):
    monkeypatch.setattr(int8_backend, "missing", lambda: "nothing is there")
    with pytest.warns(BackendWarning, match="the int8 backend.s products are left to plain torch, as nothing is there"):
        made = make_backend("int8", CONFIG)
    assert made.describe()["products"] == "plain torch, as nothing is there"
    assert make_backend(RangeRecorder, CONFIG).ranges == {}
