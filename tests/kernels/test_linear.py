"""Linear layer with and without GELU: forward and every gradient against float64."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch.library import opcheck

pytest.importorskip("triton", reason="the kernels need triton")

import triton
import triton.language as tl

from minilm.kernels import linear as kernels
from minilm.kernels.launch import GFX_942, SM_80, SM_89, SM_90
from minilm.kernels.linear import linear

NAMES = "out d_x d_weight d_bias"
WITH_AND_WITHOUT = pytest.mark.parametrize("gelu", [False, True], ids=["plain", "gelu"])


def formula(x, weight, bias, gelu):
    out = x @ weight.T + bias
    return F.gelu(out) if gelu else out


def outcome(function, operands, upstream, gelu):
    """The output, and the gradient of every operand."""
    operands = [x.detach().clone().requires_grad_() for x in operands]
    out = function(*operands, gelu)
    return [out.detach(), *torch.autograd.grad(out, operands, upstream.to(out.dtype))]


def operands(rows, depth, width, dtype, device, spread=1.0):
    torch.manual_seed(rows + width)
    made = torch.randn(rows, depth) * spread, torch.randn(width, depth) / depth**0.5, torch.randn(width)
    return [x.to(device, dtype) for x in made], torch.randn(rows, width).to(device, dtype)


def check(judge, given, upstream, gelu):
    exact = outcome(formula, [x.double() for x in given], upstream, gelu)
    judge(outcome(linear, given, upstream, gelu), outcome(formula, given, upstream, gelu), exact, NAMES)


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 127, 129, 300])
@WITH_AND_WITHOUT
def test_out_and_gradients(rows, gelu, dtype, device, judge):
    check(judge, *operands(rows, 64, 96, dtype, device), gelu)


@pytest.mark.parametrize(
    ("depth", "width", "gelu"),
    [(384, 1536, True), (1536, 384, False), (64, 24, True), (100, 72, False), (20, 33, True)],
)
def test_widths(depth, width, gelu, dtype, device, judge, monkeypatch):
    """MiniLM's own; narrower than any tile; and rows that no step of K, or no copy engine, divides."""
    monkeypatch.setattr(kernels, "ENOUGH_PROGRAMS", 1)  # the largest tile: fewer programs to interpret
    check(judge, *operands(17, depth, width, dtype, device), gelu)


@pytest.mark.parametrize("tile", kernels.HALF_TILES, ids=lambda tile: f"{tile.rows}x{tile.columns}")
@pytest.mark.parametrize("target", [SM_90, SM_80], ids=["descriptors", "pointers"])
def test_every_tile(tile, target, dtype, device, judge, monkeypatch):
    monkeypatch.setattr(kernels, "choose_tile", lambda *_: tile)
    if device == "cpu":
        monkeypatch.setattr(kernels, "hardware", lambda _: target)
    check(judge, *operands(150, 128, 160, dtype, device), True)


@pytest.mark.parametrize("rows", [1, 17, 64, 128, 1000, 100_000])
@pytest.mark.parametrize("target", [SM_90, SM_89, SM_80, GFX_942], ids=lambda target: target.architecture)
def test_choice_of_tile(rows, target, dtype):
    """Larger tiles for more rows; only the tile's rows and columns differ, never the depth of a step."""
    tile, large = (kernels.choose_tile(n, 384, dtype, target) for n in (rows, 1_000_000))
    assert tile.rows <= large.rows
    assert tile.rows * tile.columns <= large.rows * large.columns
    x, weight, bias = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((rows, 64), (384, 64), (384,)))
    launch = kernels.forward_launch(x, weight, bias, False, torch.empty(rows, 384, device="meta"), target)
    assert launch.arguments["BLOCK_K"] == (32 if dtype == torch.float32 else 64)
    assert launch.grid == (triton.cdiv(rows, tile.rows) * triton.cdiv(384, tile.columns),)


@pytest.mark.parametrize("tile", kernels.HALF_TILES[:2], ids=lambda tile: f"{tile.rows}x{tile.columns}")
def test_a_row_is_the_same_to_the_bit_in_every_batch(tile, dtype, device, monkeypatch):
    monkeypatch.setattr(kernels, "choose_tile", lambda *_: tile)
    (x, weight, bias), _ = operands(300, 256, 64, dtype, device)
    together = linear(x, weight, bias, True)
    for first, last in ((0, 1), (37, 38), (5, 22), (0, 129), (171, 300)):
        assert torch.equal(linear(x[first:last], weight, bias, True), together[first:last])


def test_gradients_are_the_same_to_the_bit(dtype, device):
    given, upstream = operands(70, 64, 96, dtype, device)
    first, second = (outcome(linear, given, upstream, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_operands_apart_in_memory(dtype, device, judge):
    """Rows with gaps, a transposed weight, and storage that starts off the 16-byte grid of the copy engine."""
    (x, weight, bias), upstream = operands(33, 64, 96, dtype, device)
    shifted = torch.cat([bias[:1], bias])[1:]
    given = [torch.cat([x, x], dim=1)[:, 64:], weight.T.contiguous().T, shifted]
    assert not given[0].is_contiguous()
    assert not given[1].is_contiguous()
    ours = linear(*given, True)
    judge(ours, formula(x, weight, bias, True), formula(x.double(), weight.double(), bias.double(), True))
    assert torch.equal(ours, linear(x, weight, bias, True))
    off = torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x)
    assert off.data_ptr() % 16
    assert torch.equal(ours, linear(off, weight, bias, True))
    spread = torch.autograd.grad(linear(x.requires_grad_(), weight, bias, True).sum(), x)[0]  # an upstream of stride 0
    dense = torch.autograd.grad(linear(x, weight, bias, True), x, torch.ones_like(upstream))[0]
    assert torch.equal(spread, dense)


def test_large_entries(dtype, device, judge):
    check(judge, *operands(33, 64, 96, dtype, device, spread=1e3), True)


def test_no_rows(dtype, device):
    given, upstream = operands(0, 64, 96, dtype, device)
    out, d_x, d_weight, d_bias = outcome(linear, given, upstream, True)
    assert out.shape == (0, 96)
    assert d_x.shape == (0, 64)
    assert not d_weight.any()
    assert not d_bias.any()


@triton.jit
def gelu_kernel(x, out, block: tl.constexpr):
    offsets = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(out + offsets, kernels.gelu(tl.load(x + offsets)))


BLOCK = 4096


def run_gelu(x):
    out = torch.empty_like(x)
    gelu_kernel[(triton.cdiv(len(x), BLOCK),)](x, out, BLOCK)
    return out


def test_gelu_is_exact_to_5e_7(device):
    """On a grid of 3e-5 over [-30, 30], in float32, against float64."""
    x = torch.linspace(-30, 30, 500 * BLOCK, device=device)
    assert (run_gelu(x).double() - F.gelu(x.double())).abs().max() <= 5e-7


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # from numpy, which interprets: x² is inf
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NaN in, NaN out
def test_gelu_of_extremes(device):
    inputs = [0.0, -0.0, 1e-38, -1e-38, 1e4, -1e4, 3e38, -3e38, float("inf"), float("nan")]
    x = torch.tensor(inputs, device=device).repeat(BLOCK)[:BLOCK]
    expected = F.gelu(x.double()).float()
    torch.testing.assert_close(run_gelu(x), expected, rtol=0, atol=1e-37, equal_nan=True)


@WITH_AND_WITHOUT
def test_reference_is_the_formula(gelu, dtype, device, judge):
    """What the operation does on a CPU whose kernels are not interpreted."""
    given, upstream = operands(33, 64, 96, dtype, device)
    ours = [kernels.reference(*given, gelu), *kernels.reference_backward(upstream, *given, gelu)]
    exact = outcome(formula, [x.double() for x in given], upstream, gelu)
    judge(ours, outcome(formula, given, upstream, gelu), exact, NAMES)


@WITH_AND_WITHOUT
def test_operation_registers_fully(gelu, dtype, device):
    given, _ = operands(5, 64, 96, dtype, device)
    opcheck(kernels._forward, (*(x.requires_grad_() for x in given), gelu))


def test_compiles_as_one_graph(dtype, device):
    given, upstream = operands(5, 64, 96, dtype, device)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(*(outcome(f, given, upstream, True) for f in (compiled, linear)), strict=True):
        assert torch.equal(ours, eager)


def test_shapes_that_do_not_fit_are_named(device):
    x, weight, bias = (torch.zeros(shape, device=device) for shape in ((3, 64), (96, 63), (96,)))
    with pytest.raises(ValueError, match=r"weight \[N, K\].*weight \[96, 63\]"):
        linear(x, weight, bias)


@pytest.mark.parametrize(
    ("x_dtype", "dtypes"), [(torch.float16, "float16, .*float32"), (torch.float64, "float64")], ids=["mixed", "double"]
)
def test_dtypes_that_do_not_fit_are_named(x_dtype, dtypes, device):
    rest = torch.float64 if x_dtype == torch.float64 else torch.float32
    x, weight, bias = torch.zeros(3, 64, dtype=x_dtype), torch.zeros(96, 64, dtype=rest), torch.zeros(96, dtype=rest)
    with pytest.raises(TypeError, match=dtypes):
        linear(*(v.to(device) for v in (x, weight, bias)))


def test_one_compiled_graph_serves_every_number_of_rows(device):
    torch._dynamo.reset()  # other tests compile the same function for dtypes and shapes of theirs
    compiled = torch.compile(linear, fullgraph=True, dynamic=True, backend="aot_eager")
    weight, bias = torch.randn(32, 64, device=device), torch.randn(32, device=device)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (5, 9):
            assert compiled(torch.randn(rows, 64, device=device), weight, bias).shape == (rows, 32)
