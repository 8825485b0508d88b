"""Products in 8-bit integers, for a CPU: weights rounded per output channel, inputs by ranges known ahead of time.

    x ≈ m + s·(q - z), q in 0..255        y = (W·s)·(q - z) + (W·m + b)

The ranges of each input channel (m its middle, s from its width) are measured once, on ordinary sentences, so a text's
vector does not depend on its neighbours in a batch. Channels of very different ranges are equalised as in SmoothQuant
(Xiao et al. 2022, https://arxiv.org/abs/2211.10438): each has a step s of its own, taken up by the weights.

The feed-forward's inner activations can't be: between them and the weights before them stands a GELU. There, one or two
units of a layer reach values ten times those of the others, and a step made for them would lose the rest. Such a unit
is split into several: 8-bit outputs saturate, and with a limit R that GELU leaves as it is,

    gelu(z) ≈ min(gelu(z), R) + min(gelu(z - R), R) + min(gelu(z - 2R), R) + ...

So copies of the unit with shifted biases carry what its saturation cuts off, and nothing is added but a few rows (the
idea of splitting outlier channels: Zhao et al. 2019, https://arxiv.org/abs/1901.09504).

The integer products are oneDNN's, through the operations behind torch's quantised CPU code (`torch.ops.onednn`); where
they are missing, plain torch computes with the rounded numbers in float32, and `missing()` says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

EQUALISATION = 0.6  # s ~ width^0.6: 0 gives all channels one step, 1 gives each the finest that it can have
MARGIN = 1.25  # how much wider than measured a range is taken
GELU_MINIMUM = -0.17  # gelu's least value, -0.16997, rounded away from zero
SMALLEST_LIMIT = 3.75  # R: gelu(3.75) differs from 3.75 by 0.0003
MOST_COPIES = 64
WIDTH_MULTIPLE = 64  # rows of inputs that a processor's integer instructions take at once


@dataclass(frozen=True)
class QuantizedWeights:
    """A matrix in int8, one scale a row: W ≈ scale·values.

    Attributes:
        values: int8 `[N, K]`, -127 to 127.
        scale: float32 `[N]`.
    """

    values: Tensor
    scale: Tensor

    @classmethod
    def round(cls, weight: Tensor) -> QuantizedWeights:
        """Round a float matrix `[N, K]`."""
        least, greatest = weight.aminmax(dim=1)
        scale = (torch.maximum(-least, greatest) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        return cls((weight / scale.unsqueeze(1)).round_().to(torch.int8), scale)


class QuantizedLinear:
    """One linear map with 8-bit weights and inputs.

    Args:
        weight: float32 `[N, K]`.
        bias: float32 `[N]`.
        input_range: the least and greatest value of each input channel, `[2, K]`.
        gelu: the scale and zero point of gelu(W·x + b) in 8 bits, if that is wanted.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, input_range: Tensor, gelu: tuple[float, int] | None = None
    ) -> None:
        steps, middle = input_steps(input_range)
        self._inverse, self._offset = 1 / steps, zero_point() + 0.5 - middle / steps  # + 0.5: `.to` cuts fractions off
        weights, bias = QuantizedWeights.round(weight * steps), bias + weight @ middle
        self._product = _Product(weights, bias, (1.0, zero_point()), gelu)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return W·x + b, and residual added, or its gelu in 8 bits: float32 `[T, K]` -> `[T, N]`."""
        quantized = torch.addcmul(self._offset, x, self._inverse).clamp_(0, levels() + 0.5).to(torch.uint8)
        return self._product(quantized, residual=residual)


class QuantizedFeedForward:
    """W_2·gelu(W_1·x + b_1) + b_2, the inner activations in 8 bits too.

    Args:
        first: W_1 and b_1: float32 `[F, C]` and `[F]`.
        second: W_2 and b_2: float32 `[C, F]` and `[C]`.
        input_range: the least and greatest value of each channel of x, `[2, C]`.
        inner_range: the same of gelu(W_1·x + b_1), `[2, F]`.
    """

    def __init__(
        self, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], input_range: Tensor, inner_range: Tensor
    ) -> None:
        (weight1, bias1), (weight2, bias2) = first, second
        limit, units, shifts = split_units(MARGIN * inner_range[1])
        padding = -len(units) % WIDTH_MULTIPLE
        scale = (limit - GELU_MINIMUM) / levels()
        inner = scale, round(-GELU_MINIMUM / scale)
        weight1, bias1 = F.pad(weight1[units], (0, 0, 0, padding)), F.pad(bias1[units] - shifts, (0, padding))
        self._first = QuantizedLinear(weight1, bias1, input_range, inner)
        self._second = _Product(QuantizedWeights.round(F.pad(weight2[:, units], (0, padding))), bias2, inner)

    def __call__(self, x: Tensor, residual: Tensor) -> Tensor:
        """Return residual + W_2·gelu(W_1·x + b_1) + b_2: float32 `[T, C]` each."""
        return self._second(self._first(x), residual=residual)


def input_steps(input_range: Tensor) -> tuple[Tensor, Tensor]:
    """Return each channel's step s and middle m, `[K]` each: x ≈ m + s·(q - z)."""
    width = MARGIN * (input_range[1] - input_range[0]).clamp(min=1e-6)
    widest = width.amax()
    return (width / widest) ** EQUALISATION * widest / levels(), input_range.mean(dim=0)


def split_units(largest: Tensor) -> tuple[float, Tensor, Tensor]:
    """Split the units whose activations grow large.

    Args:
        largest: each unit's greatest activation, `[F]`.

    Returns:
        the limit R at which activations saturate; which unit each row is a copy of, the units themselves first; and by
        how much its bias is lowered, a multiple of R.
    """
    candidates = torch.arange(SMALLEST_LIMIT, max(SMALLEST_LIMIT, float(largest.max())) + 0.25, 0.25)
    for limit in candidates.tolist():
        copies = ((largest / limit).ceil() - 1).clamp(min=0).long()
        if copies.sum() <= MOST_COPIES:
            break
    units = torch.arange(len(largest))
    copied = units.repeat_interleave(copies)
    first = (copies.cumsum(0) - copies)[copied]  # where a unit's copies begin
    multiples = torch.arange(len(copied)) - first + 1
    return limit, torch.cat([units, copied]), limit * torch.cat([0 * units, multiples])


class _Product:
    """An integer matrix times integer rows, as oneDNN takes it.

    Args:
        weights: the matrix.
        bias: float32 `[N]`, added to the result.
        inputs: the rows' scale and zero point.
        gelu: if given, the result is gelu of it, in 8 bits, of this scale and zero point.
    """

    def __init__(
        self, weights: QuantizedWeights, bias: Tensor, inputs: tuple[float, int], gelu: tuple[float, int] | None = None
    ) -> None:
        self._scale, self._bias, self._inputs, self._gelu = weights.scale, bias, inputs, gelu
        self._zeros = torch.zeros(len(bias), dtype=torch.int64)
        self._packed = missing() is None
        self._values = torch.ops.onednn.qlinear_prepack(weights.values, None) if self._packed else weights.values

    def __call__(self, quantized: Tensor, residual: Tensor | None = None) -> Tensor:
        """Multiply, and add `residual [T, N]`: uint8 `[T, K]` -> float32 (with gelu, uint8) `[T, N]`."""
        if not self._packed:
            return self._reference(quantized, residual)
        operands = quantized, *self._inputs, self._values, self._scale, self._zeros
        y: Tensor
        if residual is not None:
            y = torch.ops.onednn.qlinear_pointwise.binary(
                *operands, residual, self._bias, 1.0, 0, torch.float32, 1.0, 0, "add", 1.0, "none", [], ""
            )
        elif self._gelu is not None:
            y = torch.ops.onednn.qlinear_pointwise.default(
                *operands, self._bias, *self._gelu, torch.uint8, "gelu", [], "none"
            )
        else:
            y = torch.ops.onednn.qlinear_pointwise.default(*operands, self._bias, 1.0, 0, torch.float32, "none", [], "")
        return y

    def _reference(self, quantized: Tensor, residual: Tensor | None) -> Tensor:
        """The same, with the rounded numbers in float32."""
        scale, zero = self._inputs
        y = F.linear((quantized.float() - zero) * scale, self._values * self._scale.unsqueeze(1), self._bias)
        if self._gelu is None:
            return y if residual is None else y + residual
        scale, zero = self._gelu
        return torch.round(F.gelu(y) / scale + zero).clamp(0, levels()).to(torch.uint8)


@cache
def levels() -> int:
    """Return the greatest quantised input: 255, or 127 where this CPU adds pairs of products in 16 bits.

    That is so before VNNI (https://oneapi-src.github.io/oneDNN/dev_guide_int8_computations.html): 255 would overflow.
    """
    if missing() is not None:
        return 255
    rows, weights = torch.full((2, 64), 255, dtype=torch.uint8), torch.full((16, 64), 127, dtype=torch.int8)
    packed, zeros = torch.ops.onednn.qlinear_prepack(weights, None), torch.zeros(16, dtype=torch.int64)
    product = torch.ops.onednn.qlinear_pointwise.default(
        rows, 1.0, 0, packed, torch.ones(16), zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return 255 if bool((product == 255 * 127 * 64).all()) else 127


def zero_point() -> int:
    """Return the quantised value of a range's middle."""
    return (levels() + 1) // 2


@cache
def missing() -> str | None:
    """Return why integers can't be multiplied here; None if they can."""
    try:
        weights = torch.arange(-64, 64, dtype=torch.int8).view(4, 32)
        packed = torch.ops.onednn.qlinear_prepack(weights, None)
        rows, ones = torch.arange(96, dtype=torch.uint8).view(3, 32), torch.ones(4)
        product = torch.ops.onednn.qlinear_pointwise.default(
            rows, 1.0, 3, packed, ones, torch.zeros(4, dtype=torch.int64), ones, 1.0, 0, torch.float32, "none", [], ""
        )
        if not torch.equal(product, (rows.float() - 3) @ weights.float().T + 1):
            return f"oneDNN's integer products of torch {torch.__version__} give other results than plain torch here"
    except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
        return f"torch {torch.__version__} has no oneDNN integer products here ({str(error).splitlines()[0]})"
    return None
