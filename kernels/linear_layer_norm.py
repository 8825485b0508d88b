"""Linear layer, residual addition and LayerNorm as one kernel: out = LN(x·Wᵀ + b + residual).

    s = x·Wᵀ + b + residual;  out = (s - mean(s))·rstd·norm_weight + norm_bias,  rstd = 1 / √(variance(s) + eps)

Backward: s is computed again (linear kernel), LayerNorm's backward gives d_s (layer_norm kernel), and linear's gives
the rest:  d_residual = d_s,  d_x = d_s·W,  d_weight = d_sᵀ·x,  d_bias = Σ_rows d_s

Sources: Ba et al. 2016 (LayerNorm); see also `linear` and `layer_norm`.

x `[T, K]`, weight `[C, K]` and bias `[C]` as in nn.Linear, residual and out `[T, C]`, mean and rstd float32 `[T]`. s is
never rounded to x's dtype nor written. A program owns whole rows, as one to three accumulators of 64 or 128
columns (Triton's blocks are powers of two wide; 384 padded to 512 would be a third more work), which start as the
residual: added at the end it would not fit in the registers. Hence the limits that `supports` tells.

Every row is added up over K in ascending steps of a size that T doesn't change, and normalised within one program: an
entry of out is the same to the bit in every batch that takes as many rows a program. Fewer rows in all take fewer a
program, down to 16: a GPU may multiply those by another instruction, whose sums within a step may round differently.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilm.kernels import layer_norm
from minilm.kernels import linear as linear_kernels
from minilm.kernels.launch import KIB, Hardware, Launch, cpu_kernel, dot_precision, expect_shapes, hardware
from minilm.kernels.linear import (
    ENOUGH_PROGRAMS,
    can_describe,
    dense,
    expect_one_dtype,
    load_tile,
    store_tile,
    tiled,
)

WIDTHS = (64, 128, 192, 256, 384)  # one to three pieces of 64 or 128 columns


def reference(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """LN(x·Wᵀ + b + residual) `[T, C]`, and each row's mean and rstd, float32 `[T]`; in plain torch."""
    update = linear_kernels.reference(x, weight, bias, gelu=False)
    return layer_norm.reference(update, residual, norm_weight, norm_bias, eps)


def supports(depth: int, width: int, dtype: torch.dtype, target: Hardware) -> str | None:
    """Return why the kernel can't map `depth` columns to `width` there, or None if it can."""
    if width not in WIDTHS:
        return f"one program holds whole rows, of {', '.join(map(str, WIDTHS))} columns; these have {width}"
    if depth % 64 != 0:
        return f"the rows multiplied must have a multiple of 64 columns; these have {depth}"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it multiplies float16, bfloat16 and float32, not {dtype}"
    if target.architecture.startswith("sm_") and target.shared_memory < 99 * KIB:
        return f"it needs 99 KiB of shared memory a program; {target.architecture} has {target.shared_memory // KIB}"
    return None


# The kernel.


@triton.jit
def load_pieces(
    source, row, num_rows, C: tl.constexpr, PIECE: tl.constexpr, ROWS: tl.constexpr, DESCRIPTORS: tl.constexpr
) -> tl.tuple:
    """Load whole rows, as a tuple of tiles ROWS x PIECE."""
    pieces = tl.tuple(())
    for i in tl.static_range(C // PIECE):
        pieces += (load_tile(source, row, i * PIECE, num_rows, C, ROWS, PIECE, DESCRIPTORS),)
    return pieces


@triton.jit
def in_float32(pieces) -> tl.tuple:
    """Return the pieces as accumulators."""
    wide = tl.tuple(())
    for i in tl.static_range(len(pieces)):
        wide += (pieces[i].to(tl.float32),)
    return wide


@triton.jit
def add_products(
    totals, x_tile, weight, k, C: tl.constexpr, K: tl.constexpr, PIECE: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """Add x_tile·Wᵀ, x_tile being columns k .. k + BLOCK_K, to the pieces."""
    sums = tl.tuple(())
    for i in tl.static_range(C // PIECE):
        weight_tile = load_tile(weight, i * PIECE, k, C, K, PIECE, BLOCK_K, DESCRIPTORS)
        sums += (tl.dot(x_tile, weight_tile.T, totals[i], input_precision=PRECISION),)
    return sums


@triton.jit
def add_bias(totals, bias, PIECE: tl.constexpr) -> tl.tuple:
    """Add a row to every row of the pieces."""
    sums = tl.tuple(())
    for i in tl.static_range(len(totals)):
        sums += (totals[i] + tl.load(bias + i * PIECE + tl.arange(0, PIECE)).to(tl.float32)[None, :],)
    return sums


@triton.jit
def store_normalized(
    pieces, weight, bias, out, mean, rstd, row, num_rows, eps, C: tl.constexpr, PIECE: tl.constexpr, ROWS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
) -> None:  # fmt: skip
    """Store LN of the rows that the pieces make up; and mean and rstd, unless they are None."""
    row_sum = tl.zeros([ROWS], tl.float32)
    for i in tl.static_range(C // PIECE):
        row_sum += tl.sum(pieces[i], axis=1)
    row_mean = row_sum / C
    squares = tl.zeros([ROWS], tl.float32)
    for i in tl.static_range(C // PIECE):
        centred = pieces[i] - row_mean[:, None]
        squares += tl.sum(centred * centred, axis=1)
    row_rstd = tl.rsqrt(squares / C + eps)
    if mean is not None:
        rows = row + tl.arange(0, ROWS)
        tl.store(mean + rows, row_mean, mask=rows < num_rows)
        tl.store(rstd + rows, row_rstd, mask=rows < num_rows)
    for i in tl.static_range(C // PIECE):
        columns = i * PIECE + tl.arange(0, PIECE)
        w = tl.load(weight + columns).to(tl.float32)
        b = tl.load(bias + columns).to(tl.float32)
        normalized = (pieces[i] - row_mean[:, None]) * row_rstd[:, None] * w[None, :] + b[None, :]
        store_tile(out, normalized, row, i * PIECE, num_rows, C, ROWS, PIECE, DESCRIPTORS)


@triton.jit(do_not_specialize=["num_rows"])  # one binary for every T: the same bits
def forward_kernel(
    x, weight, bias, residual, norm_weight, norm_bias, out, mean, rstd, num_rows, eps,
    C: tl.constexpr, K: tl.constexpr, PIECE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
) -> None:  # fmt: skip
    """One program computes BLOCK_T whole rows."""
    row = tl.program_id(0) * BLOCK_T
    totals = in_float32(load_pieces(residual, row, num_rows, C, PIECE, BLOCK_T, DESCRIPTORS))
    for k in range(0, K, BLOCK_K):
        x_tile = load_tile(x, row, k, num_rows, K, BLOCK_T, BLOCK_K, DESCRIPTORS)
        totals = add_products(totals, x_tile, weight, k, C, K, PIECE, BLOCK_K, PRECISION, DESCRIPTORS)
    totals = add_bias(totals, bias, PIECE)
    store_normalized(
        totals, norm_weight, norm_bias, out, mean, rstd, row, num_rows, eps, C, PIECE, BLOCK_T, DESCRIPTORS
    )


# Its launches.


class Shape(NamedTuple):
    """How a program computes its rows."""

    rows: int
    block_k: int
    num_stages: int


def has_room(x: Tensor, target: Hardware) -> bool:
    """Whether the copy engine can bring 128 rows' tiles: it needs 192 KiB for them."""
    return can_describe(x, target) and target.shared_memory >= 200 * KIB


def choose_shape(x: Tensor, target: Hardware) -> Shape:
    """Return the most rows a program of which there are ENOUGH_PROGRAMS, or else the fewest; never spilling."""
    amd = target.architecture.startswith("gfx")
    if x.dtype == torch.float32:
        choices, block_k, num_stages = [16] if amd else [32, 16], 32, 2
    elif has_room(x, target):
        choices, block_k, num_stages = [128, 64, 32, 16], 64, 3
    else:
        choices, block_k, num_stages = [64, 16] if amd else [64, 32, 16], 32, 2 if amd else 4
    rows = next((rows for rows in choices if triton.cdiv(len(x), rows) >= ENOUGH_PROGRAMS), choices[-1])
    return Shape(rows, block_k, num_stages)


def piece_width(width: int) -> int:
    """Return how many columns an accumulator has."""
    return 128 if width % 128 == 0 else 64


def forward_launch(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float,
    out: Tensor, mean: Tensor | None, rstd: Tensor | None, target: Hardware,
) -> Launch:  # fmt: skip
    """Return the launch that writes `out`, `mean` and `rstd` (None: not); all tensors as `linear.dense` makes them."""
    (num_rows, depth), width = x.shape, len(weight)
    shape, piece = choose_shape(x, target), piece_width(width)
    descriptors = has_room(x, target)
    arguments = {
        "x": tiled(x, shape.rows, shape.block_k, descriptors),
        "weight": tiled(weight, piece, shape.block_k, descriptors),
        "residual": tiled(residual, shape.rows, piece, descriptors),
        "out": tiled(out, shape.rows, piece, descriptors),
        "bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias, "mean": mean, "rstd": rstd,
        "num_rows": num_rows, "eps": eps, "C": width, "K": depth, "PIECE": piece,
        "BLOCK_T": shape.rows, "BLOCK_K": shape.block_k, "PRECISION": dot_precision(x.dtype),
        "DESCRIPTORS": descriptors,
    }  # fmt: skip
    grid = (triton.cdiv(num_rows, shape.rows),)
    return Launch(forward_kernel, grid, arguments, num_warps=8, num_stages=shape.num_stages)


def examples(dtype: torch.dtype, target: Hardware) -> dict[str, Launch]:
    """Return the launches to compile ahead of time, at MiniLM's widths, by name."""

    def launch(rows: int, depth: int) -> Launch:
        x, weight = (torch.empty(n, depth, dtype=dtype, device="meta") for n in (rows, 384))
        wide, row = (torch.empty(*shape, 384, dtype=dtype, device="meta") for shape in ((rows,), ()))
        stats = torch.empty(rows, device="meta")
        return forward_launch(x, weight, row, wide, row, row, 1e-12, wide, stats, stats, target)

    made = {f"linear 384 + residual + LayerNorm, {n} rows": launch(n, 384) for n in (16, 2048, 4096, 32768)}
    made["linear 1536 + residual + LayerNorm"] = launch(32768, 1536)
    return made


# The operation.


def launch_forward(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `reference` does, by the kernel.

    Raises:
        ValueError: what `supports` says the kernel can't do.
    """
    target = hardware(x.device)
    reason = supports(x.shape[1], len(weight), x.dtype, target)
    if reason:
        raise ValueError(f"linear_add_layer_norm can't run: {reason}; use linear and add_layer_norm")
    x, weight, bias, residual = dense(x), dense(weight), dense(bias), dense(residual)
    norm_weight, norm_bias = dense(norm_weight), dense(norm_bias)
    out = torch.empty_like(residual)
    mean, rstd = (x.new_empty(len(x), dtype=torch.float32) for _ in range(2))
    forward_launch(x, weight, bias, residual, norm_weight, norm_bias, eps, out, mean, rstd, target)()
    return out, mean, rstd


@torch.library.custom_op("minilm::linear_add_layer_norm", mutates_args=(), device_types="cuda")
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_forward(x, weight, bias, residual, norm_weight, norm_bias, eps)


@_forward.register_fake
def _(x: Tensor, _: Tensor, __: Tensor, residual: Tensor, *___: Any) -> tuple[Tensor, ...]:
    statistic = x.new_empty(x.shape[0], dtype=torch.float32)  # len() would fix T in a compiled graph
    return x.new_empty(residual.shape), statistic, torch.empty_like(statistic)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, residual, norm_weight, _, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, bias, residual, norm_weight, mean, rstd)


def _differentiate(ctx: Any, d_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, residual, norm_weight, mean, rstd = ctx.saved_tensors
    operations = torch.ops.minilm
    update = operations.linear(x, weight, bias, False)
    d_sum, d_norm_weight, d_norm_bias = operations.add_layer_norm_backward(
        d_out, update, residual, norm_weight, mean, rstd
    )
    d_x, d_weight, d_bias = operations.linear_backward(d_sum, x, weight, bias, False)
    return d_x, d_weight, d_bias, d_sum, d_norm_weight, d_norm_bias, None


_forward.register_kernel("cpu")(cpu_kernel(launch_forward, reference))
_forward.register_autograd(_differentiate, setup_context=_keep)


def linear_add_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> Tensor:
    """LN(x·Wᵀ + b + residual): `[T, K]` -> `[T, C]`; differentiable in all six tensors.

    Args:
        x: `[T, K]`, float16, bfloat16 or float32.
        weight: `[C, K]`, the same dtype.
        bias: `[C]`.
        residual: `[T, C]`, the same dtype.
        norm_weight: `[C]`.
        norm_bias: `[C]`.
        eps: added to the variance.

    Raises:
        ValueError: shapes that don't fit, or that the kernel can't do (see `supports`).
        TypeError: dtypes that differ.
    """
    expect_shapes(
        "linear_add_layer_norm",
        x=(x, "T K"),
        weight=(weight, "C K"),
        bias=(bias, "C"),
        residual=(residual, "T C"),
        norm_weight=(norm_weight, "C"),
        norm_bias=(norm_bias, "C"),
    )
    expect_one_dtype("linear_add_layer_norm", x=x, weight=weight, bias=bias, residual=residual)
    out: Tensor = _forward(x, weight, bias, residual, norm_weight, norm_bias, eps)[0]
    return out
