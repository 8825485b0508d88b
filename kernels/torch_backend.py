"""The plain-torch backend: every operation of the encoder as its formula. The truth that other backends must match.

Dimensions: B sequences, L a sequence's length, T tokens in all, H heads, D head width, C = H·D hidden, F feed-forward.
Sources: Devlin et al. 2019 (BERT, post-LayerNorm); Vaswani et al. 2017 (attention); Hendrycks and Gimpel 2016 (GELU).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn

from minilm.config import MiniLMConfig
from minilm.kernels.operands import AttentionWeights, EmbeddingWeights, EncoderWeights, LayerWeights, Packed


class TorchBackend:
    """Plain torch on any device and dtype, differentiable. Subclass it and override what you make faster.

    Attributes:
        name: what tables and messages call it.
        differentiable: whether gradients can be had through its operations.
        precision: what its products are computed in, where that is not the model's dtype.
        min_cosine: for a backend that approximates: the cosine to plain torch's vectors that it keeps; None if exact.
        best_batch_tokens: at most so many tokens should share a batch; None if more are always better.
        needs_input_ranges: whether linear maps must know the ranges of their inputs (`minilm.activations`).
    """

    name = "torch"
    differentiable = True
    precision: str | None = None
    min_cosine: float | None = None
    best_batch_tokens: int | None = None
    needs_input_ranges = False

    def __init__(self, config: MiniLMConfig) -> None:
        """Keep the sizes."""
        self.config = config

    @classmethod
    def unavailable(cls, config: MiniLMConfig, device: str) -> str | None:  # noqa: ARG003 - for those who override it
        """Return why this backend can't run for a model of these sizes on a kind of device; None if it can."""
        return None

    def describe(self) -> dict[str, Any]:
        """Return what `minilm info` says of it: its class, and which operations it leaves to plain torch, and why."""
        return {"class": f"{type(self).__module__}:{type(self).__qualname__}"}

    def whole(self, batch: Packed, weights: EncoderWeights) -> Tensor | None:  # noqa: ARG002 - as above
        """Return the last hidden state `[T, C]` in one go, or None (as here) to be asked step by step.

        For backends that gain by seeing all layers at once; never called when hidden states in between are wanted.
        """
        return None

    def overrides(self, base: type[TorchBackend], *operations: str) -> bool:
        """Whether a subclass of `base` has one of these operations (of all, if none are named) its own way."""
        return any(getattr(type(self), name) is not getattr(base, name) for name in operations or STEPS)

    # The encoder's four steps.

    def embed(self, batch: Packed, weights: EmbeddingWeights) -> Tensor:
        """LN(word + token type + position), added in BERT's order, to the same bits: `[T]` ids -> `[T, C]`."""
        x = weights.word(batch.ids) + weights.token_type(batch.type_ids) + weights.position(batch.positions)
        x = self.layer_norm(x, weights.norm)
        return F.dropout(x, self.config.hidden_dropout, weights.training)

    def attention_block(self, x: Tensor, layer: LayerWeights, batch: Packed) -> Tensor:
        """LN(x + W_o·attention(W_qkv·x)): `[T, C]` -> `[T, C]`."""
        query, key, value = self.project_heads(x, layer.attention)
        dropout = self.config.attention_dropout if layer.training else 0.0
        context = self.attention(query, key, value, batch, dropout).flatten(1)
        update = self.linear(context, layer.attention.output)
        update = F.dropout(update, self.config.hidden_dropout, layer.training)
        return self.add_layer_norm(update, x, layer.attention_norm)

    def feed_forward_block(self, x: Tensor, layer: LayerWeights) -> Tensor:
        """LN(x + W_2·gelu(W_1·x)): `[T, C]` -> `[T, C]`."""
        inner = self.gelu(self.linear(x, layer.feed_forward.intermediate))
        update = self.linear(inner, layer.feed_forward.output)
        update = F.dropout(update, self.config.hidden_dropout, layer.training)
        return self.add_layer_norm(update, x, layer.feed_forward_norm)

    def pool(
        self, hidden_states: Sequence[Tensor], batch: Packed, pooling: str, first: int = 0, normalize: bool = False
    ) -> Tensor:
        """Token vectors -> one vector a sequence: `[B, C]`, float32 at least.

        Args:
            hidden_states: the embeddings' output and each layer's, `[T, C]` each.
            batch: where the sequences lie.
            pooling: a name of `minilm.config.POOLINGS`.
            first: which hidden state `avg_first_last` takes as the first.
            normalize: whether to scale each vector to length 1.

        Raises:
            ValueError: an unknown pooling.
        """
        reduce = REDUCTIONS.get(pooling)
        if reduce is None:
            raise ValueError(f"pooling must be one of {', '.join(REDUCTIONS)}; got {pooling!r}")
        x = hidden_states[-1]
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        other = self.second_state(hidden_states, pooling, first)
        if other is not None:
            x = (x + other) / 2
        pooled = x.new_empty(len(batch.lengths), x.shape[1])
        for indices, rows in batch.length_groups:
            pooled[indices] = reduce(x[rows])
        return F.normalize(pooled, dim=-1) if normalize else pooled

    @staticmethod
    def second_state(hidden_states: Sequence[Tensor], pooling: str, first: int) -> Tensor | None:
        """Return the hidden state that `pooling` averages with the last; None if it takes the last alone."""
        if pooling == "avg_top2":
            return hidden_states[-2]
        return hidden_states[first] if pooling == "avg_first_last" else None

    # What the steps are made of.

    def project_heads(self, x: Tensor, weights: AttentionWeights) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of every head: `[T, C]` -> three of `[T, H, D]` (views of one tensor)."""
        heads = self.linear(x, weights.qkv).unflatten(1, (3, self.config.num_heads, self.config.head_size))
        query, key, value = heads.unbind(1)
        return query, key, value

    def attention(self, query: Tensor, key: Tensor, value: Tensor, batch: Packed, dropout: float = 0.0) -> Tensor:
        """softmax(q·kᵀ / √D)·v within each sequence: three of `[T, H, D]` -> `[T, H, D]`."""
        context = torch.empty_like(query, memory_format=torch.contiguous_format)
        for _, rows in batch.length_groups:
            q, k, v = (x[rows].transpose(1, 2) for x in (query, key, value))  # [n, H, L, D]
            context[rows] = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2)
        return context

    def attention_probabilities(self, query: Tensor, key: Tensor, batch: Packed) -> list[Tensor]:
        """softmax(q·kᵀ / √D) of each sequence, in the batch's order: `[H, L, L]` each, rows summing to 1."""
        probabilities: list[Tensor] = [query] * len(batch.lengths)
        for indices, rows in batch.length_groups:
            q, k = (x[rows].transpose(1, 2) for x in (query, key))  # [n, H, L, D]
            scores = q @ k.transpose(2, 3) / self.config.head_size**0.5
            for index, pattern in zip(indices.tolist(), scores.softmax(dim=-1), strict=True):
                probabilities[index] = pattern
        return probabilities

    def linear(self, x: Tensor, weights: nn.Linear) -> Tensor:
        """W·x + b."""
        return F.linear(x, weights.weight, weights.bias)

    def gelu(self, x: Tensor) -> Tensor:
        """x·Φ(x), Φ the normal distribution function: the exact (erf) form."""
        return F.gelu(x)

    def layer_norm(self, x: Tensor, weights: nn.LayerNorm) -> Tensor:
        """(x - mean) / √(variance + eps), scaled and shifted, over the last dimension."""
        return F.layer_norm(x, weights.normalized_shape, weights.weight, weights.bias, weights.eps)

    def add_layer_norm(self, update: Tensor, residual: Tensor, weights: nn.LayerNorm) -> Tensor:
        """LN(update + residual)."""
        return self.layer_norm(update + residual, weights)


STEPS = (
    "embed", "attention_block", "feed_forward_block", "project_heads", "attention", "linear", "gelu", "layer_norm",
    "add_layer_norm",
)  # fmt: skip
REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {  # [n, L, C] -> [n, C]
    "mean": lambda x: x.mean(dim=1),
    "cls": lambda x: x[:, 0],
    "max": lambda x: x.amax(dim=1),
    "mean_sqrt_len": lambda x: x.sum(dim=1) / x.shape[1] ** 0.5,
    "avg_top2": lambda x: x.mean(dim=1),
    "avg_first_last": lambda x: x.mean(dim=1),
}
