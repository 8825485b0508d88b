"""`patch` and `ablate`: within a `with` block, other values at named points; afterwards the model is as before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from minilm.encoder import SentenceEncoder
from minilm.internals.captures import Activations, Captured, capture
from minilm.internals.observed import ObservedBackend, Site, Visitor, observe
from minilm.internals.points import HEADS, PATTERN, TOKENS, VECTOR, Point, resolve

ABLATIONS = ("zero", "mean", "resample")
Place = tuple[int | slice, ...]  # which part of one text's tensor


@contextmanager
def patch(
    encoder: SentenceEncoder,
    points: str | Iterable[str],
    value: Tensor | float | Callable[[Tensor], Tensor],
    *,
    head: int | None = None,
    position: int | None = None,
) -> Iterator[ObservedBackend]:
    """Within a `with` block, put other values at some points, in every text that the encoder computes.

    Blocks nest; an inner one sees what an outer one has put there. Gradients flow through the new values.

    Args:
        encoder: whose.
        points: names, as `capture` takes them.
        value: a number, a tensor that broadcasts to the place it takes, or a function from what is there (of one text:
            `[L, C]`, `[L, H, D]`, `[H, L, L]` or `[C]`, less the dimensions chosen by `head` and `position`) to its
            replacement.
        head: change this head only.
        position: change this token only (-1 is the last, [SEP]); of scores and pattern: this row, its view of others.

    Raises:
        UnknownPointError: there is no point of a name given.
        ValueError: a point has no heads or positions; within the block, while encoding: a text has no such position, or
            the new value does not have the shape of the place.
    """

    def change(part: Tensor, place: Place) -> Tensor | float:
        return value(part[place]) if callable(value) else value

    chosen = resolve(points, encoder.config)
    visitors = {point.name: [_visitor(change, _place(point, head, position, encoder))] for point in chosen}
    with observe(encoder, visitors) as backend:
        yield backend


@contextmanager
def ablate(
    encoder: SentenceEncoder,
    points: str | Iterable[str],
    how: str = "zero",
    *,
    source: str | Iterable[str] | None = None,
    head: int | None = None,
    position: int | None = None,
) -> Iterator[ObservedBackend]:
    """Within a `with` block, take away what some points carry.

    Args:
        encoder: whose.
        points: names, as `capture` takes them.
        how: `zero`; `mean`: the mean over all tokens of the source texts; `resample`: what the source text has at the
            same position (tokens beyond its end take its last token's).
        source: the texts to take the mean of, or the text to take values from.
        head: this head only.
        position: this token only.

    Raises:
        UnknownPointError: there is no point of a name given.
        ValueError: an unknown way; a source missing or too much; a pattern's mean; else as `patch`.
    """
    places = {point.name: _place(point, head, position, encoder) for point in resolve(points, encoder.config)}
    lent = lend(encoder, places, how, source)
    visitors = {
        name: [_visitor(_replacement(how, lent[name] if lent else None), place)] for name, place in places.items()
    }
    with observe(encoder, visitors) as backend:
        yield backend


def lend(
    encoder: SentenceEncoder, points: Iterable[str], how: str, source: str | Iterable[str] | None
) -> Captured | None:
    """Return what source texts have at the points to be ablated; None if they are to be zero.

    Raises:
        ValueError: an unknown way; a source missing or too much; points that texts can't lend each other.
    """
    if how not in ABLATIONS:
        raise ValueError(f"how must be one of {', '.join(ABLATIONS)}; got {how!r}")
    if (source is None) != (how == "zero"):
        raise ValueError(f"{how} ablation takes {'no source' if how == 'zero' else 'source texts, got none'}")
    if source is None:
        return None
    chosen = resolve(points, encoder.config)
    if patterns := [point.name for point in chosen if point.rows == PATTERN]:
        raise ValueError(f"texts can't lend each other {patterns[0]}: it has a column for each token; use zero")
    lent = capture(encoder, source, [point.name for point in chosen])
    if how == "resample" and len(lent.texts) != 1:
        raise ValueError(f"resample ablation takes one source text, got {len(lent.texts)}")
    return lent


def _replacement(how: str, lent: Activations | None) -> Callable[[Tensor, Place], Tensor | float]:
    """Return what an ablation puts in a place, given what the source texts lend."""
    mean = lent.packed.mean(dim=0) if lent is not None and how == "mean" else None

    def replacement(part: Tensor, place: Place) -> Tensor | float:
        if lent is None:
            return 0.0
        if mean is not None:
            return mean.expand_as(part)[place]
        source = lent[0]
        return source[torch.arange(len(part)).clamp(max=len(source) - 1)][place]

    return replacement


def _visitor(change: Callable[[Tensor, Place], Tensor | float], place: Place) -> Visitor:
    """Make a visitor that puts `change(part, place)` into a place of each text's part of a tensor."""

    def visit(value: Tensor, site: Site) -> Tensor:
        parts = []
        for part in site.split(value):
            _check_position(place, part, site.point)
            new = torch.as_tensor(change(part, place), dtype=value.dtype, device=value.device)
            changed = part.clone()
            try:
                changed[place] = new.expand_as(part[place])
            except RuntimeError:
                wanted, got = list(part[place].shape), list(new.shape)
                raise ValueError(f"a patch of {site.point.name} takes {wanted} of this text, got {got}") from None
            parts.append(changed)
        return site.join(parts)

    return visit


def _place(point: Point, head: int | None, position: int | None, encoder: SentenceEncoder) -> Place:
    """Return the index of a head and a position, either or both of which may be all, in one text's tensor.

    Raises:
        ValueError: the point has no heads, not this head, or no positions.
    """
    num_heads = encoder.config.num_heads
    if head is not None and point.rows not in (HEADS, PATTERN):
        raise ValueError(f"{point.name} [{point.shape}] has no heads to choose from, got head {head}")
    if head is not None and not -num_heads <= head < num_heads:
        raise ValueError(f"head must be from 0 to {num_heads - 1}, got {head}")
    if position is not None and point.rows == VECTOR:
        raise ValueError(f"{point.name} [{point.shape}] has no positions to choose from, got position {position}")
    heads = slice(None) if head is None else head
    tokens = slice(None) if position is None else position
    return {TOKENS: (tokens,), HEADS: (tokens, heads), PATTERN: (heads, tokens), VECTOR: ()}[point.rows]


def _check_position(place: Place, part: Tensor, point: Point) -> None:
    """Raise a ValueError if a text has no such position."""
    if point.rows == VECTOR:
        return
    dimension = 1 if point.rows == PATTERN else 0
    position, length = place[dimension], part.shape[dimension]
    if isinstance(position, int) and not -length <= position < length:
        raise ValueError(f"{point.name} has no position {position} in a text of {length} tokens")
