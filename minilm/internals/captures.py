"""`capture`: the values of named points for some texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, overload

import torch
from torch import Tensor

from minilm import threads
from minilm.batch import PackedBatch
from minilm.config import MiniLMConfig
from minilm.embed import pooled_vectors
from minilm.encoder import SentenceEncoder
from minilm.internals.observed import Site, observe
from minilm.internals.points import PATTERN, VECTOR, Point, UnknownPointError, resolve
from minilm.texts import as_texts

BATCH_TOKENS = 4_096


class Activations(Sequence[Tensor]):
    """The values of one point, text by text.

    Attributes:
        point: which.
        values: one tensor for each text: `[L, C]`, `[L, F]`, `[L, H, D]`, `[H, L, L]` or `[C]`, as `point.shape` says.
    """

    def __init__(self, point: Point, values: list[Tensor]) -> None:
        self.point = point
        self.values = values

    def __len__(self) -> int:
        """Count the texts."""
        return len(self.values)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        """Return the values of one text, or of several."""
        return self.values[index]

    @cached_property
    def packed(self) -> Tensor:
        """All texts' rows one after the other, `[T, ...]`; of a point with one row a text, `[B, C]`.

        Raises:
            ValueError: an attention pattern, whose width differs from text to text; use `padded`.
        """
        if self.point.rows == VECTOR:
            return torch.stack(self.values)
        if self.point.rows == PATTERN:
            raise ValueError(
                f"{self.point.name} has a row and a column for each token; `padded` lays texts side by side"
            )
        return torch.cat(self.values)

    def padded(self, fill: float = 0.0) -> Tensor:
        """All texts in one tensor, every L filled up to the longest text's S: `[B, S, ...]`, or `[B, H, S, S]`."""
        shapes = torch.tensor([value.shape for value in self.values])
        padded = self.values[0].new_full((len(self.values), *shapes.amax(dim=0).tolist()), fill)
        for row, value in zip(padded, self.values, strict=True):
            row[tuple(map(slice, value.shape))] = value
        return padded

    def __repr__(self) -> str:
        """Name the point, and how much there is of it."""
        return f"Activations({self.point.name} [{self.point.shape}] of {len(self)} texts)"


@dataclass(frozen=True)
class Captured:
    """What `capture` returns: `captured["layers.3.output"][0]` is that tensor of the first text.

    Attributes:
        texts: the texts.
        tokens: the word pieces of each, special tokens included.
        activations: by point name; indexing understands TransformerLens' names, too.
        config: the model's sizes.
    """

    texts: list[str]
    tokens: list[list[str]]
    activations: dict[str, Activations]
    config: MiniLMConfig

    def __getitem__(self, name: str) -> Activations:
        """Return the values of one point.

        Raises:
            UnknownPointError: no such point, or it was not captured.
        """
        (point, *others) = resolve(name, self.config)
        if others or point.name not in self.activations:
            raise UnknownPointError(f"{name} is not among the points captured: {', '.join(self.activations)}")
        return self.activations[point.name]

    @property
    def embeddings(self) -> Tensor:
        """The texts' vectors, `[B, C]`: the point `embedding`, which is always captured."""
        return self.activations["embedding"].packed


def capture(
    encoder: SentenceEncoder,
    texts: str | Iterable[str],
    points: str | Iterable[str] = "*",
    *,
    gradients: bool = False,
    on_truncate: str = "error",
) -> Captured:
    """Encode texts and keep the values of some points.

    Args:
        encoder: whose; patches in force are seen.
        texts: one text or several.
        points: names, in which `*` stands for anything, or TransformerLens' names; everything by default.
        gradients: keep the graph, so that one can differentiate through what is returned.
        on_truncate: what becomes of a text over the length limit: `error`, `warn` or `ignore` (both cut it).

    Raises:
        UnknownPointError: there is no point of a name given.
        ValueError: no text, or a text is too long.
    """
    checked: list[Any] = as_texts(texts)[0]
    chosen = resolve([*([points] if isinstance(points, str) else points), "embedding"], encoder.config)
    values = {point.name: [torch.empty(0)] * len(checked) for point in chosen}
    batches = pack(encoder, checked, on_truncate)
    done = 0
    for batch in batches:
        visitors = {name: [partial(_keep, kept, done)] for name, kept in values.items()}
        with observe(encoder, visitors):
            embed(encoder, batch, gradients=gradients)
        done += batch.num_sequences
    tokens = [encoder.tokenizer.tokens(ids.tolist()) for batch in batches for ids in batch.ids.split(batch.lengths)]
    activations = {point.name: Activations(point, values[point.name]) for point in chosen}
    return Captured(checked, tokens, activations, encoder.config)


def pack(encoder: SentenceEncoder, texts: Sequence[str], on_truncate: str = "error") -> list[PackedBatch]:
    """Pack texts in their order, a few thousand tokens a batch, on the encoder's device.

    Raises:
        ValueError: no text, or a text is too long and `on_truncate` is `error`.
    """
    if not texts:
        raise ValueError("expected at least one text, got none")
    padded = encoder.tokenize(texts, on_truncate=on_truncate)
    columns = ("input_ids", "attention_mask", "token_type_ids")
    size = max(1, BATCH_TOKENS // padded["input_ids"].shape[1])
    parts = zip(*(padded[column].split(size) for column in columns), strict=True)
    return [PackedBatch.from_padded(*part).to(encoder.device) for part in parts]


def embed(encoder: SentenceEncoder, batch: PackedBatch, *, gradients: bool = False) -> Tensor:
    """Return the vectors `[B, C]` of a packed batch, as `encode` would, with a graph to differentiate if asked for."""
    encoder.model.eval()
    with torch.set_grad_enabled(gradients):
        return threads.run(lambda: pooled_vectors(encoder.model, batch, encoder.encoding, encoder.encoding.normalize))


def _keep(values: list[Tensor], first: int, value: Tensor, site: Site) -> Tensor:
    """Put each text's part of a tensor into its place; `first`: the place of the batch's first text.

    What is computed goes on from these parts, so that one can differentiate with respect to them.
    """
    parts = site.split(value)
    for index, part in zip(site.texts, parts, strict=True):
        values[first + index] = part
    return site.join(parts) if value.requires_grad else value
