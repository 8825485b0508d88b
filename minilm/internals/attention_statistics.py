"""Where each head looks, on average over texts: how widely, how far, and at which tokens.

Source: Clark et al. 2019, "What does BERT look at?" (https://arxiv.org/abs/1906.04341), for one; averages here are over
all tokens that look (rows of the pattern), [CLS] and [SEP] included, so that longer texts count for more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minilm.encoder import SentenceEncoder
from minilm.evaluate.result import aligned
from minilm.internals.observed import Site
from minilm.internals.streaming import stream

PerHead = NDArray[np.float64]


@dataclass(frozen=True, eq=False, repr=False)
class AttentionStatistics:
    """Averages of every head's attention pattern p, each float64 `[layers, heads]`.

    Attributes:
        entropy: -Σ p·log p of a row, in nats: 0 if a token looks at one only, log L if at all L alike.
        distance: Σ p·|i - j|, in tokens.
        to_cls: p of the first token.
        to_sep: p of the last.
        to_self: p of the token itself.
        to_previous: p of the token before; the first token has none and is left out.
        to_next: p of the token after; the last token has none and is left out.
    """

    entropy: PerHead
    distance: PerHead
    to_cls: PerHead
    to_sep: PerHead
    to_self: PerHead
    to_previous: PerHead
    to_next: PerHead

    @property
    def heads(self) -> list[str]:
        """The heads' names, in the order of the flattened figures: `layers.3.attention.heads.5`."""
        num_layers, num_heads = self.entropy.shape
        return [f"layers.{layer}.attention.heads.{head}" for layer in range(num_layers) for head in range(num_heads)]

    def table(self, sort_by: str | None = None) -> str:
        """Lay all heads out as text, a row a head, by falling value of a figure if one is named.

        Raises:
            ValueError: there is no such figure.
        """
        names = [field.name for field in fields(self)]
        if sort_by is not None and sort_by not in names:
            raise ValueError(f"sort_by must be one of {', '.join(names)}; got {sort_by!r}")
        values = np.stack([getattr(self, name).ravel() for name in names], axis=1)
        order = range(len(values)) if sort_by is None else np.argsort(-values[:, names.index(sort_by)], kind="stable")
        heads = self.heads
        return aligned([["head", *names], *([heads[row], *(f"{v:.3f}" for v in values[row])] for row in order)])

    __repr__ = table


def attention_statistics(
    encoder: SentenceEncoder,
    texts: str | Iterable[str],
    *,
    on_truncate: str = "error",
    show_progress_bar: bool | None = None,
) -> AttentionStatistics:
    """Measure where every head looks; patterns are summed as they are computed, so memory does not grow with texts.

    Args:
        encoder: whose heads; patches in force are seen.
        texts: one text or several; an equal one counts again.
        on_truncate: what becomes of a text over the length limit: `error`, `warn` or `ignore` (both cut it).
        show_progress_bar: `None` shows it if the `minilm` logger is at level INFO or below.

    Raises:
        ValueError: no text, or a text is too long.
    """
    config = encoder.config
    names = [field.name for field in fields(AttentionStatistics)]
    sums = torch.zeros(config.num_layers, len(names), config.num_heads, dtype=torch.float64)
    counts = torch.zeros(len(names), 1, dtype=torch.float64)  # rows that each average is over

    def add(layer: int, pattern: Tensor, site: Site) -> None:  # noqa: ARG001 - a visitor's arguments
        num_texts, _, length, _ = pattern.shape
        sums[layer] += torch.stack([figures.sum(dim=(0, 2)) for figures in _figures(pattern.detach().float())]).cpu()
        if layer == 0:
            rows = torch.tensor([length] * 5 + [length - 1] * 2)
            counts.add_(num_texts * rows.unsqueeze(1))

    visitors = {f"layers.{layer}.attention.pattern": [partial(add, layer)] for layer in range(config.num_layers)}
    stream(encoder, texts, visitors, on_truncate=on_truncate, show_progress_bar=show_progress_bar)
    means = (sums / counts).numpy()
    return AttentionStatistics(**{name: means[:, index] for index, name in enumerate(names)})


def _figures(pattern: Tensor) -> list[Tensor]:
    """Return every figure of each row of patterns `[n, H, L, L]`, in `AttentionStatistics`' order: `[n, H, L]`."""
    places = torch.arange(pattern.shape[-1], device=pattern.device)
    distances = (places - places.unsqueeze(1)).abs()
    return [
        torch.special.entr(pattern).sum(dim=-1),
        (pattern * distances).sum(dim=-1),
        pattern[..., 0],
        pattern[..., -1],
        pattern.diagonal(dim1=-2, dim2=-1),
        pattern.diagonal(-1, dim1=-2, dim2=-1),
        pattern.diagonal(1, dim1=-2, dim2=-1),
    ]
