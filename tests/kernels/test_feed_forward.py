"""The whole feed-forward as one kernel, against float64."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch.library import opcheck

pytest.importorskip("triton", reason="the kernels need triton")

from minilm.kernels import feed_forward as kernels
from minilm.kernels.feed_forward import feed_forward, supports
from minilm.kernels.launch import GFX_942, SM_80, SM_89, SM_90

HALF = torch.float16


def formula(x, first, first_bias, second, second_bias, norm_weight, norm_bias, eps):
    update = F.gelu(x @ first.T + first_bias) @ second.T + second_bias
    return F.layer_norm(x + update, norm_weight.shape, norm_weight, norm_bias, eps)


def operands(rows, width, inner, dtype, device, spread=1.0):
    torch.manual_seed(rows + width)
    made = [
        torch.randn(rows, width) * spread,
        torch.randn(inner, width) / width**0.5,
        torch.randn(inner),
        torch.randn(width, inner) / inner**0.5,
        torch.randn(width),
        torch.randn(width),
        torch.randn(width),
    ]
    return [x.to(device, dtype) for x in made]


def check(judge, given, ours=None):
    ours = feed_forward(*given, 1e-12) if ours is None else ours
    judge(ours, formula(*given, 1e-12), formula(*(x.double() for x in given), 1e-12))


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 127, 129, 300])
def test_out(rows, device, judge):
    check(judge, operands(rows, 64, 128, HALF, device))


@pytest.mark.parametrize(("width", "inner"), [(128, 64), (192, 320), (256, 128), (384, 1536)])
def test_widths(width, inner, device, judge):
    check(judge, operands(17, width, inner, HALF, device))


@pytest.mark.parametrize("target", [SM_90, SM_80, SM_89], ids=lambda target: target.architecture)
def test_every_architecture(target, device, judge, monkeypatch):
    if device == "cpu":
        monkeypatch.setattr(kernels, "hardware", lambda _: target)
    check(judge, operands(150, 128, 192, HALF, device))


def test_in_float32(device, judge):
    """The same arithmetic without half precision's rounding to hide in; only interpreted: a GPU lacks the memory."""
    if device != "cpu":
        pytest.skip("float32 rows don't fit in a GPU's shared memory")
    given = operands(70, 192, 128, torch.float32, device)
    out = torch.empty_like(given[0])
    kernels.forward_launch(*given, 1e-12, out, SM_80)()
    check(judge, given, out)


def test_a_row_is_the_same_to_the_bit_in_every_batch(device):
    x, *rest = operands(300, 128, 192, HALF, device)
    together = feed_forward(x, *rest, 1e-12)
    for first, last in ((0, 1), (37, 38), (5, 22), (0, 129), (171, 300)):
        assert torch.equal(feed_forward(x[first:last], *rest, 1e-12), together[first:last])


def test_large_entries(device, judge):
    check(judge, operands(33, 64, 128, HALF, device, spread=1e3))


def test_operands_apart_in_memory(device):
    given = operands(33, 64, 128, HALF, device)
    x, first, first_bias, *rest = given
    apart = torch.cat([x, x], dim=1)[:, 64:], first.T.contiguous().T, torch.cat([first_bias[:1], first_bias])[1:]
    assert not apart[0].is_contiguous()
    assert not apart[1].is_contiguous()
    assert apart[2].data_ptr() % 16
    assert torch.equal(feed_forward(*apart, *rest, 1e-12), feed_forward(*given, 1e-12))


def test_no_rows(device):
    assert feed_forward(*operands(0, 64, 128, HALF, device), 1e-12).shape == (0, 64)


@pytest.mark.parametrize("target", [SM_90, SM_89, SM_80, GFX_942], ids=lambda target: target.architecture)
def test_what_is_supported(target):
    assert supports(384, 1536, HALF, target) is None
    assert supports(384, 1536, torch.bfloat16, target) is None
    assert "float32 don't fit in shared memory" in supports(384, 1536, torch.float32, target)
    assert "these have 768" in supports(768, 3072, HALF, target)
    assert "a multiple of 64 columns; these have 100" in supports(384, 100, HALF, target)


def test_a_width_that_is_not_supported_raises_with_the_reason(device):
    with pytest.raises(ValueError, match=r"these have 320; use linear and linear_add_layer_norm"):
        feed_forward(*operands(3, 320, 128, HALF, device), 1e-12)


def test_a_gradient_is_refused_before_any_work(device):
    given = operands(3, 64, 128, HALF, device)
    given[1].requires_grad_()
    with pytest.raises(RuntimeError, match=r"feed_forward has no gradient.*torch.no_grad"):
        feed_forward(*given, 1e-12)
    with torch.no_grad():
        assert torch.isfinite(feed_forward(*given, 1e-12)).all()


def test_reference_is_the_formula(dtype, device, judge):
    """What the operation does on a CPU whose kernels are not interpreted."""
    given = operands(33, 64, 128, dtype, device)
    check(judge, given, kernels.reference(*given, 1e-12))


def test_operation_registers_fully(device):
    opcheck(kernels._forward, (*operands(5, 64, 64, HALF, device), 1e-12))


def test_compiles_as_one_graph(device):
    given = operands(5, 64, 64, HALF, device)
    compiled = torch.compile(feed_forward, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*given, 1e-12), feed_forward(*given, 1e-12))


def test_shapes_and_dtypes_that_do_not_fit_are_named(device):
    x, first, first_bias, second, *rest = operands(3, 64, 128, HALF, device)
    with pytest.raises(ValueError, match=r"output_weight \[C, F\].*output_weight \[128, 64\]"):
        feed_forward(x, first, first_bias, second.T, *rest, 1e-12)
    with pytest.raises(TypeError, match=r"x torch.float32"):
        feed_forward(x.float(), first, first_bias, second, *rest, 1e-12)
