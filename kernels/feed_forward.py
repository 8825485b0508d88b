"""The whole feed-forward block as one kernel: out = LN(x + W₂·gelu(W₁·x + b₁) + b₂). Inference only; a candidate.

Nothing uses it by default: it saves writing and reading the F-wide activations, but every program streams both weight
matrices from the L2 cache, and its accumulators leave one program a multiprocessor. Measure it on your GPU against
`linear` with GELU followed by `linear_add_layer_norm`.

Sources: Vaswani et al. 2017 (position-wise feed-forward); see `linear` for GELU and `linear_layer_norm` for the rest.

x and out `[T, C]`, intermediate weight `[F, C]` and bias `[F]`, output weight `[C, F]` and bias `[C]` as in nn.Linear.
A program owns whole rows: their x stays in shared memory, the sum in registers, and BLOCK_F activations at a time are
made, rounded to x's dtype as unfused ones are, and multiplied on. The number of rows a program and every order of
summation are the same for all T: a row's output is the same to the bit in every batch. float16 and bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilm.kernels import linear as linear_kernels
from minilm.kernels import linear_layer_norm
from minilm.kernels.launch import KIB, Hardware, Launch, cpu_kernel, dot_precision, expect_shapes, hardware
from minilm.kernels.linear import dense, expect_one_dtype, gelu, load_tile, tiled
from minilm.kernels.linear_layer_norm import (
    add_bias,
    add_products,
    has_room,
    in_float32,
    load_pieces,
    piece_width,
    store_normalized,
)


def reference(
    x: Tensor, intermediate_weight: Tensor, intermediate_bias: Tensor, output_weight: Tensor, output_bias: Tensor,
    norm_weight: Tensor, norm_bias: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """LN(x + W₂·gelu(W₁·x + b₁) + b₂) `[T, C]`; in plain torch."""
    inner = linear_kernels.reference(x, intermediate_weight, intermediate_bias, gelu=True)
    return linear_layer_norm.reference(inner, output_weight, output_bias, x, norm_weight, norm_bias, eps)[0]


def supports(width: int, inner_width: int, dtype: torch.dtype, target: Hardware) -> str | None:
    """Return why the kernel can't take rows of `width` columns, `inner_width` inside, or None if it can."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"whole rows of {dtype} don't fit in shared memory beside the weights: float16 and bfloat16 do"
    return linear_layer_norm.supports(inner_width, width, dtype, target)


# The kernel.


@triton.jit(do_not_specialize=["num_rows"])  # one binary for every T: the same bits
def forward_kernel(
    x, intermediate_weight, intermediate_bias, output_weight, output_bias, norm_weight, norm_bias, out, num_rows, eps,
    C: tl.constexpr, F: tl.constexpr, PIECE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
) -> None:  # fmt: skip
    """One program computes BLOCK_T whole rows."""
    row = tl.program_id(0) * BLOCK_T
    pieces = load_pieces(x, row, num_rows, C, PIECE, BLOCK_T, DESCRIPTORS)
    totals = in_float32(pieces)
    for f in range(0, F, BLOCK_F):
        inner = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
        for i in tl.static_range(C // PIECE):
            weight_tile = load_tile(intermediate_weight, f, i * PIECE, F, C, BLOCK_F, PIECE, DESCRIPTORS)
            inner = tl.dot(pieces[i], weight_tile.T, inner, input_precision=PRECISION)
        bias = tl.load(intermediate_bias + f + tl.arange(0, BLOCK_F)).to(tl.float32)
        inner = gelu(inner + bias[None, :]).to(pieces[0].dtype)
        totals = add_products(totals, inner, output_weight, f, C, F, PIECE, BLOCK_F, PRECISION, DESCRIPTORS)
    totals = add_bias(totals, output_bias, PIECE)
    store_normalized(
        totals, norm_weight, norm_bias, out, None, None, row, num_rows, eps, C, PIECE, BLOCK_T, DESCRIPTORS
    )


# Its launches.


def forward_launch(
    x: Tensor, intermediate_weight: Tensor, intermediate_bias: Tensor, output_weight: Tensor, output_bias: Tensor,
    norm_weight: Tensor, norm_bias: Tensor, eps: float, out: Tensor, target: Hardware,
) -> Launch:  # fmt: skip
    """Return the launch that writes `out`; all tensors contiguous and 16-byte aligned (see `linear.dense`)."""
    (num_rows, width), inner_width = x.shape, len(intermediate_weight)
    descriptors, piece = has_room(x, target), piece_width(width)
    rows = 128 if descriptors else 64
    block_f = 32 if target.shared_memory > 101 * KIB else 16
    arguments = {
        "x": tiled(x, rows, piece, descriptors), "out": tiled(out, rows, piece, descriptors),
        "intermediate_weight": tiled(intermediate_weight, block_f, piece, descriptors),
        "output_weight": tiled(output_weight, piece, block_f, descriptors),
        "intermediate_bias": intermediate_bias, "output_bias": output_bias,
        "norm_weight": norm_weight, "norm_bias": norm_bias, "num_rows": num_rows, "eps": eps,
        "C": width, "F": inner_width, "PIECE": piece, "BLOCK_T": rows, "BLOCK_F": block_f,
        "PRECISION": dot_precision(x.dtype), "DESCRIPTORS": descriptors,
    }  # fmt: skip
    return Launch(forward_kernel, (triton.cdiv(num_rows, rows),), arguments, num_warps=8, num_stages=2)


def examples(dtype: torch.dtype, target: Hardware) -> dict[str, Launch]:
    """Return the launches to compile ahead of time, at MiniLM's widths, by name; none where it isn't supported."""
    if supports(384, 1536, dtype, target):
        return {}
    shapes = (32768, 384), (1536, 384), (1536,), (384, 1536), (384,)
    x, first, first_bias, second, row = (torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)
    return {"whole feed-forward": forward_launch(x, first, first_bias, second, row, row, row, 1e-12, x, target)}


# The operation.


def launch_forward(
    x: Tensor, intermediate_weight: Tensor, intermediate_bias: Tensor, output_weight: Tensor, output_bias: Tensor,
    norm_weight: Tensor, norm_bias: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """Do what `reference` does, by the kernel.

    Raises:
        ValueError: what `supports` says the kernel can't do.
    """
    target = hardware(x.device)
    reason = supports(x.shape[1], len(intermediate_weight), x.dtype, target)
    if reason:
        raise ValueError(f"feed_forward can't run: {reason}; use linear and linear_add_layer_norm")
    x, norm_weight, norm_bias = dense(x), dense(norm_weight), dense(norm_bias)
    intermediate_weight, intermediate_bias = dense(intermediate_weight), dense(intermediate_bias)
    output_weight, output_bias = dense(output_weight), dense(output_bias)
    out = torch.empty_like(x)
    forward_launch(
        x, intermediate_weight, intermediate_bias, output_weight, output_bias, norm_weight, norm_bias, eps, out, target
    )()
    return out


@torch.library.custom_op("minilm::feed_forward", mutates_args=(), device_types="cuda")
def _forward(
    x: Tensor, intermediate_weight: Tensor, intermediate_bias: Tensor, output_weight: Tensor, output_bias: Tensor,
    norm_weight: Tensor, norm_bias: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    return launch_forward(
        x, intermediate_weight, intermediate_bias, output_weight, output_bias, norm_weight, norm_bias, eps
    )


@_forward.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


_forward.register_kernel("cpu")(cpu_kernel(launch_forward, reference))


def feed_forward(
    x: Tensor, intermediate_weight: Tensor, intermediate_bias: Tensor, output_weight: Tensor, output_bias: Tensor,
    norm_weight: Tensor, norm_bias: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """LN(x + W₂·gelu(W₁·x + b₁) + b₂): `[T, C]` -> `[T, C]`; not differentiable.

    Args:
        x: `[T, C]`, float16 or bfloat16.
        intermediate_weight: W₁ `[F, C]`, the same dtype.
        intermediate_bias: b₁ `[F]`.
        output_weight: W₂ `[C, F]`, the same dtype.
        output_bias: b₂ `[C]`.
        norm_weight: `[C]`.
        norm_bias: `[C]`.
        eps: added to the variance.

    Raises:
        ValueError: shapes that don't fit, or that the kernel can't do (see `supports`).
        TypeError: dtypes that differ.
        RuntimeError: a gradient would be needed.
    """
    expect_shapes(
        "feed_forward", x=(x, "T C"), intermediate_weight=(intermediate_weight, "F C"),
        intermediate_bias=(intermediate_bias, "F"), output_weight=(output_weight, "C F"),
        output_bias=(output_bias, "C"), norm_weight=(norm_weight, "C"), norm_bias=(norm_bias, "C"),
    )  # fmt: skip
    expect_one_dtype("feed_forward", x=x, intermediate_weight=intermediate_weight, output_weight=output_weight)
    weights = intermediate_weight, intermediate_bias, output_weight, output_bias, norm_weight, norm_bias
    if torch.is_grad_enabled() and any(v.requires_grad for v in (x, *weights)):
        raise RuntimeError(
            "feed_forward has no gradient: call it under torch.no_grad(), or use linear and linear_add_layer_norm"
        )
    out: Tensor = _forward(x, *weights, eps)
    return out
