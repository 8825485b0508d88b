"""Linear layer, with GELU or without: out = x·Wᵀ + b, or out = gelu(x·Wᵀ + b).

    gelu(v) = v·Φ(v),  Φ(v) = ½·(1 + erf(v / √2)): the exact form, within 5e-7 of it (see `gelu`)

Backward, with v = x·Wᵀ + b computed again and g = d_out·gelu'(v), or d_out without GELU:
    d_x = g·W,  d_weight = gᵀ·x,  d_bias = Σ_rows g

Sources: Hendrycks and Gimpel 2016 (GELU); Abramowitz and Stegun 1964, 7.1.26 (erf).

x `[T, K]`, weight `[N, K]` and bias `[N]` as in nn.Linear, out `[T, N]`, rows one after another; any sizes. float16 and
bfloat16 are multiplied by tensor cores into float32; float32 exactly (`launch.dot_precision`).

A program computes one tile of out, adding up over K in steps of BLOCK_K in ascending order; neither BLOCK_K nor that
order depends on T, and nothing is split over K. So an entry of out is the same to the bit in every batch that takes the
same tile. `choose_tile` takes smaller tiles for fewer rows: a GPU may multiply those by another instruction, whose
sums within one step may round differently. Tiles of the same rows are neighbours in the grid, so that x is read from
memory once; the weights stay in the L2 cache.

Where a GPU's copy engine can bring tiles (Hopper on; float16, bfloat16) it does: fewer registers than pointers, and
the same kernel. This file is also the home of what the other matrix kernels share: `gelu`, `load_tile`, `store_tile`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from minilm.kernels.launch import Hardware, Launch, cpu_kernel, dot_precision, expect_shapes, hardware

ENOUGH_PROGRAMS = 64  # from about here on, larger tiles win: they read the weights less often


def reference(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    """x·Wᵀ + b, with GELU or without, `[T, N]`; in plain torch."""
    out = F.linear(x, weight, bias)
    return F.gelu(out) if gelu else out


# The kernel.


@triton.jit
def gelu(x) -> tl.tensor:
    """x·Φ(x) in float32. Abramowitz and Stegun's erf spares the registers of an exact one: error below 5e-7."""
    z = tl.abs(x)
    t = 1.0 / (1.0 + 0.2316418882 * z)  # 0.3275911 / √2
    polynomial = ((((0.5307027145 * t - 0.7265760135) * t + 0.7107068705) * t - 0.142248368) * t + 0.127414796) * t
    tail = polynomial * tl.exp2(x * x * -0.7213475204444817)  # 1 - Φ(|x|); exp(-x² / 2)
    return x * tl.where(x > 0, 1.0 - tail, tail)


@triton.jit
def load_tile(
    source, row, column, num_rows, NUM_COLUMNS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Load ROWS x COLUMNS entries of a matrix, zeros beyond its edges; `source` is a descriptor or a pointer."""
    if DESCRIPTORS:
        return source.load([row, column])
    else:  # noqa: RET505 - Triton would compile what follows a branch that returns
        rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        mask = (rows < num_rows)[:, None]
        if NUM_COLUMNS % COLUMNS != 0:
            mask &= (columns < NUM_COLUMNS)[None, :]
        return tl.load(source + rows.to(tl.int64)[:, None] * NUM_COLUMNS + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(
    target, tile, row, column, num_rows, NUM_COLUMNS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
) -> None:  # fmt: skip
    """Store a tile in the target's dtype, but for what lies beyond its edges."""
    if DESCRIPTORS:
        target.store([row, column], tile.to(target.dtype))
    else:
        rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        mask = (rows < num_rows)[:, None] & (columns < NUM_COLUMNS)[None, :]
        offsets = rows.to(tl.int64)[:, None] * NUM_COLUMNS + columns[None, :]
        tl.store(target + offsets, tile.to(target.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])  # one binary a tile for every T: the same bits
def forward_kernel(
    x, weight, bias, out, num_rows, N: tl.constexpr, K: tl.constexpr, GELU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
) -> None:  # fmt: skip
    """One program computes a BLOCK_M x BLOCK_N tile of out."""
    TILES_A_ROW: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N  # noqa: N806
    row = tl.program_id(0) // TILES_A_ROW * BLOCK_M
    column = tl.program_id(0) % TILES_A_ROW * BLOCK_N
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        x_tile = load_tile(x, row, k, num_rows, K, BLOCK_M, BLOCK_K, DESCRIPTORS)
        weight_tile = load_tile(weight, column, k, N, K, BLOCK_N, BLOCK_K, DESCRIPTORS)
        total = tl.dot(x_tile, weight_tile.T, total, input_precision=PRECISION)
    columns = column + tl.arange(0, BLOCK_N)
    total += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if GELU:
        total = gelu(total)
    store_tile(out, total, row, column, num_rows, N, BLOCK_M, BLOCK_N, False)


# Its launches.


class Tile(NamedTuple):
    """What one program computes, and how."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


HALF_TILES = (Tile(128, 128, 8, 3), Tile(64, 64, 4, 4), Tile(32, 32, 4, 4), Tile(16, 32, 4, 4))  # BLOCK_K = 64
FLOAT_TILES = (Tile(64, 64, 4, 3), Tile(32, 32, 4, 3), Tile(16, 32, 4, 3))  # BLOCK_K = 32


def choose_tile(num_rows: int, width: int, dtype: torch.dtype, target: Hardware) -> Tile:
    """Return the largest tile of which out has ENOUGH_PROGRAMS, or else the smallest."""
    tiles = FLOAT_TILES if dtype == torch.float32 else HALF_TILES
    fitting = (t for t in tiles if triton.cdiv(num_rows, t.rows) * triton.cdiv(width, t.columns) >= ENOUGH_PROGRAMS)
    tile = next(fitting, tiles[-1])
    return tile._replace(num_stages=2) if target.architecture.startswith("gfx") else tile


def can_describe(x: Tensor, target: Hardware) -> bool:
    """Whether the copy engine can bring tiles of x: rows of a multiple of 16 bytes; its float32 tiles would spill."""
    return target.has_descriptors and x.dtype != torch.float32 and x.shape[1] % 8 == 0 and len(x) > 0


def tiled(x: Tensor, rows: int, columns: int, descriptors: bool) -> Tensor | TensorDescriptor:
    """Return x as a kernel takes it: with a description of its tiles for the copy engine, or bare."""
    return TensorDescriptor.from_tensor(x, [rows, columns]) if descriptors else x


def forward_launch(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool, out: Tensor, target: Hardware) -> Launch:
    """Return the launch that writes `out`; all tensors contiguous and 16-byte aligned (see `dense`)."""
    (num_rows, depth), width = x.shape, len(weight)
    tile = choose_tile(num_rows, width, x.dtype, target)
    block_k = 32 if x.dtype == torch.float32 else 64
    descriptors = can_describe(x, target)
    arguments = {
        "x": tiled(x, tile.rows, block_k, descriptors), "weight": tiled(weight, tile.columns, block_k, descriptors),
        "bias": bias, "out": out, "num_rows": num_rows, "N": width, "K": depth, "GELU": gelu,
        "BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": block_k,
        "PRECISION": dot_precision(x.dtype), "DESCRIPTORS": descriptors,
    }  # fmt: skip
    programs = triton.cdiv(num_rows, tile.rows) * triton.cdiv(width, tile.columns)
    return Launch(forward_kernel, (programs,), arguments, tile.num_warps, tile.num_stages)


def examples(dtype: torch.dtype, target: Hardware) -> dict[str, Launch]:
    """Return the launches to compile ahead of time, at MiniLM's widths, by name."""

    def launch(rows: int, depth: int, width: int, gelu: bool) -> Launch:
        shapes = (rows, depth), (width, depth), (width,), (rows, width)
        x, weight, bias, out = (torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)
        return forward_launch(x, weight, bias, gelu, out, target)

    made = {f"linear + GELU, {rows} rows": launch(rows, 384, 1536, True) for rows in (16, 128, 512, 32768)}
    made["linear 384 to 1152"] = launch(32768, 384, 1152, False)
    made["linear 1536 to 384"] = launch(32768, 1536, 384, False)
    return made


# The operation.


def dense(x: Tensor) -> Tensor:
    """Return x contiguous and 16-byte aligned: itself, or a copy."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def launch_forward(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    """Do what `reference` does, by the kernel."""
    x, weight, bias = dense(x), dense(weight), dense(bias)
    out = x.new_empty(len(x), len(weight))
    forward_launch(x, weight, bias, gelu, out, hardware(x.device))()
    return out


def launch_backward(
    d_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, gelu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias: torch's matrix products, GELU's argument by the kernel."""
    return _products(d_out, x, weight, bias, launch_forward(x, weight, bias, False) if gelu else None)


def reference_backward(
    d_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, gelu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same in plain torch."""
    return _products(d_out, x, weight, bias, F.linear(x, weight, bias) if gelu else None)


def _products(
    d_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, argument: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the three gradients, given GELU's argument where there is one; sums over rows are made in float32."""
    g = d_out if argument is None else torch.ops.aten.gelu_backward(d_out, argument)  # float32 inside
    return g @ weight, g.T @ x, g.sum(dim=0, dtype=torch.float32).to(bias.dtype)


@torch.library.custom_op("minilm::linear", mutates_args=(), device_types="cuda")
def _forward(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    return launch_forward(x, weight, bias, gelu)


@torch.library.custom_op("minilm::linear_backward", mutates_args=(), device_types="cuda")
def _backward(d_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, gelu: bool) -> tuple[Tensor, Tensor, Tensor]:
    return launch_backward(d_out, x, weight, bias, gelu)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])  # len() would fix T in a compiled graph


@_backward.register_fake
def _(_: Tensor, x: Tensor, weight: Tensor, bias: Tensor, __: bool) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 - the signature torch asks for
    *tensors, ctx.gelu = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(d_out, *ctx.saved_tensors, ctx.gelu), None


_forward.register_kernel("cpu")(cpu_kernel(launch_forward, reference))
_backward.register_kernel("cpu")(cpu_kernel(launch_backward, reference_backward))
_forward.register_autograd(_differentiate, setup_context=_keep)


def expect_one_dtype(operation: str, **tensors: Tensor) -> None:
    """Check that the tensors share a dtype that the matrix kernels multiply.

    Raises:
        TypeError: they don't; the message gives all dtypes.
    """
    dtypes = {x.dtype for x in tensors.values()}
    if len(dtypes) > 1 or not dtypes <= {torch.float16, torch.bfloat16, torch.float32}:
        got = ", ".join(f"{name} {x.dtype}" for name, x in tensors.items())
        raise TypeError(f"{operation} expected one of float16, bfloat16 and float32 throughout; got {got}: cast them")


def linear(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool = False) -> Tensor:
    """x·Wᵀ + b, with GELU after it or without: `[T, K]` -> `[T, N]`; differentiable in all three tensors.

    Args:
        x: `[T, K]`, float16, bfloat16 or float32.
        weight: `[N, K]`, the same dtype.
        bias: `[N]`.
        gelu: whether to apply GELU.

    Raises:
        ValueError: shapes that don't fit.
        TypeError: dtypes that differ.
    """
    expect_shapes("linear", x=(x, "T K"), weight=(weight, "N K"), bias=(bias, "N"))
    expect_one_dtype("linear", x=x, weight=weight, bias=bias)
    out: Tensor = _forward(x, weight, bias, gelu)
    return out
