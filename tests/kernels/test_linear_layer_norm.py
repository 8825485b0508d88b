"""Linear + residual + LayerNorm in one kernel: forward and every gradient against float64."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch.library import opcheck

pytest.importorskip("triton", reason="the kernels need triton")

import triton

from minilm.kernels import linear
from minilm.kernels import linear_layer_norm as kernels
from minilm.kernels.launch import GFX_942, SM_80, SM_89, SM_90, Hardware
from minilm.kernels.linear_layer_norm import linear_add_layer_norm, supports

NAMES = "out d_x d_weight d_bias d_residual d_norm_weight d_norm_bias"


def formula(x, weight, bias, residual, norm_weight, norm_bias, eps):
    return F.layer_norm(x @ weight.T + bias + residual, norm_weight.shape, norm_weight, norm_bias, eps)


def outcome(function, operands, upstream):
    """The output, and the gradient of every operand."""
    operands = [x.detach().clone().requires_grad_() for x in operands]
    out = function(*operands, 1e-12)
    return [out.detach(), *torch.autograd.grad(out, operands, upstream.to(out.dtype))]


def operands(rows, depth, width, dtype, device, spread=1.0):
    torch.manual_seed(rows + width)
    made = [
        torch.randn(rows, depth) * spread,
        torch.randn(width, depth) / depth**0.5,
        torch.randn(width),
        torch.randn(rows, width),
        torch.randn(width),
        torch.randn(width),
    ]
    return [x.to(device, dtype) for x in made], torch.randn(rows, width).to(device, dtype)


def check(judge, given, upstream):
    exact = outcome(formula, [x.double() for x in given], upstream)
    judge(outcome(linear_add_layer_norm, given, upstream), outcome(formula, given, upstream), exact, NAMES)


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 127, 129, 300])
def test_out_and_gradients(rows, dtype, device, judge):
    check(judge, *operands(rows, 64, 192, dtype, device))


@pytest.mark.parametrize("width", kernels.WIDTHS)
def test_widths(width, dtype, device, judge):
    """Every number and width of pieces."""
    check(judge, *operands(17, 128, width, dtype, device))


@pytest.mark.parametrize("depth", [384, 1536])
def test_the_widths_of_minilm(depth, dtype, device, judge, monkeypatch):
    monkeypatch.setattr(linear, "ENOUGH_PROGRAMS", 1)  # its largest tile in the backward: fewer programs to interpret
    check(judge, *operands(17, depth, 384, dtype, device))


@pytest.mark.parametrize("rows_at_once", [128, 64, 32, 16])
@pytest.mark.parametrize("target", [SM_90, SM_80], ids=["descriptors", "pointers"])
def test_every_tile(rows_at_once, target, dtype, device, judge, monkeypatch):
    if device == "cpu":
        monkeypatch.setattr(kernels, "hardware", lambda _: target)
        choose = kernels.choose_shape
        monkeypatch.setattr(kernels, "choose_shape", lambda *args: choose(*args)._replace(rows=rows_at_once))
    check(judge, *operands(130, 64, 192, dtype, device))


@pytest.mark.parametrize("rows", [1, 17, 64, 128, 1000, 3000, 100_000])
@pytest.mark.parametrize("target", [SM_90, SM_89, SM_80, GFX_942], ids=lambda target: target.architecture)
def test_choice_of_tile(rows, target, dtype):
    """More rows a program for more rows in all; the depth of a step never changes with them."""
    few, many = (torch.empty(n, 64, dtype=dtype, device="meta") for n in (rows, 1_000_000))
    chosen, largest = kernels.choose_shape(few, target), kernels.choose_shape(many, target)
    assert chosen.rows <= largest.rows
    assert chosen.block_k == largest.block_k
    assert chosen.rows == 16 or triton.cdiv(rows, chosen.rows) >= kernels.ENOUGH_PROGRAMS


def test_a_row_is_the_same_to_the_bit_in_every_batch(dtype, device):
    (x, weight, bias, residual, *norm), _ = operands(300, 128, 192, dtype, device)
    together = linear_add_layer_norm(x, weight, bias, residual, *norm, 1e-12)
    for first, last in ((0, 1), (37, 38), (5, 22), (183, 300)):
        alone = linear_add_layer_norm(x[first:last], weight, bias, residual[first:last], *norm, 1e-12)
        assert torch.equal(alone, together[first:last])


def test_statistics(dtype, device):
    """Of the sum before it is rounded: the operation returns float32 means and reciprocal deviations."""
    given, _ = operands(33, 64, 192, dtype, device)
    _, mean, rstd = torch.ops.minilm.linear_add_layer_norm(*given, 1e-12)
    x, weight, bias, residual = (v.double() for v in given[:4])
    total = x @ weight.T + bias + residual
    torch.testing.assert_close(mean, total.mean(dim=1).float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rstd, (total.var(dim=1, correction=0) + 1e-12).rsqrt().float(), rtol=1e-5, atol=0)


def test_without_statistics(dtype, device):
    """In inference nothing needs them: the launch takes None."""
    (x, *rest), _ = operands(33, 64, 192, dtype, device)
    out = torch.empty(33, 192, dtype=dtype, device=device)
    kernels.forward_launch(x, *rest, 1e-12, out, None, None, kernels.hardware(x.device))()
    assert torch.equal(out, linear_add_layer_norm(x, *rest, 1e-12))


def test_large_entries(dtype, device, judge):
    check(judge, *operands(33, 64, 192, dtype, device, spread=1e3))


def test_equal_entries_give_the_bias(dtype, device):
    """A row without variance: x̂ is 0, not a division by it."""
    (x, weight, bias, residual, *norm), _ = operands(3, 64, 128, dtype, device)
    zeros = torch.zeros_like(x), weight, torch.ones_like(bias), torch.ones_like(residual)
    assert torch.equal(linear_add_layer_norm(*zeros, *norm, 1e-12), norm[1].expand(3, 128))


def test_operands_apart_in_memory(dtype, device, judge):
    """Rows with gaps, transposed weights, and storage that starts off the 16-byte grid of the copy engine.

    The gradients' products are torch's, which may add up transposed operands in another order.
    """
    given, upstream = operands(33, 64, 192, dtype, device)
    x, weight, bias, residual, *norm = given
    spaced = [torch.cat([v, v], dim=1)[:, : v.shape[1]] for v in (x, residual)]
    shifted = torch.cat([bias[:1], bias])[1:]
    apart = [spaced[0], weight.T.contiguous().T, shifted, spaced[1], *norm]
    assert not any(v.is_contiguous() for v in (*spaced, apart[1]))
    assert shifted.data_ptr() % 16
    leaves = [v.detach().requires_grad_() for v in apart]
    y = linear_add_layer_norm(*leaves, 1e-12)
    assert torch.equal(y, linear_add_layer_norm(*given, 1e-12))
    exact = outcome(formula, [v.double() for v in given], upstream)
    gradients = torch.autograd.grad(y, leaves, upstream)
    judge([y.detach(), *gradients], outcome(formula, given, upstream), exact, NAMES)


def test_gradients_are_the_same_to_the_bit(dtype, device):
    given, upstream = operands(70, 64, 192, dtype, device)
    first, second = (outcome(linear_add_layer_norm, given, upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_rows(dtype, device):
    given, upstream = operands(0, 64, 192, dtype, device)
    out, d_x, d_weight, d_bias, d_residual, d_norm_weight, d_norm_bias = outcome(linear_add_layer_norm, given, upstream)
    assert out.shape == d_residual.shape == (0, 192)
    assert d_x.shape == (0, 64)
    assert not any(gradient.any() for gradient in (d_weight, d_bias, d_norm_weight, d_norm_bias))


@pytest.mark.parametrize(
    ("depth", "width", "dtype", "target", "reason"),
    [
        (768, 768, torch.float16, SM_90, "rows, of 64, 128, 192, 256, 384 columns; these have 768"),
        (384, 320, torch.float16, SM_90, "these have 320"),
        (100, 384, torch.float16, SM_90, "a multiple of 64 columns; these have 100"),
        (384, 384, torch.float64, SM_90, "not torch.float64"),
        (384, 384, torch.float16, Hardware("sm_75", 64 * 1024), "99 KiB of shared memory a program; sm_75 has 64"),
    ],
    ids=["wide", "320", "depth", "double", "small"],
)
def test_what_is_not_supported_has_a_reason(depth, width, dtype, target, reason):
    assert reason in supports(depth, width, dtype, target)


@pytest.mark.parametrize("target", [SM_90, SM_89, SM_80, GFX_942], ids=lambda target: target.architecture)
def test_minilm_is_supported(target, dtype):
    assert supports(384, 384, dtype, target) is None
    assert supports(1536, 384, dtype, target) is None


def test_a_width_that_is_not_supported_raises_with_the_reason(dtype, device):
    given, _ = operands(3, 64, 320, dtype, device)
    with pytest.raises(ValueError, match=r"these have 320; use linear and add_layer_norm"):
        linear_add_layer_norm(*given, 1e-12)


def test_reference_is_the_formula(dtype, device, judge):
    """What the operation does on a CPU whose kernels are not interpreted."""
    given, upstream = operands(33, 64, 192, dtype, device)
    exact, plain = (outcome(formula, [x.to(kind) for x in given], upstream)[0] for kind in (torch.float64, dtype))
    judge(kernels.reference(*given, 1e-12)[0], plain, exact)


def test_operation_registers_fully(dtype, device):
    given, _ = operands(5, 64, 64, dtype, device)
    opcheck(kernels._forward, (*(x.requires_grad_() for x in given), 1e-12))


def test_compiles_as_one_graph(dtype, device):
    given, upstream = operands(5, 64, 64, dtype, device)
    compiled = torch.compile(linear_add_layer_norm, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(*(outcome(f, given, upstream) for f in (compiled, linear_add_layer_norm)), strict=True):
        assert torch.equal(ours, eager)


def test_shapes_that_do_not_fit_are_named(device):
    (x, weight, bias, residual, *norm), _ = operands(3, 64, 128, torch.float32, device)
    with pytest.raises(ValueError, match=r"residual \[T, C\].*residual \[2, 128\]"):
        linear_add_layer_norm(x, weight, bias, residual[:2], *norm, 1e-12)


def test_dtypes_that_do_not_fit_are_named(device):
    (x, weight, bias, residual, *norm), _ = operands(3, 64, 128, torch.float32, device)
    with pytest.raises(TypeError, match=r"residual torch.float16"):
        linear_add_layer_norm(x, weight, bias, residual.half(), *norm, 1e-12)


def test_one_compiled_graph_serves_every_number_of_rows(device):
    torch._dynamo.reset()  # other tests compile the same function for dtypes and shapes of theirs
    compiled = torch.compile(linear_add_layer_norm, fullgraph=True, dynamic=True, backend="aot_eager")
    weight, row = torch.randn(64, 64, device=device), torch.randn(64, device=device)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (5, 9):
            x = torch.randn(rows, 64, device=device)
            assert compiled(x, weight, row, x, row, row, 1e-12).shape == (rows, 64)
