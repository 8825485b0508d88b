"""Residual + LayerNorm: forward and every gradient against float64."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch.library import opcheck

pytest.importorskip("triton", reason="the kernels need triton")

from minilm.kernels import layer_norm
from minilm.kernels.layer_norm import add_layer_norm

NAMES = "out d_update d_residual d_weight d_bias"


def formula(update, residual, weight, bias, eps):
    x = update if residual is None else update + residual
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def outcome(function, operands, upstream):
    """The output, and the gradient of every operand."""
    operands = [None if x is None else x.detach().requires_grad_() for x in operands]
    out = function(*operands, 1e-12)
    present = [x for x in operands if x is not None]
    return [out.detach(), *torch.autograd.grad(out, present, upstream.to(out.dtype))]


def operands(rows, width, dtype, device, spread=1.0):
    torch.manual_seed(rows + width)
    made = [torch.randn(rows, width) * spread, torch.randn(rows, width), torch.randn(width), torch.randn(width)]
    return [x.to(device, dtype) for x in made], torch.randn(rows, width).to(device, dtype)


def check(judge, given, upstream, names=NAMES):
    exact = outcome(formula, [None if x is None else x.double() for x in given], upstream)
    judge(outcome(add_layer_norm, given, upstream), outcome(formula, given, upstream), exact, names)


@pytest.mark.parametrize(
    ("rows", "width"),
    [*((rows, width) for width in (64, 320, 384, 1024) for rows in (1, 2, 15, 17, 129)), (1031, 384)],
)
def test_out_and_gradients(rows, width, dtype, device, judge):
    check(judge, *operands(rows, width, dtype, device))


def test_without_residual(dtype, device, judge):
    (update, _, weight, bias), upstream = operands(33, 384, dtype, device)
    check(judge, [update, None, weight, bias], upstream, "out d_update d_weight d_bias")


def test_large_entries(dtype, device, judge):
    check(judge, *operands(33, 384, dtype, device, spread=1e4))


def test_equal_entries_give_the_bias(dtype, device):
    """A row without variance: x̂ is 0, not a division by it."""
    x, weight, bias = torch.ones(3, 384), torch.randn(384), torch.randn(384)
    out = add_layer_norm(*(v.to(device, dtype) for v in (x, x, weight, bias)), 1e-12)
    assert torch.equal(out, bias.to(device, dtype).expand(3, 384))


def test_rows_apart_in_memory(dtype, device, judge):
    given, upstream = operands(33, 384, dtype, device)
    spaced = [torch.cat([x, x], dim=1)[:, :384] for x in given[:2]]
    assert not spaced[0].is_contiguous()
    check(judge, [*spaced, *given[2:]], upstream)


def test_gradients_are_the_same_to_the_bit(dtype, device):
    given, upstream = operands(700, 384, dtype, device)
    first, second = (outcome(add_layer_norm, given, upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_rows(dtype, device):
    given, upstream = operands(0, 384, dtype, device)
    out, d_update, *_, d_weight, d_bias = outcome(add_layer_norm, given, upstream)
    assert out.shape == d_update.shape == (0, 384)
    assert not d_weight.any()
    assert not d_bias.any()


def test_reference_is_the_formula(dtype, device, judge):
    """What the operation does on a CPU whose kernels are not interpreted."""
    given, upstream = operands(33, 384, dtype, device)
    exact = outcome(formula, [x.double() for x in given], upstream)
    out, mean, rstd = layer_norm.reference(*given, 1e-12)
    gradients = layer_norm.reference_backward(upstream, given[0], given[1], given[2], mean, rstd)
    ours = [out, gradients[0], *gradients]
    judge(ours, outcome(formula, given, upstream), exact, NAMES)


def test_operation_registers_fully(dtype, device):
    given, _ = operands(5, 384, dtype, device)
    opcheck(layer_norm._forward, (*(x.requires_grad_() for x in given), 1e-12))
    opcheck(layer_norm._forward, (given[0].detach().requires_grad_(), None, given[2], given[3], 1e-12))


def test_compiles_as_one_graph(dtype, device):
    given, upstream = operands(5, 384, dtype, device)
    compiled = torch.compile(add_layer_norm, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(*(outcome(f, given, upstream) for f in (compiled, add_layer_norm)), strict=True):
        assert torch.equal(ours, eager)


def test_shapes_that_do_not_fit_are_named(device):
    x, row = torch.zeros(3, 384, device=device), torch.zeros(383, device=device)
    with pytest.raises(ValueError, match=r"weight \[C\].*weight \[383\]"):
        add_layer_norm(x, x, row, row, 1e-12)
