"""8-bit products: what the rounded numbers give exactly, how far that is from the truth, and what saturation does."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from minilm.kernels import int8_linear
from minilm.kernels.int8_linear import (
    GELU_MINIMUM,
    MARGIN,
    QuantizedFeedForward,
    QuantizedLinear,
    QuantizedWeights,
    input_steps,
    levels,
    missing,
    split_units,
    zero_point,
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=["onednn", "plain"])
def products(request, monkeypatch):
    """With oneDNN's integer products, and with plain torch in their place."""
    if request.param == "onednn":
        assert missing() is None
    else:
        monkeypatch.setattr(int8_linear, "missing", lambda: "taken away")


def range_of(x):
    return torch.stack(x.aminmax(dim=0))


def noise(ours, exact):
    """Return the error's size relative to the deviations of what is computed."""
    return float((ours - exact).square().mean().sqrt() / (exact - exact.mean(dim=0)).square().mean().sqrt())


@pytest.mark.parametrize("rows", [1, 2, 13, 17, 300])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.usefixtures("products")
def test_a_product_is_that_of_the_rounded_numbers(rows, with_residual):
    """Against integer arithmetic in float64, written out from the formula."""
    x, weight, bias = torch.randn(rows, 100) * 3 + 1, torch.randn(40, 100), torch.randn(40)
    residual = torch.randn(rows, 40) if with_residual else None
    measured = range_of(torch.randn(500, 100) * 3 + 1)
    steps, middle = (v.double() for v in input_steps(measured))
    rounded = ((x.double() - middle) / steps + zero_point() + 0.5).floor().clamp(0, levels())
    weights = QuantizedWeights.round(weight * input_steps(measured)[0])
    integers = (rounded - zero_point()) @ weights.values.double().T
    exact = integers * weights.scale.double() + bias.double() + weight.double() @ middle
    ours = QuantizedLinear(weight, bias, measured)(x, residual)
    assert ours.dtype is torch.float32
    one_step = float(weights.scale.max()) * 127  # an input on the edge between two steps may be rounded either way
    exact = exact if residual is None else exact + residual
    assert (ours - exact).abs().max() <= one_step * 1.001
    assert (ours - exact).abs().median() <= 1e-5


@pytest.mark.usefixtures("products")
def test_a_product_is_near_the_truth():
    x, weight, bias = torch.randn(400, 384), torch.randn(96, 384), torch.randn(96)
    ours = QuantizedLinear(weight, bias, range_of(x))(x)
    assert noise(ours, F.linear(x, weight, bias)) < (0.02 if levels() == 255 else 0.04)


def test_equalised_channels_keep_what_one_step_for_all_would_lose():
    """One channel a hundred times as wide as the others, whose weights are as much smaller."""
    x, weight, bias = torch.randn(400, 64), torch.randn(32, 64), torch.zeros(32)
    x[:, 0] *= 100
    weight[:, 0] /= 100
    measured, exact = range_of(x), F.linear(x, weight, bias)
    widest = measured.abs().amax().expand(64)
    assert noise(QuantizedLinear(weight, bias, measured)(x), exact) < 0.06
    assert noise(QuantizedLinear(weight, bias, torch.stack([-widest, widest]))(x), exact) > 0.2


@pytest.mark.usefixtures("products")
def test_inputs_out_of_range_saturate():
    weight, measured = torch.eye(8), torch.tensor([[-1.0], [1.0]]).expand(2, 8)
    ours = QuantizedLinear(weight, torch.zeros(8), measured)(torch.tensor([[1e6, -1e6, *[0.0] * 6]]))
    torch.testing.assert_close(ours[0, :2], torch.tensor([MARGIN, -MARGIN]), atol=0.03, rtol=0)
    assert ours[0, 2:].abs().max() < 0.02


def test_weights_are_rounded_to_within_half_a_step():
    weight = torch.randn(7, 50) * torch.logspace(-3, 3, 7).unsqueeze(1)
    weight[3] = 0
    rounded = QuantizedWeights.round(weight)
    assert rounded.values.dtype is torch.int8
    assert rounded.values.abs().amax(dim=1).tolist() == [127, 127, 127, 0, 127, 127, 127]
    error = (rounded.values * rounded.scale.unsqueeze(1) - weight).abs()
    assert (error <= 0.5001 * rounded.scale.unsqueeze(1)).all()


def test_rounding_rounded_weights_changes_nothing():
    first = QuantizedWeights.round(torch.randn(20, 30))
    again = QuantizedWeights.round(first.values * first.scale.unsqueeze(1))
    assert torch.equal(again.values, first.values)


# The feed-forward.


def feed_forward(outlier, products_of=400):
    """A feed-forward with one unit that reaches `outlier`, its inputs, and its exact results and inner activations."""
    first, second = (torch.randn(128, 32) / 8, torch.zeros(128)), (torch.randn(32, 128), torch.zeros(32))
    x = torch.randn(products_of, 32)
    inner = F.gelu(F.linear(x, *first))
    first[0][5] *= outlier / inner[:, 5].max()
    inner = F.gelu(F.linear(x, *first))
    return x, first, second, inner, F.linear(inner, *second)


def quantized(x, first, second, inner):
    return QuantizedFeedForward(first, second, range_of(x), range_of(inner))


@pytest.mark.parametrize("rows", [1, 13, 400])
@pytest.mark.usefixtures("products")
def test_a_feed_forward_is_near_the_truth(rows):
    x, first, second, inner, exact = feed_forward(outlier=30)
    residual = torch.randn_like(exact)
    ours = quantized(x, first, second, inner)(x[:rows], residual[:rows])
    assert (ours - residual[:rows] - exact[:rows]).square().mean().sqrt() < 0.04 * exact.square().mean().sqrt()


def test_splitting_a_large_unit_keeps_the_small_ones(monkeypatch):
    x, first, second, inner, exact = feed_forward(outlier=60)
    zeros = torch.zeros_like(exact)
    small = exact - inner[:, 5:6] * second[0][:, 5]  # what the other units contribute
    errors = []
    for copies in (int8_linear.MOST_COPIES, 0):
        monkeypatch.setattr(int8_linear, "MOST_COPIES", copies)
        ours = quantized(x, first, second, inner)(x, zeros)
        errors.append(float((ours - exact).square().mean().sqrt() / small.square().mean().sqrt()))
    assert errors[0] < errors[1] / 2


def test_split_units_add_up_to_gelu():
    """In exact arithmetic: the sum of saturated copies is gelu, but for gelu's dip where a copy begins."""
    limit, units, shifts = split_units(torch.tensor([3.0, 21.0]))
    assert units.tolist() == [0, 1, *[1] * (len(units) - 2)]
    assert limit * (len(units) - 1) >= 21
    z = torch.linspace(-6, 21, 1000, dtype=torch.float64)
    copies = F.gelu(z.unsqueeze(1) - shifts[1:].double()).clamp(max=limit)
    assert shifts[1] == 0
    assert (copies.sum(dim=1) - F.gelu(z)).abs().max() < -GELU_MINIMUM + 0.01
    away = ((z.unsqueeze(1) - shifts[2:].double()).abs() > 5).all(dim=1)
    assert (copies.sum(dim=1) - F.gelu(z))[away].abs().max() < 0.001 * len(units)


def test_as_few_copies_as_the_limit_allows(monkeypatch):
    assert split_units(torch.full((10,), 2.0))[1].tolist() == list(range(10))
    monkeypatch.setattr(int8_linear, "MOST_COPIES", 3)
    limit, units, _ = split_units(torch.tensor([8.0, 8.0, 1.0]))
    assert (limit, len(units)) == (4.0, 5)


# What the processor can do.


@pytest.mark.parametrize("instructions", ["AVX2", "AVX512_CORE", "AVX512_CORE_VNNI", "DEFAULT"])
def test_products_are_exact_on_older_processors(instructions):
    """Where products are added up in 16 bits, inputs of 8 bits would overflow, and are given 7."""
    code = """
import torch
from minilm.kernels.int8_linear import QuantizedLinear, levels, missing
assert missing() is None, missing()
x = torch.full((3, 384), 1.0)
weight = torch.cat([torch.full((8, 384), 1.0), torch.full((8, 384), -1.0)])
measured = torch.tensor([[-1.0], [1.0]]).expand(2, 384)
product = QuantizedLinear(weight, torch.zeros(16), measured)(x)
error = (product.abs() / 384 - 1).abs().max().item()
assert error < 0.02, error
print(levels())
"""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": instructions}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) in (127, 255)


def test_without_the_operations_it_says_why(monkeypatch):
    monkeypatch.setattr(torch.ops.onednn, "qlinear_prepack", None)
    missing.cache_clear()
    try:
        assert "has no oneDNN integer products here" in missing()
    finally:
        monkeypatch.undo()
        missing.cache_clear()
