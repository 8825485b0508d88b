"""Products with packed weights: right at every dtype and shape, packed anew when weights change, replaced visibly."""

import gc

import pytest
import torch
from torch import nn

from minilm.kernels import packed_linear
from minilm.kernels.packed_linear import PackedLinear, PackedWeights, is_native, missing, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NATIVE = [dtype for dtype in DTYPES if is_native(dtype)]


def operands(rows, inputs=384, outputs=96, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows)
    shapes = (rows, inputs), (outputs, inputs), (outputs,), (rows, outputs)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epilogue", ["none", "gelu", "residual"])
@pytest.mark.parametrize("rows", [1, 2, 13, 16, 17, 129, 600])
def test_against_float64_beside_plain_torch(rows, epilogue, dtype, judge):
    x, weight, bias, residual = operands(rows, dtype=dtype)
    gelu, residual = epilogue == "gelu", residual if epilogue == "residual" else None
    wide = [None if v is None else v.double() for v in (x, weight, bias, residual)]
    exact = reference(wide[0], wide[1], wide[2], gelu, wide[3])
    plain = reference(x, weight, bias, gelu, residual)
    judge(PackedLinear(weight, bias)(x, gelu=gelu, residual=residual), plain, exact)


@pytest.mark.parametrize(("inputs", "outputs"), [(24, 7), (1, 1), (100, 333)])
def test_widths_that_fill_no_block(inputs, outputs, judge):
    x, weight, bias, residual = operands(5, inputs, outputs)
    exact = reference(x.double(), weight.double(), bias.double(), residual=residual.double())
    judge(PackedLinear(weight, bias)(x, residual=residual), reference(x, weight, bias, residual=residual), exact)


def test_rows_that_are_views_and_none_at_all():
    x, weight, bias, _ = operands(8)
    packed = PackedLinear(weight, bias)
    strided = torch.cat([x, x], dim=1)[::2, 100 : 100 + 384]
    torch.testing.assert_close(packed(strided), reference(strided, weight, bias), atol=1e-4, rtol=1e-5)
    assert packed(x[:0]).shape == (0, 96)


def test_operands_are_left_as_they_were():
    x, weight, bias, residual = operands(4)
    before = [v.clone() for v in (x, weight, bias, residual)]
    PackedLinear(weight, bias)(x, residual=residual)
    assert all(torch.equal(a, b) for a, b in zip((x, weight, bias, residual), before, strict=True))


def test_a_dtype_that_the_processor_does_not_multiply_is_multiplied_in_float32(monkeypatch, judge):
    monkeypatch.setattr(packed_linear, "is_native", lambda dtype: dtype is torch.float32)
    x, weight, bias, residual = operands(17, dtype=torch.bfloat16)
    packed = PackedLinear(weight, bias)
    assert packed.dtype is torch.float32
    exact = reference(x.double(), weight.double(), bias.double(), residual=residual.double())
    judge(packed(x, residual=residual), reference(x, weight, bias, residual=residual), exact)


def test_without_the_private_operations_plain_torch_computes_and_says_why(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
    missing.cache_clear()
    try:
        assert "has no oneDNN products with packed weights" in missing()
        x, weight, bias, residual = operands(40)
        packed = PackedLinear(weight, bias)
        assert torch.equal(packed(x, gelu=True), reference(x, weight, bias, gelu=True))
        assert torch.equal(packed(x, residual=residual), reference(x, weight, bias, residual=residual))
    finally:
        monkeypatch.undo()
        missing.cache_clear()


def test_operations_that_compute_something_else_are_not_used(monkeypatch):
    monkeypatch.setattr(packed_linear, "_multiply_add", lambda *operands: operands[1])
    missing.cache_clear()
    try:
        assert "give other results than plain torch" in missing()
    finally:
        monkeypatch.undo()
        missing.cache_clear()


def test_weights_are_packed_once_and_again_when_they_change():
    made = []
    linear = nn.Linear(3, 2)
    weights = PackedWeights(lambda linear: made.append(linear.weight.sum().item()) or len(made))
    assert [weights(linear, linear), weights(linear, linear)] == [1, 1]
    with torch.no_grad():
        linear.bias += 1
    assert weights(linear, linear) == 2
    linear.weight = nn.Parameter(torch.zeros(2, 3))
    assert [weights(linear, linear), weights(linear, linear)] == [3, 3]
    assert made[-1] == 0
    linear.load_state_dict(nn.Linear(3, 2).state_dict())
    assert weights(linear, linear) == 4


def test_packed_weights_go_when_the_weights_do():
    weights = PackedWeights(lambda _: object())
    linear = nn.Linear(2, 2)
    weights(linear, linear)
    assert len(weights._packed) == 1
    del linear
    gc.collect()
    assert len(weights._packed) == 0


def test_weights_made_in_inference_mode_are_packed():
    with torch.inference_mode():
        linear = nn.Linear(4, 4)
        packed = PackedWeights(lambda linear: PackedLinear(linear.weight, linear.bias))
        x = torch.randn(2, 4)
        torch.testing.assert_close(packed(linear, linear)(x), linear(x))
