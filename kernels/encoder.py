"""The whole encoder as one operation, for inference: dispatched once, where its layers' operations would be 32 times.

    x = LN(word + token type + position);  then, layer by layer:
    x = LN(x + W_o·attention(W_qkv·x));  x = LN(x + W_2·gelu(W_1·x))

Five launches a layer: query, key and value; attention; output, residual and LayerNorm; W_1 with GELU; W_2, residual and
LayerNorm (two launches where a row is too wide for one: `minilm.kernels.linear_layer_norm.supports`). No gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minilm.kernels import attention, embedding, layer_norm, linear, linear_layer_norm
from minilm.kernels.launch import cpu_kernel, hardware
from minilm.kernels.operands import EncoderWeights

SHORT = 32  # tokens: sequences that fill less than half a tile of the by-sequence kernel


class EmbeddingTensors(NamedTuple):
    """The parameters of the embeddings."""

    word: Tensor
    token_type: Tensor
    position: Tensor
    norm_weight: Tensor
    norm_bias: Tensor


class LayerTensors(NamedTuple):
    """The parameters of one layer."""

    qkv_weight: Tensor
    qkv_bias: Tensor
    output_weight: Tensor
    output_bias: Tensor
    attention_norm_weight: Tensor
    attention_norm_bias: Tensor
    intermediate_weight: Tensor
    intermediate_bias: Tensor
    feed_forward_output_weight: Tensor
    feed_forward_output_bias: Tensor
    feed_forward_norm_weight: Tensor
    feed_forward_norm_bias: Tensor


@dataclass(frozen=True)
class EncoderTensors:
    """An encoder's parameters as one flat list, and the two numbers that their shapes don't tell.

    Attributes:
        weights: the fields of `EmbeddingTensors`, then those of `LayerTensors` for each layer.
        num_heads: H.
        eps: LayerNorm's.
    """

    weights: list[Tensor]
    num_heads: int
    eps: float


def flatten(encoder: EncoderWeights, num_heads: int) -> EncoderTensors:
    """Return the parameters of a model."""
    embeddings = encoder.embeddings
    weights = [embeddings.word.weight, embeddings.token_type.weight, embeddings.position.weight]
    weights += [embeddings.norm.weight, embeddings.norm.bias]
    for layer in encoder.layers:
        attention, feed_forward = layer.attention, layer.feed_forward
        blocks = attention.qkv, attention.output, layer.attention_norm
        for block in (*blocks, feed_forward.intermediate, feed_forward.output, layer.feed_forward_norm):
            weights += [block.weight, block.bias]
    return EncoderTensors(weights, num_heads, embeddings.norm.eps)


def reference(
    ids: Tensor, type_ids: Tensor, positions: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    weights: Sequence[Tensor], num_heads: int, eps: float,
) -> Tensor:  # fmt: skip
    """Return the last hidden state `[T, C]`; in plain torch."""
    tables, layers = unflatten(weights)
    word, token_type, position, norm_weight, norm_bias = tables
    lookup = ids, type_ids, positions, word, token_type, position
    x = embedding.reference(*lookup, norm_weight, norm_bias, eps)[0]
    for w in layers:
        qkv = linear.reference(x, w.qkv_weight, w.qkv_bias, False)
        query, key, value = qkv.unflatten(1, (3, num_heads, -1)).unbind(1)
        context = attention.reference(query, key, value, cu_seqlens, max_seqlen, False)[0].flatten(1)
        update = linear.reference(context, w.output_weight, w.output_bias, False)
        x = layer_norm.reference(update, x, w.attention_norm_weight, w.attention_norm_bias, eps)[0]
        inner = linear.reference(x, w.intermediate_weight, w.intermediate_bias, True)
        update = linear.reference(inner, w.feed_forward_output_weight, w.feed_forward_output_bias, False)
        x = layer_norm.reference(update, x, w.feed_forward_norm_weight, w.feed_forward_norm_bias, eps)[0]
    return x


def launch(
    ids: Tensor, type_ids: Tensor, positions: Tensor, cu_seqlens: Tensor, max_seqlen: int | None,
    weights: Sequence[Tensor], num_heads: int, eps: float,
) -> Tensor:  # fmt: skip
    """Do what `reference` does, by the kernels.

    Attention goes by tiles of tokens where all sequences are short, and where `max_seqlen` is None: then no launch
    depends on the sequences' lengths, nor on whether they cover all tokens, as a CUDA graph wants it; rows of tokens
    beyond `cu_seqlens[-1]` are finite and mean nothing.
    """
    bounds = None
    if max_seqlen is None or max_seqlen <= SHORT:
        bounds = attention.token_bounds(cu_seqlens, len(ids))
    tables, layers = unflatten(weights)
    word, token_type, position, norm_weight, norm_bias = tables
    lookup = ids, type_ids, positions, word, token_type, position
    x = embedding.launch_forward(*lookup, norm_weight, norm_bias, eps)[0]
    for w in layers:
        qkv = linear.launch_forward(x, w.qkv_weight, w.qkv_bias, False)
        query, key, value = qkv.unflatten(1, (3, num_heads, -1)).unbind(1)
        context = torch.empty_like(x).unflatten(1, (num_heads, -1))
        if bounds is not None:
            attention.tile_launch(query, key, value, bounds, context)()
        elif max_seqlen is not None:
            attention.sequence_launch(query, key, value, cu_seqlens, max_seqlen, context)()
        norm = w.attention_norm_weight, w.attention_norm_bias
        x = _project_add_norm(context.flatten(1), w.output_weight, w.output_bias, x, *norm, eps)
        inner = linear.launch_forward(x, w.intermediate_weight, w.intermediate_bias, True)
        norm = w.feed_forward_norm_weight, w.feed_forward_norm_bias
        x = _project_add_norm(inner, w.feed_forward_output_weight, w.feed_forward_output_bias, x, *norm, eps)
    return x


def unflatten(weights: Sequence[Tensor]) -> tuple[EmbeddingTensors, list[LayerTensors]]:
    """Give the tensors of `EncoderTensors.weights` their names again."""
    first, step = len(EmbeddingTensors._fields), len(LayerTensors._fields)
    layers = [LayerTensors(*weights[start : start + step]) for start in range(first, len(weights), step)]
    return EmbeddingTensors(*weights[:first]), layers


def _project_add_norm(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> Tensor:
    """LN(residual + W·x + b), by one kernel or two."""
    width, depth = weight.shape
    if linear_layer_norm.supports(depth, width, x.dtype, hardware(x.device)) is None:
        return linear_layer_norm.launch_forward(x, weight, bias, residual, norm_weight, norm_bias, eps)[0]
    update = linear.launch_forward(x, weight, bias, False)
    return layer_norm.launch_forward(update, residual, norm_weight, norm_bias, eps)[0]


@torch.library.custom_op("minilm::encoder", mutates_args=(), device_types="cuda")
def _encode(
    ids: Tensor, type_ids: Tensor, positions: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    weights: Sequence[Tensor], num_heads: int, eps: float,
) -> Tensor:  # fmt: skip
    return launch(ids, type_ids, positions, cu_seqlens, max_seqlen, weights, num_heads, eps)


@_encode.register_fake
def _(ids: Tensor, *operands: Any) -> Tensor:
    word: Tensor = operands[4][0]
    return word.new_empty(ids.shape[0], word.shape[1])


_encode.register_kernel("cpu")(cpu_kernel(launch, reference))


def encode(
    ids: Tensor, type_ids: Tensor, positions: Tensor, cu_seqlens: Tensor, max_seqlen: int, tensors: EncoderTensors
) -> Tensor:
    """Return the last hidden state of packed tokens, `[T, C]`; not differentiable.

    Args:
        ids: word ids, int64 `[T]`.
        type_ids: token types, int64 `[T]`.
        positions: int64 `[T]`.
        cu_seqlens: where each sequence starts, then T: int32 `[B + 1]`.
        max_seqlen: the longest sequence's token count.
        tensors: the parameters, all of one dtype.
    """
    out: Tensor = _encode(
        ids, type_ids, positions, cu_seqlens, max_seqlen, tensors.weights, tensors.num_heads, tensors.eps
    )
    return out
