"""Residual addition and LayerNorm in one pass: out = LN(update + residual).

    x = update + residual;  x̂ = (x - mean(x)) · rstd,  rstd = 1 / √(variance(x) + eps);  out = x̂·weight + bias

Backward, with g = d_out·weight and means over the row:
    d_x = rstd·(g - mean(g) - x̂·mean(g·x̂)),  d_weight = Σ_rows d_out·x̂,  d_bias = Σ_rows d_out

Source: Ba et al. 2016. All arithmetic is float32 whatever the tensors are. The sums over rows add up in a fixed order
(each program sums its rows, torch sums the programs' results), so gradients are the same to the bit every
time. T rows, C columns.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
import triton
import triton.language as tl
from torch import Tensor

from minilm.kernels.launch import Hardware, Launch, cpu_kernel, expect_shapes, row_blocks

BACKWARD_PROGRAMS = 256  # at most; set by the number of rows alone, so that the order of summation is


def reference(
    update: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """LN(update + residual) `[T, C]`, and each row's mean and rstd, float32 `[T]`; in plain torch."""
    x = update if residual is None else update + residual
    variance, mean = torch.var_mean(x.float(), dim=1, correction=0)
    return F.layer_norm(x, weight.shape, weight, bias, eps), mean, (variance + eps).rsqrt()


# The kernels.


@triton.jit
def _load_sum(update, residual, offsets, mask):
    """Load update + residual (None for none) in float32."""
    x = tl.load(update + offsets, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        x += tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def forward_kernel(
    update, residual, weight, bias, out, mean, rstd, num_rows, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
) -> None:  # fmt: skip
    """One program normalises BLOCK_T rows."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.arange(0, BLOCK_C)
    real_row, real_column = rows < num_rows, columns < C
    offsets = rows.to(tl.int64)[:, None] * C + columns[None, :]  # [BLOCK_T, BLOCK_C]
    mask = real_row[:, None] & real_column[None, :]
    x = _load_sum(update, residual, offsets, mask)
    row_mean = tl.sum(x, axis=1) / C
    centred = tl.where(real_column[None, :], x - row_mean[:, None], 0.0)
    row_rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / C + eps)
    w = tl.load(weight + columns, mask=real_column, other=0.0).to(tl.float32)
    b = tl.load(bias + columns, mask=real_column, other=0.0).to(tl.float32)
    normalized = centred * row_rstd[:, None] * w[None, :] + b[None, :]
    tl.store(out + offsets, normalized.to(out.dtype.element_ty), mask=mask)
    tl.store(mean + rows, row_mean, mask=real_row)
    tl.store(rstd + rows, row_rstd, mask=real_row)


@triton.jit
def backward_kernel(
    d_out, update, residual, weight, mean, rstd, d_x, d_weight, d_bias, num_rows,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
) -> None:  # fmt: skip
    """Program p takes row blocks p, p + P, p + 2P ...: d_x of each row, and its rows' share of the parameters'."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK_C)
    real_column = columns < C
    w = tl.load(weight + columns, mask=real_column, other=0.0).to(tl.float32)
    sum_weight = tl.zeros([BLOCK_C], tl.float32)
    sum_bias = tl.zeros([BLOCK_C], tl.float32)
    for start in range(program * BLOCK_T, num_rows, programs * BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T)
        offsets = rows.to(tl.int64)[:, None] * C + columns[None, :]  # [BLOCK_T, BLOCK_C]
        mask = (rows < num_rows)[:, None] & real_column[None, :]
        x = _load_sum(update, residual, offsets, mask)
        row_mean = tl.load(mean + rows, mask=rows < num_rows, other=0.0)
        row_rstd = tl.load(rstd + rows, mask=rows < num_rows, other=0.0)
        x_hat = tl.where(mask, (x - row_mean[:, None]) * row_rstd[:, None], 0.0)
        upstream = tl.load(d_out + offsets, mask=mask, other=0.0).to(tl.float32)
        sum_weight += tl.sum(upstream * x_hat, axis=0)
        sum_bias += tl.sum(upstream, axis=0)
        g = upstream * w[None, :]
        mean_g, mean_gx = tl.sum(g, axis=1) / C, tl.sum(g * x_hat, axis=1) / C
        gradient = (g - mean_g[:, None] - x_hat * mean_gx[:, None]) * row_rstd[:, None]
        tl.store(d_x + offsets, gradient.to(d_x.dtype.element_ty), mask=mask)
    tl.store(d_weight + program * C + columns, sum_weight, mask=real_column)
    tl.store(d_bias + program * C + columns, sum_bias, mask=real_column)


# Their launches.


def forward_launch(
    update: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float,
    out: Tensor, mean: Tensor, rstd: Tensor,
) -> Launch:  # fmt: skip
    """Return the launch that writes `out`, `mean` and `rstd`."""
    num_rows, blocks = len(update), row_blocks(update.shape[1])
    arguments = {
        "update": update, "residual": residual, "weight": weight, "bias": bias, "out": out, "mean": mean, "rstd": rstd,
        "num_rows": num_rows, "eps": eps, **blocks,
    }  # fmt: skip
    return Launch(forward_kernel, (triton.cdiv(num_rows, blocks["BLOCK_T"]),), arguments)


def backward_launch(
    d_out: Tensor, update: Tensor, residual: Tensor | None, weight: Tensor, mean: Tensor, rstd: Tensor,
    d_x: Tensor, d_weight: Tensor, d_bias: Tensor,
) -> Launch:  # fmt: skip
    """Return the launch that writes `d_x` `[T, C]` and each program's `d_weight` and `d_bias`, float32 `[P, C]`."""
    arguments = {
        "d_out": d_out, "update": update, "residual": residual, "weight": weight, "mean": mean, "rstd": rstd,
        "d_x": d_x, "d_weight": d_weight, "d_bias": d_bias,
        "num_rows": len(update), **row_blocks(update.shape[1]),
    }  # fmt: skip
    return Launch(backward_kernel, (len(d_weight),), arguments)


def examples(dtype: torch.dtype, _: Hardware) -> dict[str, Launch]:
    """Return the launches to compile ahead of time, at MiniLM's widths, by name."""
    x, row = torch.empty(128, 384, dtype=dtype), torch.empty(384, dtype=dtype)
    stats, partial = torch.empty(128), torch.empty(BACKWARD_PROGRAMS, 384)
    return {
        "residual + LayerNorm": forward_launch(x, x, row, row, 1e-12, x, stats, stats),
        "residual + LayerNorm, backward": backward_launch(x, x, x, row, stats, stats, x, partial, partial),
    }


# The operation.


def launch_forward(
    update: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `reference` does, by the kernel."""
    update, residual = update.contiguous(), None if residual is None else residual.contiguous()
    out = torch.empty_like(update)
    mean, rstd = (torch.empty(len(update), dtype=torch.float32, device=update.device) for _ in range(2))
    forward_launch(update, residual, weight, bias, eps, out, mean, rstd)()
    return out, mean, rstd


def launch_backward(
    d_out: Tensor, update: Tensor, residual: Tensor | None, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x `[T, C]`, weight and bias `[C]`, by the kernel."""
    d_out, update = d_out.contiguous(), update.contiguous()
    residual = None if residual is None else residual.contiguous()
    d_x = torch.empty_like(update)
    programs = min(BACKWARD_PROGRAMS, triton.cdiv(len(update), row_blocks(update.shape[1])["BLOCK_T"]))
    partial = torch.empty(2, programs, update.shape[1], dtype=torch.float32, device=update.device)
    backward_launch(d_out, update, residual, weight, mean, rstd, d_x, partial[0], partial[1])()
    d_weight, d_bias = partial.sum(dim=1).to(weight.dtype).unbind()
    return d_x, d_weight.clone(), d_bias.clone()


def reference_backward(
    d_out: Tensor, update: Tensor, residual: Tensor | None, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same in plain torch."""
    x = update if residual is None else update + residual
    upstream = d_out.float()
    x_hat = (x.float() - mean[:, None]) * rstd[:, None]
    g = upstream * weight.float()
    d_x = (g - g.mean(1, keepdim=True) - x_hat * (g * x_hat).mean(1, keepdim=True)) * rstd[:, None]
    return d_x.to(x.dtype), (upstream * x_hat).sum(0).to(weight.dtype), upstream.sum(0).to(weight.dtype)


@torch.library.custom_op("minilm::add_layer_norm", mutates_args=(), device_types="cuda")
def _forward(
    update: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_forward(update, residual, weight, bias, eps)


@torch.library.custom_op("minilm::add_layer_norm_backward", mutates_args=(), device_types="cuda")
def _backward(
    d_out: Tensor, update: Tensor, residual: Tensor | None, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_backward(d_out, update, residual, weight, mean, rstd)


@_forward.register_fake
def _(update: Tensor, *_: Any) -> tuple[Tensor, ...]:
    statistic = update.new_empty(update.shape[0], dtype=torch.float32)  # len() would fix T in a compiled graph
    return update.new_empty(update.shape), statistic, torch.empty_like(statistic)


@_backward.register_fake
def _(_: Tensor, update: Tensor, __: Tensor | None, weight: Tensor, *___: Tensor) -> tuple[Tensor, ...]:
    return update.new_empty(update.shape), torch.empty_like(weight), torch.empty_like(weight)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    update, residual, weight, _, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(update, residual, weight, mean, rstd)


def _differentiate(ctx: Any, d_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    residual = ctx.saved_tensors[1]
    d_x, d_weight, d_bias = _backward(d_out, *ctx.saved_tensors)
    return d_x, None if residual is None else d_x, d_weight, d_bias, None


_forward.register_kernel("cpu")(cpu_kernel(launch_forward, reference))
_backward.register_kernel("cpu")(cpu_kernel(launch_backward, reference_backward))
_forward.register_autograd(_differentiate, setup_context=_keep)


def add_layer_norm(update: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LN(update + residual): `[T, C]` -> `[T, C]`; differentiable in all four tensors.

    Args:
        update: `[T, C]`, float16, bfloat16 or float32.
        residual: the same shape and dtype, or None for LN(update).
        weight: `[C]`.
        bias: `[C]`.
        eps: added to the variance.

    Raises:
        ValueError: shapes that don't fit.
    """
    expect_shapes(
        "add_layer_norm", update=(update, "T C"), residual=(residual, "T C"), weight=(weight, "C"), bias=(bias, "C")
    )
    out: Tensor = _forward(update, residual, weight, bias, eps)[0]
    return out
