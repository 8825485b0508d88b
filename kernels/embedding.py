"""Three embeddings added and normalised in one pass: out = LN(word[id] + token_type[type] + position[position]).

The sum is BERT's, (word + token type) + position, in float32, as all arithmetic is whatever the tables are; LayerNorm
as in layer_norm.py, whose backward kernel this one's uses. A row does not depend on the others: batch-invariant.

Ids must lie within their tables; the tokenizer and the model see to that. On the CPU one outside raises an IndexError.
A kernel that asked the GPU would have to wait for it, so there nothing is read for such an id, and its row of the
output is NaN, as are gradients of weight and bias; the tables' gradients leave it out.

Backward, after LayerNorm's: a table row's gradient is the sum of d_sum over the tokens that took it. Tokens are sorted
by row (a stable sort), so each table row owns one stretch of the order, and one program adds that up. A stretch of
thousands, such as a token type's, would keep one program busy for long, so sums over each CHUNK of the order that lies
in one stretch are made first, and the program adds those. The order of every sum is fixed by the ids: the gradients
are the same to the bit every time. (torch's own embedding_dense_backward no longer promises that: newer versions add up
atomically where a table has few rows.)

Source: Devlin et al. 2019. T tokens, C columns, V rows of a table.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
import triton
import triton.language as tl
from torch import Tensor

from minilm.kernels import layer_norm
from minilm.kernels.launch import Hardware, Launch, cpu_kernel, expect_shapes, row_blocks

CHUNK = 128  # how many tokens of the sorted order are added up ahead, where they share a table row


class Lookup(NamedTuple):
    """What is added up: rows of three tables.

    Attributes:
        ids: rows of `word` to take, int64 `[T]`.
        type_ids: rows of `token_type`, `[T]`.
        positions: rows of `position`, `[T]`.
        word: `[V, C]`.
        token_type: `[2, C]`, as a rule.
        position: `[P, C]`.
    """

    ids: Tensor
    type_ids: Tensor
    positions: Tensor
    word: Tensor
    token_type: Tensor
    position: Tensor

    @property
    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Each ids with their table, by name."""
        return {
            "ids": (self.ids, self.word),
            "type_ids": (self.type_ids, self.token_type),
            "positions": (self.positions, self.position),
        }

    def contiguous(self) -> Lookup:
        """Return the same, each tensor in one piece."""
        return Lookup(*(x.contiguous() for x in self))

    def sum(self) -> Tensor:
        """Return (word + token type) + position, float32 `[T, C]`, in plain torch."""
        of_word, of_type, of_position = (F.embedding(ids, table).float() for ids, table in self.pairs.values())
        return of_word + of_type + of_position


def reference(
    ids: Tensor, type_ids: Tensor, positions: Tensor, word: Tensor, token_type: Tensor, position: Tensor,
    weight: Tensor, bias: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """LN(sum of the three) `[T, C]`, and each row's mean and rstd, float32 `[T]`; in plain torch."""
    x = Lookup(ids, type_ids, positions, word, token_type, position).sum()
    variance, mean = torch.var_mean(x, dim=1, correction=0)
    out = F.layer_norm(x, weight.shape, weight.float(), bias.float(), eps)
    return out.to(word.dtype), mean, (variance + eps).rsqrt()


# The kernels.


@triton.jit
def _load_rows(table, num_rows, index, columns, real_row, real_column, C: tl.constexpr):
    """Load rows of a table in float32, and whether each index lies within it; zeros, unread, for those outside."""
    known = real_row & (index >= 0) & (index < num_rows)
    offsets = index[:, None] * C + columns[None, :]  # int64 [BLOCK_T, BLOCK_C]
    values = tl.load(table + offsets, mask=known[:, None] & real_column[None, :], other=0.0)
    return values.to(tl.float32), known


@triton.jit
def _load_sum(
    ids, type_ids, positions, word, token_type, position, num_words, num_types, num_positions,
    rows, columns, real_row, real_column, C: tl.constexpr,
):  # fmt: skip
    """Load the sum of the three embeddings, and whether all three ids of a row lie within their tables."""
    word_index = tl.load(ids + rows, mask=real_row, other=0).to(tl.int64)
    type_index = tl.load(type_ids + rows, mask=real_row, other=0).to(tl.int64)
    position_index = tl.load(positions + rows, mask=real_row, other=0).to(tl.int64)
    x, known_word = _load_rows(word, num_words, word_index, columns, real_row, real_column, C)
    y, known_type = _load_rows(token_type, num_types, type_index, columns, real_row, real_column, C)
    z, known_position = _load_rows(position, num_positions, position_index, columns, real_row, real_column, C)
    return x + y + z, known_word & known_type & known_position


@triton.jit
def forward_kernel(
    ids, type_ids, positions, word, token_type, position, weight, bias, out, mean, rstd,
    num_tokens, num_words, num_types, num_positions, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
) -> None:  # fmt: skip
    """One program embeds BLOCK_T tokens."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.arange(0, BLOCK_C)
    real_row, real_column = rows < num_tokens, columns < C
    x, known = _load_sum(
        ids, type_ids, positions, word, token_type, position, num_words, num_types, num_positions,
        rows, columns, real_row, real_column, C,
    )  # fmt: skip
    row_mean = tl.sum(x, axis=1) / C
    centred = tl.where(real_column[None, :], x - row_mean[:, None], 0.0)
    row_rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / C + eps)
    row_rstd = tl.where(known, row_rstd, float("nan"))  # so that an id outside its table shows
    w = tl.load(weight + columns, mask=real_column, other=0.0).to(tl.float32)
    b = tl.load(bias + columns, mask=real_column, other=0.0).to(tl.float32)
    normalized = centred * row_rstd[:, None] * w[None, :] + b[None, :]
    offsets = rows.to(tl.int64)[:, None] * C + columns[None, :]  # [BLOCK_T, BLOCK_C]
    tl.store(out + offsets, normalized.to(out.dtype.element_ty), mask=real_row[:, None] & real_column[None, :])
    tl.store(mean + rows, row_mean, mask=real_row)
    tl.store(rstd + rows, row_rstd, mask=real_row)


@triton.jit
def sum_kernel(
    ids, type_ids, positions, word, token_type, position, x,
    num_tokens, num_words, num_types, num_positions,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
) -> None:  # fmt: skip
    """One program writes what the forward kernel normalises, of BLOCK_T tokens."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.arange(0, BLOCK_C)
    real_row, real_column = rows < num_tokens, columns < C
    values, _ = _load_sum(
        ids, type_ids, positions, word, token_type, position, num_words, num_types, num_positions,
        rows, columns, real_row, real_column, C,
    )  # fmt: skip
    offsets = rows.to(tl.int64)[:, None] * C + columns[None, :]  # [BLOCK_T, BLOCK_C]
    tl.store(x + offsets, values, mask=real_row[:, None] & real_column[None, :])


@triton.jit
def _add_rows(x, order, first, last, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr):
    """The sum of rows first … last - 1 of x, or (unless order is None) of the rows that order names there."""
    columns = tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for start in range(first, last, BLOCK_T):
        rows = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        real_row = rows < last
        if order is not None:
            rows = tl.load(order + rows, mask=real_row, other=0)
        offsets = rows[:, None] * C + columns[None, :]  # [BLOCK_T, BLOCK_C]
        total += tl.load(x + offsets, mask=real_row[:, None] & (columns < C)[None, :], other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def chunk_kernel(
    d_sum, order, sorted_ids, chunks,
    C: tl.constexpr, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
) -> None:  # fmt: skip
    """One program adds up a chunk of the sorted order, if all of it belongs to one table row."""
    chunk = tl.program_id(0)
    first = chunk * CHUNK
    if tl.load(sorted_ids + first) == tl.load(sorted_ids + first + CHUNK - 1):
        total = _add_rows(d_sum, order, first, first + CHUNK, C, BLOCK_C, BLOCK_T)
        columns = tl.arange(0, BLOCK_C)
        tl.store(chunks + chunk.to(tl.int64) * C + columns, total, mask=columns < C)


@triton.jit
def table_kernel(
    d_sum, order, stretches, chunks, d_table,
    C: tl.constexpr, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
) -> None:  # fmt: skip
    """One program gives one table row its gradient: its stretch of the order, whole chunks at once."""
    row = tl.program_id(0)
    start, end = tl.load(stretches + row).to(tl.int32), tl.load(stretches + row + 1).to(tl.int32)
    first_chunk, last_chunk = (start + CHUNK - 1) // CHUNK, end // CHUNK
    has_chunks = first_chunk < last_chunk
    head = _add_rows(d_sum, order, start, tl.where(has_chunks, first_chunk * CHUNK, end), C, BLOCK_C, BLOCK_T)
    middle = _add_rows(chunks, None, first_chunk, last_chunk, C, BLOCK_C, BLOCK_T)
    tail = _add_rows(d_sum, order, tl.where(has_chunks, last_chunk * CHUNK, end), end, C, BLOCK_C, BLOCK_T)
    columns = tl.arange(0, BLOCK_C)
    total = (head + middle + tail).to(d_table.dtype.element_ty)
    tl.store(d_table + row.to(tl.int64) * C + columns, total, mask=columns < C)


# Their launches.


def _arguments(lookup: Lookup) -> dict[str, Any]:
    """Return the arguments that say what to add up."""
    sizes = {"num_tokens": "ids", "num_words": "word", "num_types": "token_type", "num_positions": "position"}
    tensors = lookup._asdict()
    return {**tensors, **{size: len(tensors[name]) for size, name in sizes.items()}, **row_blocks(lookup.word.shape[1])}


def forward_launch(
    lookup: Lookup, weight: Tensor, bias: Tensor, eps: float, out: Tensor, mean: Tensor, rstd: Tensor
) -> Launch:
    """Return the launch that writes `out`, `mean` and `rstd`."""
    arguments = {
        **_arguments(lookup), "weight": weight, "bias": bias, "eps": eps, "out": out, "mean": mean, "rstd": rstd
    }  # fmt: skip
    return Launch(forward_kernel, (triton.cdiv(len(lookup.ids), arguments["BLOCK_T"]),), arguments)


def sum_launch(lookup: Lookup, x: Tensor) -> Launch:
    """Return the launch that writes the sum of the three embeddings, float32 `x`."""
    arguments = {**_arguments(lookup), "x": x}
    return Launch(sum_kernel, (triton.cdiv(len(lookup.ids), arguments["BLOCK_T"]),), arguments)


def table_launches(
    d_sum: Tensor, order: Tensor, sorted_ids: Tensor, stretches: Tensor, chunks: Tensor, d_table: Tensor
) -> tuple[Launch, Launch]:
    """Return the launches that write `chunks` (float32 `[T // CHUNK, C]`) and, from them, `d_table`."""
    common = {**row_blocks(d_sum.shape[1]), "d_sum": d_sum, "order": order, "CHUNK": CHUNK, "chunks": chunks}
    return (
        Launch(chunk_kernel, (len(chunks),), {**common, "sorted_ids": sorted_ids}),
        Launch(table_kernel, (len(d_table),), {**common, "stretches": stretches, "d_table": d_table}),
    )


def examples(dtype: torch.dtype, _: Hardware) -> dict[str, Launch]:
    """Return the launches to compile ahead of time, at MiniLM's width, by name."""
    ids, x, row = torch.zeros(256, dtype=torch.int64), torch.empty(256, 384, dtype=dtype), torch.empty(384, dtype=dtype)
    total, stats = torch.empty(256, 384), torch.empty(256)
    lookup = Lookup(ids, ids, ids, x, x[:2], x)
    chunk, table = table_launches(total, ids, ids, ids, total[:2], x)
    return {
        "embeddings + LayerNorm": forward_launch(lookup, row, row, 1e-12, x, stats, stats),
        "embeddings, backward, sum": sum_launch(lookup, total),
        "embeddings, backward, chunks": chunk,
        "embeddings, backward, table": table,
    }


# The operation.


def launch_forward(
    ids: Tensor, type_ids: Tensor, positions: Tensor, word: Tensor, token_type: Tensor, position: Tensor,
    weight: Tensor, bias: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Do what `reference` does, by the kernel."""
    lookup = Lookup(ids, type_ids, positions, word, token_type, position).contiguous()
    if ids.device.type == "cpu":
        _check_ids(lookup)
    out = torch.empty(len(ids), word.shape[1], dtype=word.dtype, device=word.device)
    mean, rstd = (torch.empty(len(ids), dtype=torch.float32, device=word.device) for _ in range(2))
    forward_launch(lookup, weight.contiguous(), bias.contiguous(), eps, out, mean, rstd)()
    return out, mean, rstd


def _check_ids(lookup: Lookup) -> None:
    """Raise an IndexError for an id outside its table."""
    for name, (ids, table) in lookup.pairs.items():
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(table):
            raise IndexError(f"{name} must lie in 0 … {len(table) - 1}; got {int(ids.min())} … {int(ids.max())}")


def launch_backward(
    d_out: Tensor, ids: Tensor, type_ids: Tensor, positions: Tensor,
    word: Tensor, token_type: Tensor, position: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of word, token_type, position, weight and bias, by the kernels."""
    lookup = Lookup(ids, type_ids, positions, word, token_type, position).contiguous()
    x = torch.empty(len(ids), word.shape[1], dtype=torch.float32, device=word.device)
    sum_launch(lookup, x)()
    d_sum, d_weight, d_bias = layer_norm.launch_backward(d_out, x, None, weight.contiguous(), mean, rstd)
    d_word, d_token_type, d_position = (launch_table(d_sum, *pair) for pair in lookup.pairs.values())
    return d_word, d_token_type, d_position, d_weight, d_bias


def launch_table(d_sum: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    """Return a table's gradient: of each row, the sum of `d_sum` over the tokens whose id it is."""
    sorted_ids, order = torch.sort(ids, stable=True)
    every_row = torch.arange(len(table) + 1, dtype=ids.dtype, device=ids.device)
    stretches = torch.searchsorted(sorted_ids, every_row)
    chunks = torch.empty(len(ids) // CHUNK, d_sum.shape[1], dtype=torch.float32, device=d_sum.device)
    d_table = torch.empty(table.shape, dtype=table.dtype, device=table.device)
    for launch in table_launches(d_sum, order, sorted_ids, stretches, chunks, d_table):
        launch()
    return d_table


def reference_backward(
    d_out: Tensor, ids: Tensor, type_ids: Tensor, positions: Tensor,
    word: Tensor, token_type: Tensor, position: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the same in plain torch."""
    lookup = Lookup(ids, type_ids, positions, word, token_type, position)
    d_sum, d_weight, d_bias = layer_norm.reference_backward(d_out, lookup.sum(), None, weight, mean, rstd)
    d_word, d_token_type, d_position = (
        torch.zeros(table.shape, device=table.device).index_add_(0, index, d_sum).to(table.dtype)
        for index, table in lookup.pairs.values()
    )
    return d_word, d_token_type, d_position, d_weight, d_bias


@torch.library.custom_op("minilm::embed", mutates_args=(), device_types="cuda")
def _forward(
    ids: Tensor, type_ids: Tensor, positions: Tensor, word: Tensor, token_type: Tensor, position: Tensor,
    weight: Tensor, bias: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return launch_forward(ids, type_ids, positions, word, token_type, position, weight, bias, eps)


@torch.library.custom_op("minilm::embed_backward", mutates_args=(), device_types="cuda")
def _backward(
    d_out: Tensor, ids: Tensor, type_ids: Tensor, positions: Tensor,
    word: Tensor, token_type: Tensor, position: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return launch_backward(d_out, ids, type_ids, positions, word, token_type, position, weight, mean, rstd)


@_forward.register_fake
def _(ids: Tensor, _: Tensor, __: Tensor, word: Tensor, *___: Any) -> tuple[Tensor, Tensor, Tensor]:
    mean = word.new_empty(ids.shape[0], dtype=torch.float32)
    return word.new_empty(ids.shape[0], word.shape[1]), mean, torch.empty_like(mean)


@_backward.register_fake
def _(
    _: Tensor, __: Tensor, ___: Tensor, ____: Tensor,
    word: Tensor, token_type: Tensor, position: Tensor, weight: Tensor, *_____: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    d_word, d_token_type, d_position = (table.new_empty(table.shape) for table in (word, token_type, position))
    return d_word, d_token_type, d_position, weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *lookup, weight, _, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(*lookup, weight, mean, rstd)


def _differentiate(ctx: Any, d_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return None, None, None, *_backward(d_out, *ctx.saved_tensors), None


_forward.register_kernel("cpu")(cpu_kernel(launch_forward, reference))
_backward.register_kernel("cpu")(cpu_kernel(launch_backward, reference_backward))
_forward.register_autograd(_differentiate, setup_context=_keep)


def embed(
    ids: Tensor, type_ids: Tensor, positions: Tensor, word: Tensor, token_type: Tensor, position: Tensor,
    weight: Tensor, bias: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """LN(word[ids] + token_type[type_ids] + position[positions]): `[T]` -> `[T, C]`, in the dtype of the word table.

    Differentiable in the tables, weight and bias.

    Args:
        ids: rows of `word`, int64 `[T]`.
        type_ids: rows of `token_type`, the same shape.
        positions: rows of `position`, the same shape.
        word: `[V, C]`, float16, bfloat16 or float32.
        token_type: `[2, C]`, or another number of rows.
        position: `[P, C]`.
        weight: LayerNorm's, `[C]`.
        bias: LayerNorm's, `[C]`.
        eps: added to the variance.

    Raises:
        ValueError: shapes that don't fit.
        IndexError: on the CPU, an id outside its table (on a GPU, its row of the output is NaN).
    """
    expect_shapes(
        "embed", ids=(ids, "T"), type_ids=(type_ids, "T"), positions=(positions, "T"), word=(word, "V C"),
        token_type=(token_type, "Y C"), position=(position, "P C"), weight=(weight, "C"), bias=(bias, "C"),
    )  # fmt: skip
    out: Tensor = _forward(ids, type_ids, positions, word, token_type, position, weight, bias, eps)[0]
    return out
