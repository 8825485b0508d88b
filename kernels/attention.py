"""Attention within each sequence of a packed batch: out = softmax(q·kᵀ / √D)·v, without a mask.

Source: Dao et al. 2022 (FlashAttention): online softmax over blocks of keys, so scores never leave the chip; 1/√D is
folded into exp2. Products accumulate in float32; exp2(scores) is rounded to the tensors' dtype before it meets v. Also
gives lse = ln Σ exp(q·kᵀ / √D), float32 `[H, T]`, for the gradients (`attention_backward.py`).

Layout: query, key and value `[T, H, D]` with any strides over T and H (views of a packed `[T, 3, H, D]` do), contiguous
over D; `cu_seqlens` int32 `[B + 1]`. T tokens, B sequences, H heads, D head width: 1 to 128, padded to a power of two.

Two ways, for the caller to choose between:
- By sequence (the default): one program a (sequence, head, block of queries); blocks of keys start where the sequence
  does, and block sizes depend on D, dtype and device alone. A sequence's result is the same to the bit whatever else is
  in the batch and wherever it lies. Needs max_seqlen; a short sequence leaves most of its program's tile empty.
- By tiles of tokens (`token_tiles`): one program a (tile of 64 consecutive tokens, head), whichever sequences they are
  of, over the keys from its first sequence's start to its last one's end. Right for every length, made for sequences
  of up to about 64 tokens. The grid depends on T alone, so a CUDA graph over a padded bucket of tokens serves all
  batches that fit. Tokens from cu_seqlens[-1] on belong to no sequence: they get zeros (and lse -inf) and are not read.
  A sequence's summation order depends on where it lies in its tile, so its last bits may differ between batches; and
  an infinity or NaN in its values reaches its neighbours. Where each token's sequence starts and ends is found once
  for all layers, by a binary search of its own launch: within this kernel it would be redone by every head and layer.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilm.kernels.attention_backward import (
    LOG2E,
    Blocks,
    attention_backward,
    by_head,
    columns_together,
    constants,
    head_rows,
    load_rows,
    locate,
    padded_width,
    sequence_rows,
    store_rows,
    strides,
)
from minilm.kernels.launch import Hardware, Launch, cpu_kernel, expect_shapes

TOKENS_A_PROGRAM = 256  # of `bounds_kernel`


def supports(head_size: int) -> str | None:
    """Return why the kernels can't take heads of this width, or None if they can."""
    return None if 1 <= head_size <= 128 else f"attention kernels take heads of 1 to 128 numbers, not {head_size}"


def reference(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, token_tiles: bool  # noqa: ARG001
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return `out` `[T, H, D]` and `lse` `[H, T]` in plain torch; 0 and -inf for tokens of no sequence."""
    tokens, heads, width = query.shape
    out = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.full((heads, tokens), float("-inf"), dtype=torch.float32, device=query.device)
    for rows in sequence_rows(cu_seqlens):
        q, k, v = (by_head(x, rows) for x in (query, key, value))
        scores = q @ k.transpose(1, 2) * width**-0.5
        out[rows] = (scores.softmax(dim=2) @ v).transpose(0, 1).to(out.dtype)
        lse[:, rows] = scores.logsumexp(dim=2).float()
    return out, lse


# The kernels.


@triton.jit
def _attend(
    q, key, value, last, start, end, key_t, value_t, scale, D: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return Σ exp2(s - m)·v `[BLOCK_M, BLOCK_D]`, m = max(s) and Σ exp2(s - m) `[BLOCK_M]` of each query row.

    s = q·kᵀ·scale. Blocks of keys run from 0 up to `last`; each row sees those from `start` to before `end`, which are
    `[BLOCK_M, 1]` or scalars.
    """
    most = tl.full([q.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([q.shape[0]], tl.float32)
    weighted = tl.zeros([q.shape[0], q.shape[1]], tl.float32)
    for block in range(0, last, BLOCK_N):
        keys = block + tl.arange(0, BLOCK_N)
        k = load_rows(key, keys, last, key_t, D, q.shape[1])
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores = tl.where((keys[None, :] >= start) & (keys[None, :] < end), scores, float("-inf"))
        new_most = tl.maximum(most, tl.max(scores, axis=1) * scale)
        base = tl.where(new_most == float("-inf"), 0.0, new_most)  # a row that has seen no key yet
        p = tl.exp2(scores * scale - base[:, None])
        decay = tl.exp2(most - base)
        total = total * decay + tl.sum(p, axis=1)
        v = load_rows(value, keys, last, value_t, D, q.shape[1])
        weighted = tl.dot(p.to(v.dtype), v, weighted * decay[:, None], input_precision=PRECISION)
        most = new_most
    return weighted, most, total


@triton.jit
def _store(weighted, most, total, out, lse, rows, length, out_t, D: tl.constexpr):
    """Store the rows of `out`, and of `lse` if wanted."""
    total = tl.where(total > 0, total, 1.0)  # a token of no sequence
    store_rows(out, weighted / total[:, None], rows, length, out_t, D, weighted.shape[1])
    if lse is not None:
        tl.store(lse + rows, (most + tl.log2(total)) / LOG2E, mask=rows < length)


@triton.jit(do_not_specialize=["num_tokens", "num_blocks"])  # one binary for every batch
def sequence_kernel(
    query, key, value, cu_seqlens, out, lse, query_t, query_h, key_t, key_h, value_t, value_h, out_t, out_h,
    num_tokens, num_blocks, scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """One program has BLOCK_M queries of a (sequence, head)."""
    head, block, start, length = locate(cu_seqlens, num_blocks, H)
    if block * BLOCK_M >= length:
        return
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    q = load_rows(head_rows(query, start, head, query_t, query_h), rows, length, query_t, D, BLOCK_D)
    key = head_rows(key, start, head, key_t, key_h)
    value = head_rows(value, start, head, value_t, value_h)
    weighted, most, total = _attend(
        q, key, value, length, 0, length, key_t, value_t, scale * LOG2E, D, BLOCK_N, PRECISION
    )
    out = head_rows(out, start, head, out_t, out_h)
    if lse is not None:
        lse += head.to(tl.int64) * num_tokens + start
    _store(weighted, most, total, out, lse, rows, length, out_t, D)


@triton.jit(do_not_specialize=["num_tokens"])
def tile_kernel(
    query, key, value, bounds, out, lse, query_t, query_h, key_t, key_h, value_t, value_h, out_t, out_h,
    num_tokens, scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """One program has a head of BLOCK_M consecutive tokens. Rows count from its first sequence's start, `base`."""
    head, tile = tl.program_id(0) % H, tl.program_id(0) // H
    tokens = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    base = tl.load(bounds + tile * BLOCK_M)
    last = tl.load(bounds + num_tokens + tl.minimum(tile * BLOCK_M + BLOCK_M, num_tokens) - 1) - base
    real = tokens < num_tokens
    start = tl.load(bounds + tokens, mask=real, other=0) - base
    end = tl.load(bounds + num_tokens + tokens, mask=real, other=0) - base
    rows, length = tokens - base, num_tokens - base
    q = load_rows(head_rows(query, base, head, query_t, query_h), rows, last, query_t, D, BLOCK_D)
    key = head_rows(key, base, head, key_t, key_h)
    value = head_rows(value, base, head, value_t, value_h)
    weighted, most, total = _attend(
        q, key, value, last, start[:, None], end[:, None], key_t, value_t, scale * LOG2E, D, BLOCK_N, PRECISION
    )
    out = head_rows(out, base, head, out_t, out_h)
    if lse is not None:
        lse += head.to(tl.int64) * num_tokens + base
    _store(weighted, most, total, out, lse, rows, length, out_t, D)


@triton.jit(do_not_specialize=["num_sequences", "num_tokens", "num_steps"])
def bounds_kernel(cu_seqlens, bounds, num_sequences, num_tokens, num_steps, BLOCK_T: tl.constexpr) -> None:
    """Binary search: for each token the last entry of cu_seqlens that is not beyond it, and the entry after that."""
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    below = tl.zeros([BLOCK_T], tl.int32)  # cu_seqlens[below] <= token < cu_seqlens[above]
    above = below + num_sequences + 1
    for _ in range(num_steps):
        middle = (below + above) // 2
        is_below = tl.load(cu_seqlens + middle) <= tokens
        below = tl.where(is_below, middle, below)
        above = tl.where(is_below, above, middle)
    end = tl.load(cu_seqlens + tl.minimum(below + 1, num_sequences))
    tl.store(bounds + tokens, tl.load(cu_seqlens + below), mask=tokens < num_tokens)
    tl.store(bounds + num_tokens + tokens, end, mask=tokens < num_tokens)


# Their launches.


def forward_blocks(width: int, dtype: torch.dtype) -> Blocks:
    """Return how the forward kernels are cut: by nothing that varies between batches."""
    columns = padded_width(width)
    if dtype == torch.float32:  # no tensor cores, operands in registers
        return Blocks(32 if columns <= 64 else 16, 32, 8, 1)
    return Blocks(64, 64, 4 if columns <= 64 else 8, 2)


def sequence_launch(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, out: Tensor,
    lse: Tensor | None = None,
) -> Launch:  # fmt: skip
    """Return the launch that writes `out` and `lse` (None: not wanted), sequence by sequence.

    Args:
        query: `[T, H, D]`; it, key, value and out may have any strides over T and H.
        key: `[T, H, D]`.
        value: `[T, H, D]`.
        cu_seqlens: int32 `[B + 1]`, contiguous. Tokens beyond its last entry are not written.
        max_seqlen: the longest sequence's length, or more.
        out: `[T, H, D]`, written.
        lse: float32 `[H, T]`, contiguous, written.
    """
    blocks = forward_blocks(query.shape[2], query.dtype)
    num_blocks = triton.cdiv(max_seqlen, blocks.queries)
    arguments = {**_arguments(query, key, value, out, lse, blocks), "cu_seqlens": cu_seqlens, "num_blocks": num_blocks}
    grid = ((len(cu_seqlens) - 1) * num_blocks * query.shape[1],)
    return Launch(sequence_kernel, grid, arguments, blocks.num_warps, blocks.num_stages)


def tile_launch(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, out: Tensor,
    lse: Tensor | None = None,
) -> Launch:  # fmt: skip
    """Return the launch that writes `out` and `lse` (None: not wanted), tile by tile.

    Args:
        query: `[T, H, D]`; it, key, value and out may have any strides over T and H.
        key: `[T, H, D]`.
        value: `[T, H, D]`.
        bounds: int32 `[2, T]`, contiguous, as `bounds_launch` writes it; one serves all layers.
        out: `[T, H, D]`, written.
        lse: float32 `[H, T]`, contiguous, written.
    """
    blocks = forward_blocks(query.shape[2], query.dtype)
    arguments = {**_arguments(query, key, value, out, lse, blocks), "bounds": bounds}
    grid = (triton.cdiv(len(query), blocks.queries) * query.shape[1],)
    return Launch(tile_kernel, grid, arguments, blocks.num_warps, blocks.num_stages)


def bounds_launch(cu_seqlens: Tensor, bounds: Tensor) -> Launch:
    """Return the launch that writes where each token's sequence starts and ends, int32 `[2, T]`.

    Both are cu_seqlens[-1] for tokens beyond it. Empty sequences (equal entries of cu_seqlens) may be anywhere.
    """
    num_sequences, num_tokens = len(cu_seqlens) - 1, bounds.shape[1]
    arguments = {
        "cu_seqlens": cu_seqlens, "bounds": bounds, "num_sequences": num_sequences, "num_tokens": num_tokens,
        "num_steps": num_sequences.bit_length(), "BLOCK_T": TOKENS_A_PROGRAM,
    }  # fmt: skip
    return Launch(bounds_kernel, (triton.cdiv(num_tokens, TOKENS_A_PROGRAM),), arguments)


def _arguments(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor | None, blocks: Blocks
) -> dict[str, Any]:
    """Return what both forward kernels take."""
    tensors = {"query": query, "key": key, "value": value, "out": out}
    return {
        **tensors, **strides(**tensors), **constants(query), "lse": lse, "num_tokens": len(query),
        "scale": query.shape[2] ** -0.5, "BLOCK_M": blocks.queries, "BLOCK_N": blocks.keys,
    }  # fmt: skip


def examples(dtype: torch.dtype, _: Hardware) -> dict[str, Launch]:
    """Return the launches to compile ahead of time, for MiniLM's heads of 32 and BERT's of 64, by name."""
    cu_seqlens, bounds, lse = (
        torch.zeros(9, dtype=torch.int32),
        torch.zeros(2, 1000, dtype=torch.int32),
        torch.empty(12, 1000),
    )
    made = {"attention, where tokens belong": bounds_launch(cu_seqlens, bounds)}
    for width in (32, 64):
        query, key, value = torch.empty(1000, 3, 12, width, dtype=dtype).unbind(1)
        out = torch.empty(1000, 12, width, dtype=dtype)
        by_sequence = sequence_launch(query, key, value, cu_seqlens, 512, out, lse)
        made[f"attention by sequence, heads of {width}"] = by_sequence
        made[f"attention by tiles of tokens, heads of {width}"] = tile_launch(query, key, value, bounds, out, lse)
    return made


# The operation.


def token_bounds(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Return where each token's sequence starts and ends, int32 `[2, T]`; `bounds_launch` says more."""
    bounds = torch.empty(2, num_tokens, dtype=torch.int32, device=cu_seqlens.device)
    bounds_launch(cu_seqlens.contiguous(), bounds)()
    return bounds


def launch_forward(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, token_tiles: bool
) -> tuple[Tensor, Tensor]:
    """Do what `reference` does, by the kernels; only with `token_tiles` may there be tokens beyond cu_seqlens[-1]."""
    query, key, value = (columns_together(x) for x in (query, key, value))
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[1], len(query), dtype=torch.float32, device=query.device)
    if token_tiles:
        tile_launch(query, key, value, token_bounds(cu_seqlens, len(query)), out, lse)()
    else:
        sequence_launch(query, key, value, cu_seqlens.contiguous(), max_seqlen, out, lse)()
    return out, lse


@torch.library.custom_op("minilm::attention", mutates_args=(), device_types="cuda")
def _forward(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, token_tiles: bool
) -> tuple[Tensor, Tensor]:
    return launch_forward(query, key, value, cu_seqlens, max_seqlen, token_tiles)


@_forward.register_fake
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse = query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)
    return query.new_empty(query.shape), lse


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, cu_seqlens, ctx.max_seqlen, ctx.token_tiles = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(query, key, value, out, lse, cu_seqlens)


def _differentiate(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradients = attention_backward(d_out, *ctx.saved_tensors, ctx.max_seqlen, ctx.token_tiles)
    return *gradients, None, None, None


_forward.register_kernel("cpu")(cpu_kernel(launch_forward, reference))
_forward.register_autograd(_differentiate, setup_context=_keep)


def attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, token_tiles: bool = False
) -> Tensor:
    """softmax(q·kᵀ / √D)·v within each sequence: `[T, H, D]` -> `[T, H, D]`; differentiable in query, key and value.

    Args:
        query: `[T, H, D]`, float16, bfloat16 or float32, D from 1 to 128.
        key: the same shape and dtype.
        value: the same shape and dtype.
        cu_seqlens: where each sequence starts, then where the last ends: int32 `[B + 1]`, the first 0. The last must be
            T; with `token_tiles` it may be less, and tokens beyond give (and get, in the backward pass) zeros.
        max_seqlen: the longest sequence's length, or more. A lower number leaves results unwritten.
        token_tiles: how the forward pass is cut. False: by sequence, a sequence's result the same to the bit in every
            batch. True: by tiles of tokens, made for sequences of up to about 64 tokens and for CUDA graphs.

    Raises:
        ValueError: shapes or dtypes that don't fit, or a head width that the kernels can't take.
    """
    shapes = {"query": (query, "T H D"), "key": (key, "T H D"), "value": (value, "T H D")}
    expect_shapes("attention", **shapes, cu_seqlens=(cu_seqlens, "N"))
    if not query.dtype == key.dtype == value.dtype or cu_seqlens.dtype != torch.int32:
        dtypes = ", ".join(str(x.dtype) for x in (query, key, value, cu_seqlens))
        raise ValueError(f"attention expected query, key and value of one dtype and cu_seqlens int32; got {dtypes}")
    refusal = supports(query.shape[2])
    if refusal is not None:
        raise ValueError(refusal)
    out: Tensor = _forward(query, key, value, cu_seqlens, max_seqlen, token_tiles)[0]
    return out
