"""`minilm.parity` passes what is right, fails what is wrong, and names it."""

import copy
import math

import pytest
import torch

from minilm.kernels.backend import BackendError
from minilm.kernels.torch_backend import TorchBackend
from minilm.parity import OPERATIONS, check_parity

TEXTS = ["A man is eating.", "Rain fell.", "Where does the train to the coast leave from?"]


class Tanh(TorchBackend):
    """GELU by its tanh approximation, which is off by 5e-4."""

    name = "tanh"

    def gelu(self, x):
        return torch.nn.functional.gelu(x, approximate="tanh")


class Raising(TorchBackend):
    name = "raising"

    def pool(self, *_, **__):
        raise NotImplementedError("no pooling yet\nsecond line")


class WrongGradient(TorchBackend):
    name = "wrong gradient"

    def gelu(self, x):
        return super().gelu(x.detach()) + (x - x.detach())


class Unfinished(TorchBackend):
    """Leaves an entry unwritten."""

    name = "unfinished"

    def linear(self, x, weights):
        out = super().linear(x, weights)
        return torch.where(torch.arange(len(out))[:, None] == 0, torch.nan, out)


class Misshapen(TorchBackend):
    name = "misshapen"

    def layer_norm(self, x, weights):
        return super().layer_norm(x, weights)[:, :-1]


class InferenceOnly(TorchBackend):
    name = "inference only"
    differentiable = False


@pytest.fixture(scope="module")
def small(encoder):
    """The real model's first two layers."""
    made = copy.copy(encoder)
    made.model = copy.deepcopy(encoder.model)
    made.model.layers = made.model.layers[:2]
    return made


def failed(encoder, choice):
    rows = check_parity(encoder, choice, TEXTS, dtypes=[torch.float32], quick=True)
    return {row.operation: row for row in rows if not row.ok}, rows


def test_plain_torch_is_right(encoder):
    wrong, rows = failed(encoder, "torch")
    assert not wrong
    assert {row.operation for row in rows} >= {*OPERATIONS, "attention, gradients", "encoder, gradients", "vectors"}
    assert all(0 <= row.plain < 1e-4 for row in rows)  # where the truth is 0, as some gradients are, too
    assert all(row.limit == pytest.approx(2 * row.plain + 1e-6) for row in rows)


def test_every_dtype(small):
    rows = check_parity(small, "torch", TEXTS, dtypes=[torch.float16, torch.bfloat16], quick=True)
    assert all(row.ok for row in rows)
    worst = {name: max(row.plain for row in rows if row.dtype == name) for name in ("float16", "bfloat16")}
    assert 1e-4 < worst["float16"] < worst["bfloat16"]


def test_an_approximation_is_found_where_it_is(small):
    wrong, _ = failed(small, Tanh)
    assert set(wrong) == {
        "gelu", "gelu, gradients", "feed_forward_block", "feed_forward_block, gradients",
        "encoder", "encoder, gradients", "vectors",
    }  # fmt: skip
    assert 1e-5 < wrong["gelu"].error < 1e-3


def test_what_raises_is_a_row(small):
    wrong, _ = failed(small, Raising)
    assert set(wrong) == {"pool", "pool, gradients", "pool, normalised", "pool, normalised, gradients", "vectors"}
    assert wrong["pool"].failure == "NotImplementedError: no pooling yet"
    assert math.isnan(wrong["pool"].error)


def test_wrong_gradients_of_right_results(small):
    wrong, _ = failed(small, WrongGradient)
    assert set(wrong) == {"gelu, gradients", "feed_forward_block, gradients", "encoder, gradients"}


@pytest.mark.parametrize("choice", [Unfinished, Misshapen])
def test_unwritten_entries_and_wrong_shapes(choice, small):
    wrong, _ = failed(small, choice)
    assert "attention" not in wrong
    assert {"encoder", "vectors"} <= set(wrong)
    assert wrong["encoder"].failure or math.isnan(wrong["encoder"].error)


def test_backends_for_inference_only(small):
    wrong, rows = failed(small, InferenceOnly)
    assert not wrong
    assert not [row for row in rows if "gradients" in row.operation]


def test_the_encoder_is_left_as_it_was(small):
    before = small.encode(TEXTS), small.model.backend, small.fingerprint()
    failed(small, Tanh)
    assert (small.encode(TEXTS) == before[0]).all()
    assert small.model.backend is before[1]
    assert small.fingerprint() == before[2]


def test_what_cannot_run_is_an_error(small):
    with pytest.raises(BackendError, match="unknown backend 'nope'"):
        check_parity(small, "nope", TEXTS)
