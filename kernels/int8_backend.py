"""The int8 backend: the encoder's products in 8-bit integers on a CPU, all else in float32.

How numbers are rounded is told in `minilm.kernels.int8_linear`. The ranges of activations that this takes belong to the
weights: `RangeRecorder` measures them (`minilm.activations`), and `minilm weights convert --precision int8` keeps them
beside 8-bit weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from minilm.config import MiniLMConfig
from minilm.kernels.backend import BackendError
from minilm.kernels.int8_linear import QuantizedFeedForward, QuantizedLinear, levels, missing
from minilm.kernels.operands import FeedForwardWeights
from minilm.kernels.packed_backend import PackedBackend
from minilm.kernels.packed_linear import is_native
from minilm.kernels.torch_backend import TorchBackend


class Int8Backend(PackedBackend):
    """Products in 8-bit integers. Inference only; where gradients are wanted, plain torch computes in float32.

    Attributes:
        bfloat16_from: sequences of so many tokens attend in bfloat16 where the CPU multiplies such numbers faster; for
            shorter ones the conversion costs as much as it gains.
    """

    name = "int8"
    multiplier = "oneDNN, 8-bit integers"
    precision = "int8"
    min_cosine = 0.98
    needs_input_ranges = True
    bfloat16_from = 96

    def __init__(self, config: MiniLMConfig) -> None:
        """Keep the sizes; weights are rounded when first used."""
        super().__init__(config, Int8Backend)

    def describe(self) -> dict[str, Any]:
        """Return its class, who multiplies, and how finely inputs are rounded."""
        return {**TorchBackend.describe(self), "products": self._products(), "levels of inputs": levels() + 1}

    def _missing(self) -> str | None:
        """Return why products are left to plain torch; None if they are not."""
        return missing()

    def _pack_linear(self, linear: nn.Linear) -> Callable[..., Tensor]:
        """Round a linear map."""
        return _of_any_dtype(QuantizedLinear(*_parameters(linear), input_range(linear)))

    def _pack_feed_forward(self, weights: FeedForwardWeights) -> Callable[[Tensor], Tensor]:
        """Round a feed-forward, its inner activations in 8 bits too."""
        first, second = weights.intermediate, weights.output
        ranges = input_range(first), input_range(second)
        quantized = _of_any_dtype(QuantizedFeedForward(_parameters(first), _parameters(second), *ranges))
        return lambda x: quantized(x, x)

    def _attend(self, heads: Tensor) -> Tensor:
        """Attention within sequences of equal length; of long ones in bfloat16, finer still than the products."""
        if heads.shape[1] < self.bfloat16_from or not is_native(torch.bfloat16):
            return super()._attend(heads)
        return super()._attend(heads.bfloat16()).to(heads.dtype)


class RangeRecorder(TorchBackend):
    """Plain torch that takes down the least and greatest value of each input channel of each linear map.

    Attributes:
        ranges: `[2, K]` float32 of each linear map seen so far.
    """

    name = "range recorder"

    def __init__(self, config: MiniLMConfig) -> None:
        """Start with no ranges."""
        super().__init__(config)
        self.ranges: dict[nn.Linear, Tensor] = {}

    def linear(self, x: Tensor, weights: nn.Linear) -> Tensor:
        """W·x + b."""
        seen = x.float() if weights not in self.ranges else torch.cat([x.float(), self.ranges[weights]])
        self.ranges[weights] = torch.stack([seen.amin(dim=0), seen.amax(dim=0)])
        return super().linear(x, weights)


def input_range(weights: nn.Linear) -> Tensor:
    """Return the range of each input channel of a linear map, `[2, K]`.

    Raises:
        BackendError: it was never measured.
    """
    found = getattr(weights, "input_range", None)
    if found is None:
        raise BackendError(
            "the int8 backend needs the ranges of activations, and this model has none: measure them with "
            "minilm.activations.ensure_input_ranges(model, tokenizer), as SentenceEncoder.encode does"
        )
    measured: Tensor = found.float()
    return measured


def _of_any_dtype(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make a product of float32 tensors one of tensors of any dtype."""

    def compute(x: Tensor, residual: Tensor | None = None) -> Tensor:
        if x.dtype is torch.float32:
            return product(x, residual)
        return product(x.float(), None if residual is None else residual.float()).to(x.dtype)

    return compute


def _parameters(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """Return weight and bias in float32."""
    return linear.weight.detach().float(), linear.bias.detach().float()
