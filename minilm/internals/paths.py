"""Where in the model two texts part: values of one put into the computation of the other, place by place.

Both texts have as many tokens. The corrupted one is computed, with some values of the clean one in it, and the score of
what comes out says how much of the way from one text to the other those values carry:

    share = (score(patched) - score(corrupted)) / (score(clean) - score(corrupted))

It is 0 where nothing changes and 1 where the clean text's score is restored; it may lie outside. Swap the two texts to
see what breaks the score instead of what restores it.

`patching_grid` puts in one place at a time (activation patching, causal tracing: Vig et al. 2020, Investigating Gender
Bias; Meng et al. 2022, Locating and Editing Factual Associations). What is put in acts on everything after it.
`path_effects` follows single paths (path patching: Wang et al. 2022, Interpretability in the Wild; Goldowsky-Dill et
al. 2023, Localizing Model Behavior with Path Patching). A sender's output is replaced while all other components keep
what they put out for the corrupted text, so that the change reaches the receivers by the residual stream and its
LayerNorms alone; what the receivers then read is put into a second, otherwise free run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from minilm import threads
from minilm.encoder import SentenceEncoder
from minilm.evaluate.result import aligned
from minilm.internals.captures import Captured, capture, pack
from minilm.internals.causal import Component, components, ranked
from minilm.internals.observed import Site, Visitor, observe
from minilm.internals.points import HEADS, PATTERN, TOKENS, VECTOR, Point, hidden_states, resolve
from minilm.internals.replay import TOKENS_AT_ONCE, Replay, layer_of
from minilm.progress import progress_bar
from minilm.texts import check_text

Metric = Callable[[Tensor], Tensor]
"""A score of each of some embeddings: `[n, C]` -> `[n]`."""

BY = ("position", "head")
INPUTS = ("query", "key", "value")


def cosine_to(encoder: SentenceEncoder, text: str) -> Metric:
    """Return the metric of a pair: the cosine to a text's embedding."""
    embedding = capture(encoder, text, []).embeddings.double()
    return lambda vectors: torch.cosine_similarity(vectors.double(), embedding, dim=-1)


@dataclass(frozen=True, eq=False)
class PatchingGrid:
    """What `patching_grid` found.

    Attributes:
        rows: the points' names.
        columns: positions, as `3 cat > dog` (corrupted > clean where they differ), or heads, as `head 5`.
        shares: how much of the way to the clean text's score each place restores, float64 `[rows, columns]`.
        clean: the clean text's score.
        corrupted: the corrupted one's.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    shares: Tensor
    clean: float
    corrupted: float

    def ranked(self) -> list[tuple[str, float]]:
        """Return places and their shares, the largest first, of either sign."""
        return ranked([f"{row}, {column}" for row in self.rows for column in self.columns], self.shares.flatten())

    def table(self) -> str:
        """Lay the shares out as text, a row a point."""
        shares = [[f"{100 * share:.0f}" for share in row] for row in self.shares.tolist()]
        rows = [[name, *row] for name, row in zip(self.rows, shares, strict=True)]
        return f"{_way(self.clean, self.corrupted)}, in hundredths\n\n{aligned([['point', *self.columns], *rows])}"


@dataclass(frozen=True, eq=False)
class PathEffects:
    """What `path_effects` found.

    Attributes:
        senders: the components' names.
        receivers: the names of those that read the change.
        shares: how much of the way to the clean text's score each sender's paths restore, float64 `[senders]`.
        clean: the clean text's score.
        corrupted: the corrupted one's.
    """

    senders: tuple[str, ...]
    receivers: tuple[str, ...]
    shares: Tensor
    clean: float
    corrupted: float

    def ranked(self) -> list[tuple[str, float]]:
        """Return senders and their shares, the largest first, of either sign."""
        return ranked(self.senders, self.shares)

    def table(self, most: int = 20) -> str:
        """Lay the largest shares out as text."""
        receivers = self.receivers[0] if len(self.receivers) == 1 else f"{len(self.receivers)} receivers"
        rows = [[name, f"{share:+.4f}"] for name, share in self.ranked()[:most]]
        return f"{_way(self.clean, self.corrupted)}\n\n{aligned([[f'paths to {receivers} from', 'share'], *rows])}"


def _way(clean: float, corrupted: float) -> str:
    """Say between which scores shares are."""
    return f"shares of the way from {corrupted:.4f} (corrupted) to {clean:.4f} (clean)"


@threads.fork_safe
def patching_grid(
    encoder: SentenceEncoder,
    clean: str,
    corrupted: str,
    points: str | Iterable[str] | None = None,
    *,
    by: str = "position",
    metric: Metric | None = None,
    show_progress_bar: bool | None = None,
) -> PatchingGrid:
    """Put values of the clean text into the corrupted one, point by point and position by position, or head by head.

    Args:
        encoder: whose; patches in force are seen.
        clean: a text.
        corrupted: another, of as many tokens.
        points: the grid's rows; by default the embeddings and each layer's output, or each layer's `head_outputs`.
        by: the grid's columns: `position` or `head`.
        metric: the score; by default the cosine to the clean text, for that of a pair `cosine_to(encoder, text)`.
        show_progress_bar: `None` shows it if the `minilm` logger is at level INFO or below.

    Raises:
        UnknownPointError: there is no point of a name given.
        ValueError: token counts or text lengths that don't fit; a point without positions or heads; a score that is
            the same for both texts.
    """
    if by not in BY:
        raise ValueError(f"by must be one of {', '.join(BY)}; got {by!r}")
    if points is None:
        points = hidden_states(encoder.config) if by == "position" else "layers.*.attention.head_outputs"
    chosen = resolve(points, encoder.config)
    dimensions = [_dimension(point, by) for point in chosen]
    with observe(encoder, {}):
        texts = _Contrast.of(encoder, clean, corrupted, [point.name for point in chosen], metric)
        columns = texts.positions if by == "position" else tuple(f"head {k}" for k in range(encoder.config.num_heads))
        shares = torch.empty(len(chosen), len(columns), dtype=torch.float64)
        with progress_bar(show_progress_bar, len(chosen), "patch", "point") as advance:
            for point, dimension, row in zip(chosen, dimensions, shares, strict=True):
                for places in torch.arange(len(columns)).split(texts.copies_at_once):
                    put = partial(_put, texts.clean[point.name], dimension, places.tolist())
                    vectors = texts.replay(len(places), {point.name: [put]}, layer_of(point.name))
                    row[places] = texts.share(vectors)
                advance(1)
    return PatchingGrid(tuple(point.name for point in chosen), columns, shares, *texts.scores)


@threads.fork_safe
def path_effects(
    encoder: SentenceEncoder,
    clean: str,
    corrupted: str,
    senders: str | Iterable[str] = "*",
    receivers: str | Iterable[str] = "embedding",
    *,
    inputs: Iterable[str] = INPUTS,
    freeze_feed_forwards: bool = True,
    metric: Metric | None = None,
) -> PathEffects:
    """Let senders, one at a time, tell the receivers, and nobody else, what they put out for the clean text.

    A sender that no receiver comes after has a share of 0.

    Args:
        encoder: whose; patches in force are seen.
        clean: a text.
        corrupted: another, of as many tokens.
        senders: names of heads and feed-forwards, as `layers.3.attention.heads.5`, `layers.3.feed_forward`, `*`.
        receivers: names of heads and feed-forwards, which all read the change; or `embedding`, the end of the model.
        inputs: of receiving heads: what they read the change with: `query`, `key`, `value`.
        freeze_feed_forwards: keep the feed-forwards on the way as they are for the corrupted text, as all heads are
            (Goldowsky-Dill et al.); if false, they are parts of the paths (Wang et al.).
        metric: the score; by default the cosine to the clean text, for that of a pair `cosine_to(encoder, text)`.

    Raises:
        UnknownPointError: there is no component of a name given.
        ValueError: token counts or text lengths that don't fit; `embedding` with other receivers; unknown inputs; a
            score that is the same for both texts.
    """
    sending, receiving = components(encoder.config, senders), _receivers(encoder, receivers)
    inputs = [inputs] if isinstance(inputs, str) else list(inputs)
    if not inputs or set(inputs) - set(INPUTS):
        raise ValueError(f"inputs must be some of {', '.join(INPUTS)}; got {', '.join(inputs) or 'none'}")
    shares: list[Tensor] = []
    with observe(encoder, {}):
        points = [
            point.name
            for point in resolve(["layers.*.attention.head_outputs", "layers.*.feed_forward.output"], encoder.config)
        ]
        texts = _Contrast.of(encoder, clean, corrupted, points, metric)
        free = [] if freeze_feed_forwards else [name for name in points if "feed_forward" in name]
        reads = [(point, receiver) for receiver in receiving for point in _inputs(receiver, inputs)]
        for start in range(0, len(sending), texts.copies_at_once):
            group = sending[start : start + texts.copies_at_once]
            read: dict[str, Tensor] = {}
            visitors: dict[str, list[Visitor]] = {point: [partial(_keep, read)] for point, _ in reads}
            for name in points:
                frozen = None if name in free else texts.corrupted[name]
                visitors[name] = [partial(_send, group, texts.clean[name], frozen)]
            vectors = texts.replay(len(group), visitors)
            if receiving:
                visitors = {point: [] for point, _ in reads}
                for point, receiver in reads:
                    visitors[point].append(partial(_receive, receiver, read))
                vectors = texts.replay(len(group), visitors, receiving[0].layer)
            shares.append(texts.share(vectors))
    names = tuple(receiver.name for receiver in receiving) or ("embedding",)
    return PathEffects(tuple(sender.name for sender in sending), names, torch.cat(shares), *texts.scores)


@dataclass(frozen=True, eq=False)
class _Contrast:
    """Two texts of as many tokens, and a metric that is 0 of the one and 1 of the other.

    Attributes:
        clean: by point, the clean text's values.
        corrupted: the corrupted one's.
        replay: the corrupted text, to be computed again.
        metric: the score.
        scores: the clean text's and the corrupted one's.
        positions: a label for each position.
    """

    clean: Mapping[str, Tensor]
    corrupted: Mapping[str, Tensor]
    replay: Replay = field(repr=False)
    metric: Metric
    scores: tuple[float, float]
    positions: tuple[str, ...]

    @classmethod
    def of(
        cls, encoder: SentenceEncoder, clean: str, corrupted: str, points: Sequence[str], metric: Metric | None
    ) -> _Contrast:
        """Compute both.

        Raises:
            ValueError: they have not as many tokens, or the same score.
        """
        both = capture(
            encoder, [check_text(clean, "the clean text"), check_text(corrupted, "the corrupted text")], points
        )
        if len(both.tokens[0]) != len(both.tokens[1]):
            raise ValueError(
                f"both texts must have as many tokens; got {len(both.tokens[0])} ({' '.join(both.tokens[0])}) "
                f"and {len(both.tokens[1])} ({' '.join(both.tokens[1])})"
            )
        metric = metric or cosine_to(encoder, clean)
        first, second = metric(both.embeddings).tolist()
        if abs(first - second) < 1e-6:
            raise ValueError(f"the score must differ between the texts; it is {first:.6f} and {second:.6f}")
        values = [{name: found[index] for name, found in both.activations.items()} for index in (0, 1)]
        replay = Replay(encoder, pack(encoder, [corrupted])[0])
        return cls(values[0], values[1], replay, metric, (first, second), _positions(both))

    @property
    def copies_at_once(self) -> int:
        """How many copies of the corrupted text are to share a batch."""
        return max(1, TOKENS_AT_ONCE // self.replay.batch.num_tokens)

    def share(self, vectors: Tensor) -> Tensor:
        """Return the share of the way from the corrupted score to the clean one: `[n, 1, C]` -> `[n]`."""
        clean, corrupted = self.scores
        return (self.metric(vectors.squeeze(1)).double().cpu() - corrupted) / (clean - corrupted)


def _positions(both: Captured) -> tuple[str, ...]:
    """Label positions by the two texts' tokens there."""
    pairs = zip(*both.tokens, strict=True)
    return tuple(f"{index} {new if new == old else f'{old} > {new}'}" for index, (new, old) in enumerate(pairs))


def _dimension(point: Point, by: str) -> int:
    """Return which dimension of one text's tensor is that of positions, or of heads."""
    found = {
        TOKENS: {"position": 0},
        HEADS: {"position": 0, "head": 1},
        PATTERN: {"position": 1, "head": 0},
        VECTOR: {},
    }
    if by not in found[point.rows]:
        raise ValueError(f"{point.name} [{point.shape}] has no {by}s to patch one by one")
    return found[point.rows][by]


def _receivers(encoder: SentenceEncoder, names: str | Iterable[str]) -> list[Component]:
    """Return the components that are to read a change; none if it is the end of the model.

    Raises:
        ValueError: the end, and others.
    """
    names = [names] if isinstance(names, str) else list(names)
    if "embedding" not in names:
        return components(encoder.config, names)
    if len(names) > 1:
        raise ValueError(f"embedding is where every path ends: name it alone, not with {len(names) - 1} others")
    return []


def _inputs(receiver: Component, inputs: Iterable[str]) -> list[str]:
    """Return the points where a component reads."""
    if receiver.head is None:
        return [f"layers.{receiver.layer}.feed_forward.pre_activation"]
    return [f"layers.{receiver.layer}.attention.{which}" for which in inputs]


# Visitors; each copy of the corrupted text is changed in its own way.


def _put(new: Tensor, dimension: int, places: Sequence[int], value: Tensor, site: Site) -> Tensor:
    """Put another text's values into one place in each copy."""
    changed = value.clone()
    copies = changed if site.point.rows == PATTERN else changed.unflatten(0, (len(places), -1))
    for copy, place in zip(copies, places, strict=True):
        copy.select(dimension, place).copy_(new.select(dimension, place))
    return changed


def _send(group: Sequence[Component], new: Tensor, frozen: Tensor | None, value: Tensor, site: Site) -> Tensor:
    """Let one component in each copy put out what it did for another text, and all others what is frozen, if it is."""
    changed = value.clone() if frozen is None else torch.cat([frozen] * len(group))
    for component, copy in zip(group, changed.unflatten(0, (len(group), -1)), strict=True):
        if component.point == site.point.name:
            component.of(copy)[:] = component.of(new)
    return changed


def _keep(kept: dict[str, Tensor], value: Tensor, site: Site) -> None:
    """Keep what is there."""
    kept[site.point.name] = value


def _receive(receiver: Component, read: Mapping[str, Tensor], value: Tensor, site: Site) -> Tensor:
    """Let one component read what was kept."""
    changed = value.clone()
    receiver.of(changed)[:] = receiver.of(read[site.point.name])
    return changed
