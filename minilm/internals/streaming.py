"""Many texts through the model in bounded memory: each tensor is seen by a visitor as it is computed, and let go."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from minilm.config import MiniLMConfig
from minilm.encoder import SentenceEncoder
from minilm.internals.captures import embed, pack
from minilm.internals.observed import Site, Visitors, observe
from minilm.internals.points import HEADS, PATTERN, Point, UnknownPointError, resolve
from minilm.progress import progress_bar
from minilm.texts import as_texts


def stream(
    encoder: SentenceEncoder,
    texts: str | Iterable[str],
    visitors: Visitors,
    *,
    on_truncate: str = "error",
    show_progress_bar: bool | None = None,
    description: str = "encode",
) -> None:
    """Encode texts in their order, a few thousand tokens at a time, for what visitors see; vectors are dropped.

    Args:
        encoder: whose; patches in force are seen.
        texts: one text or several.
        visitors: by point name, functions `(tensor, site) -> tensor or None`, as `observe` takes them.
        on_truncate: what becomes of a text over the length limit: `error`, `warn` or `ignore` (both cut it).
        show_progress_bar: `None` shows it if the `minilm` logger is at level INFO or below.
        description: what the bar says.

    Raises:
        ValueError: no text, or a text is too long.
    """
    batches = pack(encoder, list(as_texts(texts)[0]), on_truncate)  # type: ignore[arg-type]
    total = sum(batch.num_sequences for batch in batches)
    with observe(encoder, visitors), progress_bar(show_progress_bar, total, description, "text") as advance:
        for batch in batches:
            embed(encoder, batch)
            advance(batch.num_sequences)


def row_point(name: str, config: MiniLMConfig) -> Point:
    """Return the one point of a name whose tensor is rows of equal width, one a token or one a text.

    Raises:
        UnknownPointError: no such point, or several.
        ValueError: attention scores or patterns, whose rows are as wide as their text is long.
    """
    point, *others = resolve(name, config)
    if others:
        raise UnknownPointError(f"expected one point, and {name!r} means {1 + len(others)}: {point.name}, ...")
    if point.rows == PATTERN:
        raise ValueError(f"{point.name} [{point.shape}] has rows as wide as the text is long; choose another point")
    return point


def as_rows(value: Tensor, site: Site) -> Tensor:
    """Return a tensor in float32, detached: `[T, width]` or `[B, C]` as it is, heads `[T, H, D]` as `[T, C]`."""
    return (value.flatten(1) if site.point.rows == HEADS else value).detach().to(torch.float32)
