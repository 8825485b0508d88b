"""The Triton backend: the encoder's operations as fused kernels, on NVIDIA and AMD GPUs.

Inference runs the whole encoder as one operation (`minilm.kernels.encoder`), a small batch as a CUDA graph; training
runs the kernels one by one, differentiable. What no kernel covers is left to plain torch, with a `BackendWarning`.
Under autocast, products and LayerNorms are plain torch's, which knows their precisions; attention keeps its kernel.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn

from minilm.config import MiniLMConfig
from minilm.kernels import encoder
from minilm.kernels.attention import attention
from minilm.kernels.attention import supports as supports_head_size
from minilm.kernels.backend import BackendWarning
from minilm.kernels.embedding import embed
from minilm.kernels.feed_forward import feed_forward
from minilm.kernels.feed_forward import supports as feed_forward_supports
from minilm.kernels.graphs import EncoderGraphs
from minilm.kernels.launch import INTERPRETED, hardware
from minilm.kernels.layer_norm import add_layer_norm
from minilm.kernels.linear import linear
from minilm.kernels.linear_layer_norm import linear_add_layer_norm
from minilm.kernels.linear_layer_norm import supports as supports_rows
from minilm.kernels.operands import EmbeddingWeights, EncoderWeights, LayerWeights, Packed
from minilm.kernels.pooling import pool
from minilm.kernels.torch_backend import TorchBackend

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class TritonBackend(TorchBackend):
    """Fused kernels on a GPU. A subclass's own operations are used wherever they belong, in place of fused ones.

    Attributes:
        graph_tokens: batches of up to so many tokens run as CUDA graphs in inference; 0 for none.
    """

    name = "triton"
    graph_tokens = 4096

    def __init__(self, config: MiniLMConfig) -> None:
        """Keep the sizes; compile nothing yet."""
        super().__init__(config)
        self.graphs = EncoderGraphs(self.graph_tokens)
        self._left_to_torch: dict[str, str] = {}
        refusal = supports_head_size(config.head_size)
        if refusal is not None:
            self._leave("attention", refusal)

    @classmethod
    def unavailable(cls, config: MiniLMConfig, device: str) -> str | None:  # noqa: ARG003 - any sizes will do
        """Return why the kernels can't run on a kind of device; None if they can."""
        if INTERPRETED:
            return None
        if device != "cuda":
            return (
                f"its kernels need a GPU, and the model is on {device!r} (with TRITON_INTERPRET=1 set before Python "
                "starts they run there too, slowly, to try them out)"
            )
        if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
            return "its kernels need an NVIDIA GPU of compute capability 8.0 (A100) or later"
        return None

    def describe(self) -> dict[str, Any]:
        """Return its class, whether kernels are interpreted, and what is left to plain torch, and why."""
        return {**super().describe(), "interpreted": INTERPRETED, "left to plain torch": self._left_to_torch}

    # The whole encoder.

    def whole(self, batch: Packed, weights: EncoderWeights) -> Tensor | None:
        """Return the last hidden state in one operation, in inference; None where gradients or dropout are wanted."""
        table = weights.embeddings.word.weight
        if torch.is_grad_enabled() or weights.training or not self._covers("attention", table) or self._overrides():
            return None
        tensors = encoder.flatten(weights, self.config.num_heads)
        if table.is_cuda and self.graphs.covers(batch.num_tokens):
            return self.graphs.run(batch, tensors.weights, partial(_launch, tensors))
        return encoder.encode(batch.ids, batch.type_ids, batch.positions, batch.cu_seqlens, batch.max_seqlen, tensors)

    def warm_up(self, weights: EncoderWeights) -> None:
        """Record all CUDA graphs now, so that no later batch waits for one."""
        tensors = encoder.flatten(weights, self.config.num_heads)
        self.graphs.warm_up(weights.embeddings.word.weight.device, tensors.weights, partial(_launch, tensors))

    # The encoder's four steps.

    def embed(self, batch: Packed, weights: EmbeddingWeights) -> Tensor:
        """LN(word + token type + position)."""
        word, norm = weights.word.weight, weights.norm
        if not self._covers("embed", word) or self._overrides("layer_norm"):
            return super().embed(batch, weights)
        tables = word, weights.token_type.weight, weights.position.weight
        x = embed(batch.ids, batch.type_ids, batch.positions, *tables, norm.weight, norm.bias, norm.eps)
        return F.dropout(x, self.config.hidden_dropout, weights.training)

    def attention_block(self, x: Tensor, layer: LayerWeights, batch: Packed) -> Tensor:
        """LN(x + W_o·attention(W_qkv·x))."""
        query, key, value = self.project_heads(x, layer.attention)
        dropout = self.config.attention_dropout if layer.training else 0.0
        context = self.attention(query, key, value, batch, dropout).flatten(1)
        return self._project_add_norm(context, layer.attention.output, x, layer.attention_norm, layer.training)

    def feed_forward_block(self, x: Tensor, layer: LayerWeights) -> Tensor:
        """LN(x + W_2·gelu(W_1·x)), the GELU in the first product's kernel."""
        weights = layer.feed_forward.intermediate
        if self._covers("linear", x, weights.weight) and not self._overrides("linear", "gelu"):
            inner = linear(x, weights.weight, weights.bias, gelu=True)
        else:
            inner = self.gelu(self.linear(x, weights))
        return self._project_add_norm(inner, layer.feed_forward.output, x, layer.feed_forward_norm, layer.training)

    def pool(
        self, hidden_states: Sequence[Tensor], batch: Packed, pooling: str, first: int = 0, normalize: bool = False
    ) -> Tensor:
        """Token vectors -> one vector a sequence, normalised in the same pass."""
        x = hidden_states[-1]
        if not self._covers("pool", x):
            return super().pool(hidden_states, batch, pooling, first, normalize)
        second = self.second_state(hidden_states, pooling, first)
        return pool(x, batch.cu_seqlens, pooling if second is None else "mean", normalize, second)

    # What the steps are made of.

    def attention(self, query: Tensor, key: Tensor, value: Tensor, batch: Packed, dropout: float = 0.0) -> Tensor:
        """softmax(q·kᵀ / √D)·v within each sequence."""
        if dropout:
            self._leave("attention with dropout", "its kernel has none; attention_dropout=0 keeps it")
        if dropout or not self._covers("attention", query, key, value):
            return super().attention(query, key, value, batch, dropout)
        return attention(query, key, value, batch.cu_seqlens, batch.max_seqlen)

    def linear(self, x: Tensor, weights: nn.Linear) -> Tensor:
        """W·x + b."""
        if not self._covers("linear", x, weights.weight):
            return super().linear(x, weights)
        return linear(x, weights.weight, weights.bias)

    def layer_norm(self, x: Tensor, weights: nn.LayerNorm) -> Tensor:
        """LN(x)."""
        if not self._covers("layer_norm", x):
            return super().layer_norm(x, weights)
        return add_layer_norm(x, None, weights.weight, weights.bias, weights.eps)

    def add_layer_norm(self, update: Tensor, residual: Tensor, weights: nn.LayerNorm) -> Tensor:
        """LN(update + residual), the sum in float32."""
        if not self._covers("layer_norm", update) or self._overrides("layer_norm"):
            return super().add_layer_norm(update, residual, weights)
        return add_layer_norm(update, residual, weights.weight, weights.bias, weights.eps)

    # Inner steps.

    def _project_add_norm(
        self, x: Tensor, weights: nn.Linear, residual: Tensor, norm: nn.LayerNorm, training: bool
    ) -> Tensor:
        """LN(residual + W·x): one kernel in inference where one row fits, else the product, then the rest."""
        fused = not torch.is_grad_enabled() and self._covers("linear", x, weights.weight)
        fused = fused and not training and not self._overrides("linear", "add_layer_norm", "layer_norm")
        width, depth = weights.weight.shape
        if fused and supports_rows(depth, width, x.dtype, hardware(x.device)) is None:
            operands = x, weights.weight, weights.bias, residual, norm.weight, norm.bias
            return linear_add_layer_norm(*operands, norm.eps)
        update = F.dropout(self.linear(x, weights), self.config.hidden_dropout, training)
        return self.add_layer_norm(update, residual, norm)

    def _covers(self, operation: str, *operands: Tensor) -> bool:
        """Whether the kernel of an operation takes such operands; says so once if it does not."""
        if operation in ("linear", "layer_norm") and torch.is_autocast_enabled(operands[0].device.type):
            return False
        for dtype in {x.dtype for x in operands} - set(DTYPES):
            self._leave(operation, f"its kernel takes float16, bfloat16 and float32, not {dtype}")
            return False
        return operation not in self._left_to_torch

    def _leave(self, operation: str, reason: str) -> None:
        """Leave an operation to plain torch: recorded, and said once."""
        if operation not in self._left_to_torch:
            self._left_to_torch[operation] = reason
            warnings.warn(f"plain torch computes {operation}: {reason}", BackendWarning, stacklevel=3)

    def _overrides(self, *operations: str) -> bool:
        """Whether a subclass has any of these operations (or of all) its own way, so that none may be fused."""
        return self.overrides(TritonBackend, *operations)


def _launch(
    tensors: encoder.EncoderTensors, ids: Tensor, type_ids: Tensor, positions: Tensor, cu_seqlens: Tensor
) -> Tensor:
    """Launch the encoder in the form that CUDA graphs record: nothing depends on the sequences' lengths."""
    weights, num_heads, eps = tensors.weights, tensors.num_heads, tensors.eps
    return encoder.launch(ids, type_ids, positions, cu_seqlens, None, weights, num_heads, eps)


# Candidates and what they are measured against: `minilm bench --backend minilm.kernels.triton_backend:NAME,...`


class WithoutGraphs(TritonBackend):
    """Each kernel launched from Python: what CUDA graphs gain is measured against it."""

    name = "triton without graphs"
    graph_tokens = 0


class StepByStep(TritonBackend):
    """Each operation called by itself: what a candidate for one of them gains is measured against it."""

    name = "triton step by step"

    def whole(self, batch: Packed, weights: EncoderWeights) -> Tensor | None:  # noqa: ARG002 - never in one go
        """Return None: step by step."""
        return None


class WholeFeedForward(StepByStep):
    """The feed-forward block as one kernel, to be kept if it is 1.1 times as fast as `StepByStep` on a GPU."""

    name = "triton with one-kernel feed-forward"

    def feed_forward_block(self, x: Tensor, layer: LayerWeights) -> Tensor:
        """LN(x + W_2·gelu(W_1·x))."""
        first, second, norm = layer.feed_forward.intermediate, layer.feed_forward.output, layer.feed_forward_norm
        inner_width, width = first.weight.shape
        fits = feed_forward_supports(width, inner_width, x.dtype, hardware(x.device)) is None
        if torch.is_grad_enabled() or layer.training or not fits:
            return super().feed_forward_block(x, layer)
        weights = first.weight, first.bias, second.weight, second.bias, norm.weight, norm.bias
        return feed_forward(x, *weights, norm.eps)
