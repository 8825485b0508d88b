"""Gradients of attention over packed sequences; `attention.py` has the forward pass.

With s = q·kᵀ/√D, p = softmax(s), out = p·v for each sequence and head, and ⊙ entry by entry:
    d_v = pᵀ·d_out,  d_p = d_out·vᵀ,  d_s = p ⊙ (d_p - delta),  d_q = d_s·k/√D,  d_k = d_sᵀ·q/√D
    where delta = Σ_keys p ⊙ d_p, which is Σ_columns d_out ⊙ out

Source: Dao et al. 2022 (FlashAttention), Dao 2023 (FlashAttention-2). No atomics: every gradient is written once, by
one program, and is the same to the bit every time. Block sizes follow the batch's longest sequence, so it may differ in
the last bits between batches.

Two ways, by `max_seqlen`:
- Up to 128 in half precision (64 where registers would spill): one program a (sequence, head). All keys of a row are in
  one tile, so the softmax is made anew and neither `out` nor `lse` is read.
- Beyond, and in float32: `query_kernel` (d_q; also delta and a normalizer, for the next kernel), then `key_kernel` (d_k
  and d_v). p is exp(s - lse). lse is float32: at logits of 1e4 its rounding is 5e-4 of p. That error is one factor a
  row, which `query_kernel` finds (p summed along the row must be 1) and both divide away.

T tokens, H heads, D head width (at most 128; padded to a power of two). Products accumulate in float32; p and d_s are
rounded to the tensors' dtype before they are multiplied.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilm.kernels.launch import KIB, Hardware, Launch, block_size, cpu_kernel, dot_precision, hardware

LOG2E = tl.constexpr(1.4426950408889634)


def sequence_rows(cu_seqlens: Tensor) -> list[slice]:
    """Return where each sequence lies."""
    return [slice(start, end) for start, end in itertools.pairwise(cu_seqlens.tolist())]


def by_head(x: Tensor, rows: slice) -> Tensor:
    """Return one sequence of `[T, H, D]` as `[H, L, D]`, in float32 or better."""
    return x[rows].transpose(0, 1).to(torch.promote_types(x.dtype, torch.float32))


def reference(
    d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,  # noqa: ARG001
    cu_seqlens: Tensor, max_seqlen: int, token_tiles: bool,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of query, key and value `[T, H, D]` in plain torch; 0 for tokens of no sequence."""
    d_query, d_key, d_value = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    for rows in sequence_rows(cu_seqlens):
        d_o, q, k, v = (by_head(x, rows) for x in (d_out, query, key, value))
        scale = q.shape[2] ** -0.5
        p = (q @ k.transpose(1, 2) * scale).softmax(dim=2)
        d_p = d_o @ v.transpose(1, 2)
        d_s = p * (d_p - (p * d_p).sum(dim=2, keepdim=True)) * scale
        d_query[rows] = (d_s @ k).transpose(0, 1).to(d_query.dtype)
        d_key[rows] = (d_s.transpose(1, 2) @ q).transpose(0, 1).to(d_key.dtype)
        d_value[rows] = (p.transpose(1, 2) @ d_o).transpose(0, 1).to(d_value.dtype)
    return d_query, d_key, d_value


# The kernels. A program's pointers are moved to its head and its sequence's first row; rows count from there.


@triton.jit
def locate(cu_seqlens, num_blocks, H: tl.constexpr) -> Any:
    """Return which head, and which block of which sequence (its start and length), this program has."""
    head, rest = tl.program_id(0) % H, tl.program_id(0) // H
    sequence = rest // num_blocks
    start = tl.load(cu_seqlens + sequence)
    return head, rest % num_blocks, start, tl.load(cu_seqlens + sequence + 1) - start


@triton.jit
def head_rows(x, row, head, row_stride, head_stride) -> Any:
    """Return the pointer to one head's columns in a row of `[T, H, D]`."""
    return x + row.to(tl.int64) * row_stride + head.to(tl.int64) * head_stride


@triton.jit
def load_rows(x, rows, length, stride, D: tl.constexpr, BLOCK_D: tl.constexpr) -> Any:
    """Load rows of a `[length, D]` matrix as `[rows, BLOCK_D]`, with zeros around it."""
    columns = tl.arange(0, BLOCK_D)
    mask = (rows < length)[:, None] & (columns < D)[None, :]
    return tl.load(x + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(x, values, rows, length, stride, D: tl.constexpr, BLOCK_D: tl.constexpr) -> None:
    """Store what of `values` `[rows, BLOCK_D]` lies within the `[length, D]` matrix."""
    columns = tl.arange(0, BLOCK_D)
    mask = (rows < length)[:, None] & (columns < D)[None, :]
    tl.store(x + rows[:, None] * stride + columns[None, :], values.to(x.dtype.element_ty), mask=mask)


@triton.jit
def single_kernel(
    d_out, query, key, value, cu_seqlens, d_query, d_key, d_value,
    d_out_t, d_out_h, query_t, query_h, key_t, key_h, value_t, value_h,
    d_query_t, d_query_h, d_key_t, d_key_h, d_value_t, d_value_h, scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """One program has all of a (sequence, head): BLOCK holds its queries and its keys."""
    head, _, start, length = locate(cu_seqlens, 1, H)
    if length == 0:
        return
    rows = tl.arange(0, BLOCK)
    q = load_rows(head_rows(query, start, head, query_t, query_h), rows, length, query_t, D, BLOCK_D)
    k = load_rows(head_rows(key, start, head, key_t, key_h), rows, length, key_t, D, BLOCK_D)
    v = load_rows(head_rows(value, start, head, value_t, value_h), rows, length, value_t, D, BLOCK_D)
    d_o = load_rows(head_rows(d_out, start, head, d_out_t, d_out_h), rows, length, d_out_t, D, BLOCK_D)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
    scores = tl.where((rows < length)[None, :], scores, float("-inf"))
    p = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
    p *= (1.0 / tl.sum(p, axis=1))[:, None]
    d_v = tl.dot(tl.trans(p.to(d_o.dtype)), d_o, input_precision=PRECISION)  # d_o is 0 beyond the sequence
    d_value = head_rows(d_value, start, head, d_value_t, d_value_h)
    store_rows(d_value, d_v, rows, length, d_value_t, D, BLOCK_D)
    d_p = tl.dot(d_o, tl.trans(v), input_precision=PRECISION)
    d_s = (p * (d_p - tl.sum(p * d_p, axis=1)[:, None])).to(q.dtype)
    d_q = tl.dot(d_s, k, input_precision=PRECISION) * scale
    d_query = head_rows(d_query, start, head, d_query_t, d_query_h)
    store_rows(d_query, d_q, rows, length, d_query_t, D, BLOCK_D)
    d_k = tl.dot(tl.trans(d_s), q, input_precision=PRECISION) * scale
    d_key = head_rows(d_key, start, head, d_key_t, d_key_h)
    store_rows(d_key, d_k, rows, length, d_key_t, D, BLOCK_D)


@triton.jit(do_not_specialize=["num_tokens", "num_blocks"])
def query_kernel(
    d_out, query, key, value, out, lse, cu_seqlens, d_query, delta, normalizer,
    d_out_t, d_out_h, query_t, query_h, key_t, key_h, value_t, value_h, out_t, out_h, d_query_t, d_query_h,
    num_tokens, num_blocks, scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """One program has BLOCK_M queries of a (sequence, head): d_q, delta, and 1 / (the row's sum of exp(s - lse))."""
    head, block, start, length = locate(cu_seqlens, num_blocks, H)
    if block * BLOCK_M >= length:
        return
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    statistics = head.to(tl.int64) * num_tokens + start
    key = head_rows(key, start, head, key_t, key_h)
    value = head_rows(value, start, head, value_t, value_h)
    q = load_rows(head_rows(query, start, head, query_t, query_h), rows, length, query_t, D, BLOCK_D)
    d_o = load_rows(head_rows(d_out, start, head, d_out_t, d_out_h), rows, length, d_out_t, D, BLOCK_D)
    o = load_rows(head_rows(out, start, head, out_t, out_h), rows, length, out_t, D, BLOCK_D)
    row_delta = tl.sum(o.to(tl.float32) * d_o.to(tl.float32), axis=1)
    row_lse = tl.load(lse + statistics + rows, mask=rows < length, other=0.0) * LOG2E
    total = tl.zeros([BLOCK_M], tl.float32)
    d_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(0, length, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        k = load_rows(key, keys, length, key_t, D, BLOCK_D)
        v = load_rows(value, keys, length, value_t, D, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        scores = tl.where((keys < length)[None, :], scores, float("-inf"))
        p = tl.exp2(scores - row_lse[:, None])
        total += tl.sum(p, axis=1)
        d_p = tl.dot(d_o, tl.trans(v), input_precision=PRECISION)
        d_s = (p * (d_p - row_delta[:, None])).to(k.dtype)
        d_q = tl.dot(d_s, k, d_q, input_precision=PRECISION)
    d_query = head_rows(d_query, start, head, d_query_t, d_query_h)
    store_rows(d_query, d_q * (scale / total)[:, None], rows, length, d_query_t, D, BLOCK_D)
    tl.store(delta + statistics + rows, row_delta, mask=rows < length)
    tl.store(normalizer + statistics + rows, 1.0 / total, mask=rows < length)


@triton.jit(do_not_specialize=["num_tokens", "num_blocks"])
def key_kernel(
    d_out, query, key, value, lse, cu_seqlens, d_key, d_value, delta, normalizer,
    d_out_t, d_out_h, query_t, query_h, key_t, key_h, value_t, value_h, d_key_t, d_key_h, d_value_t, d_value_h,
    num_tokens, num_blocks, scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """One program has BLOCK_N keys of a (sequence, head). Its tiles are transposed, keys down, queries across."""
    head, block, start, length = locate(cu_seqlens, num_blocks, H)
    if block * BLOCK_N >= length:
        return
    keys = block * BLOCK_N + tl.arange(0, BLOCK_N)
    statistics = head.to(tl.int64) * num_tokens + start
    d_out = head_rows(d_out, start, head, d_out_t, d_out_h)
    query = head_rows(query, start, head, query_t, query_h)
    k = load_rows(head_rows(key, start, head, key_t, key_h), keys, length, key_t, D, BLOCK_D)
    v = load_rows(head_rows(value, start, head, value_t, value_h), keys, length, value_t, D, BLOCK_D)
    d_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    d_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first in range(0, length, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        real = rows < length
        q = load_rows(query, rows, length, query_t, D, BLOCK_D)
        d_o = load_rows(d_out, rows, length, d_out_t, D, BLOCK_D)  # 0 beyond the sequence
        row_lse = tl.load(lse + statistics + rows, mask=real, other=0.0) * LOG2E
        row_delta = tl.load(delta + statistics + rows, mask=real, other=0.0)
        row_normalizer = tl.load(normalizer + statistics + rows, mask=real, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)  # [BLOCK_N, BLOCK_M]
        scores = tl.where((keys < length)[:, None], scores, float("-inf"))
        p = tl.exp2(scores - row_lse[None, :]) * row_normalizer[None, :]
        d_v = tl.dot(p.to(d_o.dtype), d_o, d_v, input_precision=PRECISION)
        d_p = tl.dot(v, tl.trans(d_o), input_precision=PRECISION)
        d_s = (p * (d_p - row_delta[None, :])).to(q.dtype)
        d_k = tl.dot(d_s, q, d_k, input_precision=PRECISION)
    d_key = head_rows(d_key, start, head, d_key_t, d_key_h)
    d_value = head_rows(d_value, start, head, d_value_t, d_value_h)
    store_rows(d_key, d_k * scale, keys, length, d_key_t, D, BLOCK_D)
    store_rows(d_value, d_v, keys, length, d_value_t, D, BLOCK_D)


# Their launches.


@dataclass(frozen=True)
class Blocks:
    """How a kernel is cut up.

    Attributes:
        queries: BLOCK_M.
        keys: BLOCK_N.
        num_warps: warps a program.
        num_stages: depth of software pipelining.
    """

    queries: int
    keys: int
    num_warps: int
    num_stages: int


def padded_width(width: int) -> int:
    """Return BLOCK_D for heads of `width`: `tl.dot` wants a power of two from 16."""
    return max(16, block_size(width))


def single_block(width: int, max_seqlen: int, dtype: torch.dtype, limits: Hardware) -> int | None:
    """Return the BLOCK of `single_kernel` for sequences of up to `max_seqlen`; None where the two kernels take over."""
    block, columns = max(16, block_size(max_seqlen)), padded_width(width)
    # Hopper multiplies out of shared memory, which leaves registers free; elsewhere masks for an odd width take them.
    takes_128 = columns <= 64 if limits.shared_memory > 200 * KIB else width in (16, 32)
    return block if block <= (128 if takes_128 else 64) and dtype != torch.float32 else None


def long_blocks(width: int, dtype: torch.dtype, limits: Hardware) -> Blocks:
    """Return how `query_kernel` and `key_kernel` are cut: the largest tiles that compile without spills."""
    columns, is_amd = padded_width(width), not limits.architecture.startswith("sm_")
    if dtype == torch.float32:  # no tensor cores, operands in registers
        return Blocks(32, 32, 4, 1) if columns <= 32 or is_amd else Blocks(16, 32, 8, 1)
    if columns <= 32:
        return Blocks(64, 64, 4, 2)
    if is_amd:
        return Blocks(32, 64, 4, 1)
    if columns <= 64:
        return Blocks(64 if limits.shared_memory > 200 * KIB else 32, 64, 4, 2)
    return Blocks(64, 64, 8, 2)


def strides(**tensors: Tensor) -> dict[str, int]:
    """Return the arguments `name_t` and `name_h`: how far apart rows, and heads, of `[T, H, D]` are."""
    made = {}
    for name, x in tensors.items():
        made[f"{name}_t"], made[f"{name}_h"], columns_apart = x.stride()
        if columns_apart != 1 and x.shape[2] > 1:
            raise ValueError(f"{name} must be contiguous in its last dimension; got strides {x.stride()}")
    return made


def columns_together(x: Tensor) -> Tensor:
    """Return `x`, copied if its last dimension is not contiguous."""
    return x if x.stride(2) == 1 else x.contiguous()


def constants(query: Tensor) -> dict[str, int | str]:
    """Return the compile-time arguments that all attention kernels share."""
    _, heads, width = query.shape
    return {"H": heads, "D": width, "BLOCK_D": padded_width(width), "PRECISION": dot_precision(query.dtype)}


def backward_launches(
    d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens: Tensor, max_seqlen: int, d_query: Tensor, d_key: Tensor, d_value: Tensor,
    limits: Hardware | None = None,
) -> list[Launch]:  # fmt: skip
    """Return the launches, in order, that write `d_query`, `d_key` and `d_value`.

    Args:
        d_out: the gradient of the output `[T, H, D]`; it and all other `[T, H, D]` may have any strides over T and H.
        query: `[T, H, D]`.
        key: `[T, H, D]`.
        value: `[T, H, D]`.
        out: what the forward pass returned.
        lse: what the forward pass returned, float32 `[H, T]`, contiguous.
        cu_seqlens: int32 `[B + 1]`, contiguous. Tokens beyond its last entry are not written.
        max_seqlen: the longest sequence's length, or more.
        d_query: `[T, H, D]`, written.
        d_key: `[T, H, D]`, written.
        d_value: `[T, H, D]`, written.
        limits: what to choose block sizes for; by default the tensors' device.
    """
    tokens, heads, width = query.shape
    sequences, limits = len(cu_seqlens) - 1, limits or hardware(query.device)
    inputs = {"d_out": d_out, "query": query, "key": key, "value": value}
    common = {**inputs, **strides(**inputs), "cu_seqlens": cu_seqlens, "scale": width**-0.5, **constants(query)}
    block = single_block(width, max_seqlen, query.dtype, limits)
    if block is not None:
        outputs = {"d_query": d_query, "d_key": d_key, "d_value": d_value}
        num_warps = {16: 2, 32: 4, 64: 4 if width <= 64 else 8, 128: 8}[block]
        arguments = {**common, **outputs, **strides(**outputs), "BLOCK": block}
        return [Launch(single_kernel, (sequences * heads,), arguments, num_warps)]
    blocks = long_blocks(width, query.dtype, limits)
    delta, normalizer = torch.empty(2, heads, tokens, dtype=torch.float32, device=query.device)
    common |= {"lse": lse, "delta": delta, "normalizer": normalizer, "num_tokens": tokens}
    common |= {"BLOCK_M": blocks.queries, "BLOCK_N": blocks.keys}
    launches = []
    for kernel, rows, only in (
        (query_kernel, blocks.queries, {"out": out, "d_query": d_query}),
        (key_kernel, blocks.keys, {"d_key": d_key, "d_value": d_value}),
    ):
        num_blocks = triton.cdiv(max_seqlen, rows)
        arguments = {**common, **only, **strides(**only), "num_blocks": num_blocks}
        grid = (sequences * num_blocks * heads,)
        launches.append(Launch(kernel, grid, arguments, blocks.num_warps, blocks.num_stages))
    return launches


def examples(dtype: torch.dtype, limits: Hardware) -> dict[str, Launch]:
    """Return the launches to compile ahead of time, for MiniLM's heads of 32 and BERT's of 64, by name."""
    made = {}
    for width in (32, 64):
        x, lse = torch.empty(1000, 12, width, dtype=dtype), torch.empty(12, 1000)
        cu_seqlens = torch.zeros(9, dtype=torch.int32)
        for max_seqlen in (32, 64, 128, 512):
            if max_seqlen < 512 and single_block(width, max_seqlen, dtype, limits) is None:
                continue
            launches = backward_launches(x, x, x, x, x, lse, cu_seqlens, max_seqlen, x, x, x, limits)
            for launch, of in zip(launches, ("",) if len(launches) == 1 else (" of queries", " of keys"), strict=True):
                made[f"attention backward{of}, heads of {width}, up to {max_seqlen} tokens"] = launch
    return made


# The operation.


def launch_backward(
    d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens: Tensor, max_seqlen: int, token_tiles: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Do what `reference` does, by the kernels; only with `token_tiles` may there be tokens beyond cu_seqlens[-1]."""
    d_out, query, key, value, out = (columns_together(x) for x in (d_out, query, key, value, out))
    lse, cu_seqlens = lse.contiguous(), cu_seqlens.contiguous()
    allocate = torch.zeros if token_tiles else torch.empty
    d_query, d_key, d_value = (allocate(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    for launch in backward_launches(
        d_out, query, key, value, out, lse, cu_seqlens, max_seqlen, d_query, d_key, d_value
    ):
        launch()
    return d_query, d_key, d_value


@torch.library.custom_op("minilm::attention_backward", mutates_args=(), device_types="cuda")
def attention_backward(
    d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens: Tensor, max_seqlen: int, token_tiles: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of query, key and value, `[T, H, D]` each."""
    return launch_backward(d_out, query, key, value, out, lse, cu_seqlens, max_seqlen, token_tiles)


@attention_backward.register_fake
def _(_: Tensor, query: Tensor, key: Tensor, value: Tensor, *__: Any) -> tuple[Tensor, ...]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


attention_backward.register_kernel("cpu")(cpu_kernel(launch_backward, reference))
