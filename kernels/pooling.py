"""Pooling of packed token vectors into one vector a sequence, L2-normalised in the same pass if asked.

For a sequence of L tokens x_1 … x_L, column by column:
    mean = Σx / L;  mean_sqrt_len = Σx / √L;  cls = x_1;  max = max x;  normalized: pooled / max(‖pooled‖, 1e-12)
With a second tensor, x stands for (x + x2) / 2: "avg_top2" and "avg_first_last" are its mean.

Backward, from d_pooled = (d_out - out·(out·d_out)) / ‖pooled‖ (below the clamp, d_out / 1e-12; d_out itself where
nothing is normalised): each token's share of it, 1/L, 1/√L, 1 for the first token, or 1/ties for each of the equal
maxima of a column, as `torch.amax` shares it; half of that to x and to x2.

Source: Reimers and Gurevych 2019 (pooling); torch.nn.functional.normalize. Arithmetic and output are float32 whatever
x is. One program a sequence adds up its tokens in an order set by its length, the width and the dtype alone: a
sequence's vector is the same to the bit in any batch, every time, and so is its gradient. The grid is B programs
whatever the lengths are, so a CUDA graph holds for any lengths. A sequence without tokens gives zeros. cu_seqlens runs
from 0 to T: the gradient of a token beyond it is not written.

B sequences, T tokens, C columns.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilm.kernels.launch import Hardware, Launch, block_size, cpu_kernel, expect_shapes

POOLINGS = ("mean", "cls", "max", "mean_sqrt_len")
EPS = 1e-12  # the smallest length that a vector is divided by, as in torch.nn.functional.normalize


def reference(x: Tensor, cu_seqlens: Tensor, pooling: str, normalize: bool, x2: Tensor | None) -> tuple[Tensor, Tensor]:
    """Each sequence's vector `[B, C]` and its length before any normalisation `[B]`, in plain torch, float32."""
    x = _average(x, x2)
    bounds = cu_seqlens.tolist()
    pooled = x.new_zeros(len(bounds) - 1, x.shape[1])
    for index, (start, end) in enumerate(pairwise(bounds)):
        if start < end:
            rows = x[start:end]
            pooled[index] = rows.amax(0) if pooling == "max" else (rows * _shares(rows, pooling)).sum(0)
    norm = torch.linalg.vector_norm(pooled, dim=1)
    return (pooled / norm.clamp(min=EPS)[:, None] if normalize else pooled), norm


def _average(x: Tensor, x2: Tensor | None) -> Tensor:
    """Return x, or (x + x2) / 2, in float32."""
    return x.float() if x2 is None else (x.float() + x2.float()) / 2


def _shares(rows: Tensor, pooling: str) -> Tensor:
    """Return how much each of a sequence's tokens counts in its vector: `[L, C]` -> `[L, 1]` or, for max, `[L, C]`."""
    length = len(rows)
    if pooling == "max":
        maximal = rows == rows.amax(0)
        return maximal.float() / maximal.sum(0)
    if pooling == "cls":
        return (torch.arange(length, device=rows.device) == 0).float()[:, None]
    return rows.new_full((length, 1), 1 / (length if pooling == "mean" else length**0.5))


# The kernels.


@triton.jit
def _load_average(x, x2, offsets, mask):
    """Load x, or (x + x2) / 2, in float32."""
    values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    if x2 is not None:
        values = (values + tl.load(x2 + offsets, mask=mask, other=0.0).to(tl.float32)) * 0.5
    return values


@triton.jit
def _divisor(length, POOLING: tl.constexpr):
    """What the sum of a sequence's tokens is divided by; 1 for a sequence without any."""
    count = tl.maximum(length, 1).to(tl.float32)
    if POOLING == "mean":
        divisor = count
    elif POOLING == "mean_sqrt_len":
        divisor = tl.sqrt_rn(count)
    else:
        divisor = count * 0.0 + 1.0
    return divisor


@triton.jit
def forward_kernel(
    x, x2, cu_seqlens, out, norm,
    C: tl.constexpr, EPS: tl.constexpr, POOLING: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
) -> None:  # fmt: skip
    """One program pools one sequence, BLOCK_T tokens at a time; what it adds up stays apart in BLOCK_T rows."""
    sequence = tl.program_id(0)
    start, end = tl.load(cu_seqlens + sequence), tl.load(cu_seqlens + sequence + 1)
    last = tl.minimum(start + 1, end) if POOLING == "cls" else end
    nothing: tl.constexpr = float("-inf") if POOLING == "max" else 0.0
    columns = tl.arange(0, BLOCK_C)
    real_column = columns < C
    gathered = tl.full([BLOCK_T, BLOCK_C], nothing, tl.float32)
    for first in range(start, last, BLOCK_T):
        rows = first + tl.arange(0, BLOCK_T)
        offsets = rows.to(tl.int64)[:, None] * C + columns[None, :]  # [BLOCK_T, BLOCK_C]
        mask = (rows < last)[:, None] & real_column[None, :]
        values = tl.where(mask, _load_average(x, x2, offsets, mask), nothing)
        if POOLING == "max":
            gathered = tl.maximum(gathered, values, propagate_nan=tl.PropagateNan.ALL)
        else:
            gathered += values
    if POOLING == "max":
        broken = tl.max((gathered != gathered).to(tl.int32), axis=0) > 0  # tl.max passes over NaN
        pooled = tl.where(broken, float("nan"), tl.max(gathered, axis=0))
        pooled = tl.where(real_column & (start < end), pooled, 0.0)
    else:
        pooled = tl.sum(gathered, axis=0) / _divisor(end - start, POOLING)
    length = tl.sqrt_rn(tl.sum(pooled * pooled, axis=0))
    tl.store(norm + sequence, length)
    if NORMALIZE:
        pooled = pooled / tl.maximum(length, EPS)
    tl.store(out + sequence.to(tl.int64) * C + columns, pooled, mask=real_column)


@triton.jit
def _maximum_and_ties(
    x, x2, start, end, columns, real_column, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr
):
    """A sequence's largest entry in each column, and in how many tokens it stands."""
    largest = tl.full([BLOCK_T, BLOCK_C], float("-inf"), tl.float32)
    count = tl.zeros([BLOCK_T, BLOCK_C], tl.int32)
    for first in range(start, end, BLOCK_T):
        rows = first + tl.arange(0, BLOCK_T)
        offsets = rows.to(tl.int64)[:, None] * C + columns[None, :]  # [BLOCK_T, BLOCK_C]
        mask = (rows < end)[:, None] & real_column[None, :]
        values = tl.where(mask, _load_average(x, x2, offsets, mask), float("-inf"))
        count = tl.where(values > largest, 0, count) + (mask & (values >= largest)).to(tl.int32)
        largest = tl.maximum(largest, values)
    maximum = tl.max(largest, axis=0)
    ties = tl.sum(tl.where(largest == maximum[None, :], count, 0), axis=0)
    return maximum, ties


@triton.jit
def backward_kernel(
    d_out, x, x2, cu_seqlens, out, norm, d_x,
    C: tl.constexpr, EPS: tl.constexpr, LARGEST: tl.constexpr, POOLING: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
) -> None:  # fmt: skip
    """One program gives the tokens of one sequence their shares."""
    sequence = tl.program_id(0)
    start, end = tl.load(cu_seqlens + sequence), tl.load(cu_seqlens + sequence + 1)
    columns = tl.arange(0, BLOCK_C)
    real_column = columns < C
    vector = sequence.to(tl.int64) * C + columns
    share = tl.load(d_out + vector, mask=real_column, other=0.0)
    if NORMALIZE:
        unit = tl.load(out + vector, mask=real_column, other=0.0)
        length = tl.load(norm + sequence)
        along = tl.where(length < EPS, 0.0, tl.sum(share * unit, axis=0))
        share = (share - unit * along) / tl.maximum(length, EPS)
        finite = tl.clamp(share, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
        share = tl.where(length < EPS, finite, share)
    share = share / _divisor(end - start, POOLING)
    if x2 is not None:
        share *= 0.5
    if POOLING == "max":
        maximum, ties = _maximum_and_ties(x, x2, start, end, columns, real_column, C, BLOCK_C, BLOCK_T)
        share = share / tl.maximum(ties, 1).to(tl.float32)
    for first in range(start, end, BLOCK_T):
        rows = first + tl.arange(0, BLOCK_T)
        offsets = rows.to(tl.int64)[:, None] * C + columns[None, :]  # [BLOCK_T, BLOCK_C]
        mask = (rows < end)[:, None] & real_column[None, :]
        gradient = tl.broadcast_to(share[None, :], [BLOCK_T, BLOCK_C])
        if POOLING == "max":
            gradient = tl.where(_load_average(x, x2, offsets, mask) == maximum[None, :], gradient, 0.0)
        if POOLING == "cls":
            gradient = tl.where((rows == start)[:, None], gradient, 0.0)
        tl.store(d_x + offsets, gradient.to(d_x.dtype.element_ty), mask=mask)


# Their launches.


def _tokens_at_once(x: Tensor, x2: Tensor | None, budget: int) -> int:
    """Return how many tokens a program loads together: about `budget` bytes, and 32 at most."""
    bytes_a_token = block_size(x.shape[1]) * x.element_size() * (1 if x2 is None else 2)
    return min(32, max(1, budget // bytes_a_token))


def forward_launch(
    x: Tensor, x2: Tensor | None, cu_seqlens: Tensor, pooling: str, normalize: bool, out: Tensor, norm: Tensor
) -> Launch:
    """Return the launch that writes `out` and `norm`."""
    arguments = {
        "x": x, "x2": x2, "cu_seqlens": cu_seqlens, "out": out, "norm": norm,
        "C": x.shape[1], "EPS": EPS, "POOLING": pooling, "NORMALIZE": normalize, "BLOCK_C": block_size(x.shape[1]),
        "BLOCK_T": 1 if pooling == "cls" else _tokens_at_once(x, x2, budget=16384),
    }  # fmt: skip
    return Launch(forward_kernel, (len(out),), arguments)


def backward_launch(
    d_out: Tensor, x: Tensor, x2: Tensor | None, cu_seqlens: Tensor, out: Tensor, norm: Tensor,
    pooling: str, normalize: bool, d_x: Tensor,
) -> Launch:  # fmt: skip
    """Return the launch that writes `d_x`, the gradient of x and of x2 alike."""
    arguments = {
        "d_out": d_out, "x": x, "x2": x2, "cu_seqlens": cu_seqlens, "out": out, "norm": norm, "d_x": d_x,
        "C": x.shape[1], "EPS": EPS, "LARGEST": torch.finfo(x.dtype).max, "POOLING": pooling, "NORMALIZE": normalize,
        "BLOCK_C": block_size(x.shape[1]), "BLOCK_T": _tokens_at_once(x, x2, budget=8192),
    }  # fmt: skip
    return Launch(backward_kernel, (len(out),), arguments)


def examples(dtype: torch.dtype, _: Hardware) -> dict[str, Launch]:
    """Return the launches to compile ahead of time, at MiniLM's width, by name."""
    x, bounds = torch.empty(128, 384, dtype=dtype), torch.empty(9, dtype=torch.int32)
    out, norm = torch.empty(8, 384), torch.empty(8)
    launches = {}
    for name, pooling, x2 in [*((name, name, None) for name in POOLINGS), ("mean of two", "mean", x)]:
        launches[f"pool {name} + L2"] = forward_launch(x, x2, bounds, pooling, True, out, norm)
        backward = backward_launch(out, x, x2, bounds, out, norm, pooling, True, x)
        launches[f"pool {name} + L2, backward"] = backward
    return launches


# The operation.


def launch_forward(
    x: Tensor, cu_seqlens: Tensor, pooling: str, normalize: bool, x2: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Do what `reference` does, by the kernel."""
    x, x2, cu_seqlens = x.contiguous(), None if x2 is None else x2.contiguous(), cu_seqlens.contiguous()
    num_sequences = len(cu_seqlens) - 1
    out = torch.empty(num_sequences, x.shape[1], dtype=torch.float32, device=x.device)
    norm = torch.empty(num_sequences, dtype=torch.float32, device=x.device)
    forward_launch(x, x2, cu_seqlens, pooling, normalize, out, norm)()
    return out, norm


def launch_backward(
    d_out: Tensor, x: Tensor, x2: Tensor | None, cu_seqlens: Tensor, out: Tensor, norm: Tensor,
    pooling: str, normalize: bool,
) -> Tensor:  # fmt: skip
    """Return the gradient of x, and of x2 if there is one: `[T, C]` in x's dtype; by the kernel."""
    x, x2, cu_seqlens = x.contiguous(), None if x2 is None else x2.contiguous(), cu_seqlens.contiguous()
    d_x = torch.empty_like(x)
    backward_launch(d_out.contiguous(), x, x2, cu_seqlens, out, norm, pooling, normalize, d_x)()
    return d_x


def reference_backward(
    d_out: Tensor, x: Tensor, x2: Tensor | None, cu_seqlens: Tensor, out: Tensor, norm: Tensor,
    pooling: str, normalize: bool,
) -> Tensor:  # fmt: skip
    """Return the same in plain torch."""
    d_pooled = d_out
    if normalize:
        along = torch.where(norm < EPS, 0, (out * d_out).sum(1))[:, None]
        exact = (d_out - out * along) / norm.clamp(min=EPS)[:, None]
        largest = torch.finfo(x.dtype).max
        d_pooled = torch.where((norm < EPS)[:, None], exact.clamp(-largest, largest), exact)
    average = _average(x, x2)
    d_average = torch.zeros_like(average)
    for index, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        if start < end:
            d_average[start:end] = _shares(average[start:end], pooling) * d_pooled[index]
    return (d_average if x2 is None else d_average / 2).to(x.dtype)


@torch.library.custom_op("minilm::pool", mutates_args=(), device_types="cuda")
def _forward(x: Tensor, cu_seqlens: Tensor, pooling: str, normalize: bool, x2: Tensor | None) -> tuple[Tensor, Tensor]:
    return launch_forward(x, cu_seqlens, pooling, normalize, x2)


@torch.library.custom_op("minilm::pool_backward", mutates_args=(), device_types="cuda")
def _backward(
    d_out: Tensor, x: Tensor, x2: Tensor | None, cu_seqlens: Tensor, out: Tensor, norm: Tensor,
    pooling: str, normalize: bool,
) -> Tensor:  # fmt: skip
    return launch_backward(d_out, x, x2, cu_seqlens, out, norm, pooling, normalize)


@_forward.register_fake
def _(x: Tensor, cu_seqlens: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    norm = x.new_empty(cu_seqlens.shape[0] - 1, dtype=torch.float32)
    return x.new_empty(cu_seqlens.shape[0] - 1, x.shape[1], dtype=torch.float32), norm


@_backward.register_fake
def _(_: Tensor, x: Tensor, *__: Any) -> Tensor:
    return x.new_empty(x.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, cu_seqlens, ctx.pooling, ctx.normalize, x2 = inputs
    ctx.save_for_backward(x, x2, cu_seqlens, *output)


def _differentiate(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x2 = ctx.saved_tensors[1]
    d_x = _backward(d_out, *ctx.saved_tensors, ctx.pooling, ctx.normalize)
    return d_x, None, None, None, None if x2 is None else d_x


_forward.register_kernel("cpu")(cpu_kernel(launch_forward, reference))
_backward.register_kernel("cpu")(cpu_kernel(launch_backward, reference_backward))
_forward.register_autograd(_differentiate, setup_context=_keep)


def pool(x: Tensor, cu_seqlens: Tensor, pooling: str, normalize: bool = False, x2: Tensor | None = None) -> Tensor:
    """Pool each sequence's token vectors: `[T, C]` -> float32 `[B, C]`; differentiable in x and x2.

    Args:
        x: `[T, C]`, float16, bfloat16 or float32.
        cu_seqlens: where each sequence starts, then T: int32 `[B + 1]`.
        pooling: "mean", "cls" (the first token), "max" or "mean_sqrt_len" (the sum over the root of the length).
        normalize: whether to scale each vector to length 1; a zero vector stays one, and its gradient finite.
        x2: as x; the vectors pooled are then (x + x2) / 2.

    Raises:
        ValueError: an unknown pooling, shapes that don't fit, or x and x2 of different dtypes.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}; got {pooling!r}")
    expect_shapes("pool", x=(x, "T C"), x2=(x2, "T C"), cu_seqlens=(cu_seqlens, "B+1"))
    if x2 is not None and x2.dtype != x.dtype:
        raise ValueError(f"pool expected x and x2 of one dtype; got {x.dtype} and {x2.dtype}")
    pooled: Tensor = _forward(x, cu_seqlens, pooling, normalize, x2)[0]
    return pooled
