"""The packed backend: the encoder on a CPU, in pure torch, as fast as its matrix products.

Weights are laid out once (`minilm.kernels.packed_linear`), GELU and residual are computed within the products, and
neighbouring sequences of equal length share one attention call on views of the projected tokens: no padding, no mask,
no copy. Inference only; where gradients or dropout are wanted, plain torch computes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn

from minilm.config import MiniLMConfig
from minilm.kernels.backend import BackendWarning
from minilm.kernels.operands import EncoderWeights, FeedForwardWeights, LayerWeights, Packed
from minilm.kernels.packed_linear import FEW_ROWS, PackedLinear, PackedWeights, is_native, missing
from minilm.kernels.torch_backend import REDUCTIONS, TorchBackend

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class PackedLayer(NamedTuple):
    """A layer's weights laid out: products, each with what follows it, and LayerNorms."""

    qkv: Callable[[Tensor], Tensor]
    output: Callable[[Tensor, Tensor], Tensor]
    """x, residual -> residual + W·x + b"""
    attention_norm: nn.LayerNorm
    feed_forward: Callable[[Tensor], Tensor]
    """x -> x + W_2·gelu(W_1·x)"""
    feed_forward_norm: nn.LayerNorm


class PackedBackend(TorchBackend):
    """Products with packed weights, on a CPU. A subclass's own operations are used in place of fused ones.

    Weights written to in ways that torch does not record (`weight.data[0] = 0`) are not seen: write to them under
    `torch.no_grad()` instead.
    """

    name = "packed"
    multiplier = "oneDNN, packed weights"
    best_batch_tokens = 2048

    def __init__(self, config: MiniLMConfig, base: type[TorchBackend] | None = None) -> None:
        """Keep the sizes; weights are packed when first used. `base` is the class whose operations may be fused."""
        super().__init__(config)
        self._linears = PackedWeights(self._pack_linear)
        self._layers = PackedWeights(self._pack_layer)
        base = base or PackedBackend
        self._fuses_attention = not self.overrides(
            base, "project_heads", "attention", "linear", "layer_norm", "add_layer_norm"
        )
        self._fuses_feed_forward = not self.overrides(base, "linear", "gelu", "layer_norm", "add_layer_norm")
        self._runs_whole = not self.overrides(base)
        if self._missing() is not None:
            reason = f"the {self.name} backend's products are left to {self._products()}"
            warnings.warn(reason, BackendWarning, stacklevel=3)

    @classmethod
    def unavailable(cls, config: MiniLMConfig, device: str) -> str | None:  # noqa: ARG003 - any sizes will do
        """Return why it can't run on a kind of device; None if it can."""
        return None if device == "cpu" else f"it computes on a CPU, and the model is on {device!r}"

    def describe(self) -> dict[str, Any]:
        """Return its class, who multiplies, and in which dtypes."""
        wide = [str(dtype).removeprefix("torch.") for dtype in DTYPES if not is_native(dtype)]
        return {**super().describe(), "products": self._products(), "multiplied in float32": wide}

    def whole(self, batch: Packed, weights: EncoderWeights) -> Tensor | None:
        """Return the last hidden state, computed on a number of rows for which oneDNN has its code ready.

        oneDNN compiles and keeps a product for each number of rows (2 ms, 2 MB): rounded up, those are few.
        """
        if not self._runs_whole or weights.training or self._is_plain(weights.embeddings.word.weight):
            return None
        x = self.embed(batch, weights.embeddings)
        rows = len(x)
        if padding := rows_to_compute(rows) - rows:
            x = F.pad(x, (0, 0, 0, padding))
        for layer in weights.layers:
            packed = self._packed(layer)
            x = self._feed_forward_block(self._attention_block(x, packed, batch), packed)
        return x[:rows] if padding else x

    # The encoder's steps.

    def attention_block(self, x: Tensor, layer: LayerWeights, batch: Packed) -> Tensor:
        """LN(x + W_o·attention(W_qkv·x)), the sum within the product."""
        if layer.training or not self._fuses_attention or self._is_plain(x, layer.attention.output):
            return super().attention_block(x, layer, batch)
        return self._attention_block(x, self._packed(layer), batch)

    def feed_forward_block(self, x: Tensor, layer: LayerWeights) -> Tensor:
        """LN(x + W_2·gelu(W_1·x)), the GELU and the sum within the products."""
        if layer.training or not self._fuses_feed_forward or self._is_plain(x, layer.feed_forward.output):
            return super().feed_forward_block(x, layer)
        return self._feed_forward_block(x, self._packed(layer))

    def pool(
        self, hidden_states: Sequence[Tensor], batch: Packed, pooling: str, first: int = 0, normalize: bool = False
    ) -> Tensor:
        """Token vectors -> one vector a sequence, neighbours of equal length at once."""
        if pooling not in REDUCTIONS or self._is_plain(hidden_states[-1]) or _is_scattered(batch):
            return super().pool(hidden_states, batch, pooling, first, normalize)
        x, other = hidden_states[-1].float(), self.second_state(hidden_states, pooling, first)
        x = x if other is None else (x + other) / 2
        rows = [REDUCTIONS[pooling](x[row : row + n * length].view(n, length, -1)) for row, n, length in batch.runs]
        pooled = rows[0] if len(rows) == 1 else torch.cat(rows)
        return F.normalize(pooled, dim=-1) if normalize else pooled

    def linear(self, x: Tensor, weights: nn.Linear) -> Tensor:
        """W·x + b."""
        return super().linear(x, weights) if self._is_plain(x, weights) else self._linears(weights, weights)(x)

    # How weights are laid out.

    def _pack_linear(self, linear: nn.Linear) -> Callable[..., Tensor]:
        """Lay out a linear map, to be called as `(x)` or `(x, residual)`."""
        return PackedLinear(linear.weight, linear.bias)

    def _pack_feed_forward(self, weights: FeedForwardWeights) -> Callable[[Tensor], Tensor]:
        """Lay out a feed-forward with the residual that is added to it."""
        first, second = self._pack_linear(weights.intermediate), self._pack_linear(weights.output)
        return lambda x: second(first(x, gelu=True), x)

    def _pack_layer(self, layer: LayerWeights) -> PackedLayer:
        """Lay out a layer."""
        qkv, output = self._pack_linear(layer.attention.qkv), self._pack_linear(layer.attention.output)
        feed_forward = self._pack_feed_forward(layer.feed_forward)
        return PackedLayer(qkv, output, layer.attention_norm, feed_forward, layer.feed_forward_norm)

    def _packed(self, layer: LayerWeights) -> PackedLayer:
        """Return a layer laid out as it is now."""
        attention, feed_forward = layer.attention, layer.feed_forward
        linears = attention.qkv, attention.output, feed_forward.intermediate, feed_forward.output
        return self._layers(layer, *linears, layer.attention_norm, layer.feed_forward_norm)

    # Inner steps.

    def _attention_block(self, x: Tensor, layer: PackedLayer, batch: Packed) -> Tensor:
        """See `attention_block`."""
        return self.layer_norm(layer.output(self._context(layer.qkv(x), batch), x), layer.attention_norm)

    def _feed_forward_block(self, x: Tensor, layer: PackedLayer) -> Tensor:
        """See `feed_forward_block`."""
        return self.layer_norm(layer.feed_forward(x), layer.feed_forward_norm)

    def _context(self, heads: Tensor, batch: Packed) -> Tensor:
        """Return attention's result for the projected rows `[T, 3·C]`: `[T, C]`; of rows beyond the batch's, zeros."""
        if _is_scattered(batch):
            context = heads.new_zeros(len(heads), heads.shape[1] // 3)
            for _, rows in batch.length_groups:
                context[rows] = self._attend(heads[rows])
            return context
        runs = [(heads[row : row + n * length], n, length) for row, n, length in batch.runs]
        contexts = [self._attend(run.view(n, length, -1)).flatten(0, 1) for run, n, length in runs]
        if beyond := len(heads) - batch.num_tokens:
            contexts.append(contexts[0].new_zeros(beyond, contexts[0].shape[1]))
        return contexts[0] if len(contexts) == 1 else torch.cat(contexts)

    def _attend(self, heads: Tensor) -> Tensor:
        """Attention within sequences of equal length: projected rows `[n, L, 3·C]` -> `[n, L, C]`."""
        split = heads.unflatten(2, (3, self.config.num_heads, self.config.head_size))
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind()  # [n, H, L, D] each
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)

    def _is_plain(self, x: Tensor, weights: nn.Linear | None = None) -> bool:
        """Whether plain torch computes this: gradients are wanted, a graph is traced, or the dtype is none of ours."""
        if torch.is_grad_enabled() and (x.requires_grad or (weights is not None and weights.weight.requires_grad)):
            return True
        return x.dtype not in DTYPES or x.is_meta or torch.compiler.is_compiling()

    def _missing(self) -> str | None:
        """Return why products are left to plain torch; None if they are not."""
        return missing()

    def _products(self) -> str:
        """Say who multiplies."""
        return self.multiplier if self._missing() is None else f"plain torch, as {self._missing()}"


def rows_to_compute(rows: int) -> int:
    """Round a number of rows up to one of a few, unless it is small: to a multiple of 8, 64 or 128, as it grows."""
    if rows <= FEW_ROWS:
        return rows
    multiple = 8 if rows <= 128 else 64 if rows <= 512 else 128
    return -(-rows // multiple) * multiple


def _is_scattered(batch: Packed) -> bool:
    """Whether sequences of equal length lie apart, so that they are better gathered than taken as they lie."""
    return len(batch.runs) > 2 * len({length for *_, length in batch.runs})
