"""What each head and feed-forward does to a score: the score with it ablated, for all of them in one call.

    effect[c] = score(model without c) - score(model)

The score is the cosine of a pair, the mean of several pairs' cosines, or, where people's scores are given, Spearman's
correlation with them x 100. "Without" is one of three (`minilm.internals.ablate`): a component's output is set to
zero, to its mean over some texts, or to what it is in another text. Zero takes a model out of what it has seen in
training, so that it overstates; the other two do less (Wang et al. 2022, Interpretability in the Wild, mean ablation;
Chan et al. 2022, Causal Scrubbing, resampling).

All components of a layer are ablated in one batch, each in a copy of the texts of its own, and layers below it are not
computed again: 45 times the work of encoding the texts once, where one at a time takes 78 times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property, partial
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from minilm import threads
from minilm.batch import PackedBatch
from minilm.config import MiniLMConfig
from minilm.embed import plan_batches
from minilm.encoder import SentenceEncoder
from minilm.evaluate.correlation import spearman
from minilm.evaluate.result import aligned
from minilm.internals.observed import Site, Visitors, observe
from minilm.internals.patches import lend
from minilm.internals.points import UnknownPointError, matches
from minilm.internals.replay import TOKENS_AT_ONCE, Replay
from minilm.progress import progress_bar
from minilm.texts import as_texts


class Component(NamedTuple):
    """A head, or (`head` is None) the feed-forward, of a layer."""

    layer: int
    head: int | None

    @property
    def name(self) -> str:
        """`layers.3.attention.heads.5` or `layers.3.feed_forward`."""
        return f"layers.{self.layer}." + ("feed_forward" if self.head is None else f"attention.heads.{self.head}")

    @property
    def point(self) -> str:
        """The point that holds what it puts out: `[L, H, D]` of a layer's heads, or `[L, C]` of a feed-forward."""
        return f"layers.{self.layer}." + ("feed_forward.output" if self.head is None else "attention.head_outputs")

    def of(self, value: Tensor) -> Tensor:
        """Return its part, a view, of a tensor `[..., H, D]` or `[..., C]` of its point."""
        return value if self.head is None else value[..., self.head, :]


def components(config: MiniLMConfig, names: str | Iterable[str] = "*") -> list[Component]:
    """Return the heads and feed-forwards that names mean, each once, in the order of computation.

    Args:
        config: the model's sizes.
        names: one or more, with `*` and `**` as in `minilm.internals.points` (`layers.3.**`, `layers.*.feed_forward`).

    Raises:
        UnknownPointError: a name that means none; the nearest are suggested.
    """
    places = ((layer, head) for layer in range(config.num_layers) for head in (*range(config.num_heads), None))
    known = {component.name: component for component in (Component(*place) for place in places)}
    chosen: set[str] = set()
    for name in [names] if isinstance(names, str) else names:
        found = [each for each in known if matches(each, name)]
        if not found:
            near = get_close_matches(name, known, n=3, cutoff=0.5) or ["layers.3.attention.heads.5"]
            raise UnknownPointError(f"no component is called {name!r}; did you mean {' or '.join(near)}?")
        chosen.update(found)
    return [component for name, component in known.items() if name in chosen]


@dataclass(frozen=True, eq=False)
class AblationEffects:
    """What `ablation_effects` found.

    Attributes:
        components: the K components' names.
        how: how they were ablated.
        intact: each pair's cosine by the model as it is, float64 `[n]`.
        ablated: and with each component ablated, float64 `[K, n]`.
        gold: the pairs' similarities as people see them, float64 `[n]`, where given.
    """

    components: tuple[str, ...]
    how: str
    intact: Tensor
    ablated: Tensor
    gold: Tensor | None = None

    @property
    def measure(self) -> str:
        """What `score` is."""
        pairs = len(self.intact)
        if self.gold is not None:
            return f"Spearman x 100 of {pairs} pairs"
        return "cosine" if pairs == 1 else f"mean cosine of {pairs} pairs"

    @cached_property
    def score(self) -> float:
        """The score of the model as it is: Spearman's correlation with `gold` x 100 if given, else the mean cosine."""
        return self._score(self.intact)

    @cached_property
    def effects(self) -> Tensor:
        """By how much ablating each component changes the score, float64 `[K]`: below 0, the score needs it."""
        return torch.tensor([self._score(cosines) for cosines in self.ablated], dtype=torch.float64) - self.score

    def ranked(self) -> list[tuple[str, float]]:
        """Return components and effects, the largest effect, of either sign, first."""
        return ranked(self.components, self.effects)

    def table(self, most: int = 20) -> str:
        """Lay the largest effects out as text."""
        rows = [[name, f"{self.score + effect:.4f}", f"{effect:+.4f}"] for name, effect in self.ranked()[:most]]
        return f"{self.measure}: {self.score:.4f}\n\n{aligned([[f'{self.how} ablation of', 'score', 'effect'], *rows])}"

    def _score(self, cosines: Tensor) -> float:
        """Score cosines; of ranks, rounded to what float32 vectors tell apart, as `minilm.evaluate` does it."""
        if self.gold is None:
            return float(cosines.mean())
        return 100 * spearman(cosines.numpy().round(7), self.gold.numpy())


@threads.fork_safe
def ablation_effects(
    encoder: SentenceEncoder,
    first: str | Iterable[str],
    second: str | Iterable[str],
    gold: Sequence[float] | None = None,
    *,
    how: str = "zero",
    source: str | Iterable[str] | None = None,
    names: str | Iterable[str] = "*",
    show_progress_bar: bool | None = None,
) -> AblationEffects:
    """Ablate heads and feed-forwards one by one, and score one or many pairs of texts each time.

    For STS-B: `pairs = read_sts(folder, ["stsb"], "dev")["stsb"]["dev"]`, then
    `ablation_effects(encoder, pairs.first, pairs.second, pairs.scores)`: 1,500 pairs, some minutes on two cores.

    Args:
        encoder: whose; patches in force are seen.
        first: a text, or one of each pair.
        second: the text it is compared with, or those.
        gold: people's scores of the pairs; then effects are on Spearman's correlation with them.
        how: `zero`, `mean` or `resample`, as `ablate` takes it.
        source: the texts to take the mean of, or the text to take values from.
        names: of the components; all by default.
        show_progress_bar: `None` shows it if the `minilm` logger is at level INFO or below.

    Raises:
        UnknownPointError: there is no component of a name given.
        ValueError: numbers of texts or scores that differ; an unknown way; a source missing or too much; a text too
            long; scores that are all the same.
    """
    pairs, scores = _pairs(first, second), None if gold is None else torch.tensor(gold, dtype=torch.float64)
    if scores is not None and scores.shape != (len(pairs),):
        raise ValueError(f"expected a score for each of {len(pairs)} pairs, got {list(scores.shape)}")
    if scores is not None and len(scores.unique()) < 2:
        raise ValueError("a correlation takes at least two pairs of different scores; leave gold out for cosines")
    chosen = components(encoder.config, names)
    layers = [list(group) for _, group in groupby(chosen, key=lambda component: component.layer)]
    intact = torch.empty(len(pairs), dtype=torch.float64)
    ablated = torch.empty(len(chosen), len(pairs), dtype=torch.float64)
    with observe(encoder, {}), progress_bar(show_progress_bar, len(pairs), "ablate", "pair") as advance:
        replacement = _replacement(encoder, chosen, how, source)
        tokens = encoder.tokenize([text for pair in pairs for text in pair], on_truncate="error")
        lengths = tokens["attention_mask"].sum(dim=1).view(-1, 2)  # of pairs
        for indices in plan_batches(lengths.sum(dim=1).tolist(), TOKENS_AT_ONCE // max(map(len, layers))):
            rows = torch.tensor(indices).mul(2).unsqueeze(1).add(torch.arange(2)).flatten()
            columns = (tokens[name][rows] for name in ("input_ids", "attention_mask", "token_type_ids"))
            replay = Replay(encoder, PackedBatch.from_padded(*columns).to(encoder.device))
            intact[indices] = _cosines(replay(1, {}, encoder.config.num_layers))[0]
            done = 0
            for group in layers:
                visitors = _ablating(group, partial(replacement, positions=replay.batch.positions))
                cosines = _cosines(replay(len(group), visitors, group[0].layer))
                ablated[done : done + len(group), indices] = cosines
                done += len(group)
            advance(len(indices))
    return AblationEffects(tuple(component.name for component in chosen), how, intact, ablated, scores)


def ranked(names: Sequence[str], values: Tensor) -> list[tuple[str, float]]:
    """Return names with their values, the largest magnitude first."""
    return sorted(zip(names, values.tolist(), strict=True), key=lambda item: -abs(item[1]))


def _pairs(first: str | Iterable[str], second: str | Iterable[str]) -> list[tuple[str, str]]:
    """Return texts as pairs.

    Raises:
        ValueError: there are none, or not as many on both sides.
    """
    left, right = as_texts(first)[0], as_texts(second)[0]
    if len(left) != len(right) or not left:
        raise ValueError(f"expected as many second texts as first, one at least; got {len(left)} and {len(right)}")
    return list(zip(left, right, strict=True))  # type: ignore[arg-type]


def _replacement(
    encoder: SentenceEncoder, chosen: Sequence[Component], how: str, source: str | Iterable[str] | None
) -> Callable[..., Tensor | float]:
    """Return a function `(component, positions [T])` that gives what takes the place of a component's output."""
    lent = lend(encoder, {component.point for component in chosen}, how, source)
    means = {} if lent is None else {name: found.packed.mean(dim=0) for name, found in lent.activations.items()}

    def replacement(component: Component, positions: Tensor) -> Tensor | float:
        if lent is None:
            return 0.0
        if how == "mean":
            return component.of(means[component.point])
        values = component.of(lent[component.point][0])
        return values[positions.clamp(max=len(values) - 1)]

    return replacement


def _ablating(group: Sequence[Component], replacement: Callable[[Component], Tensor | float]) -> Visitors:
    """Return visitors that ablate each component of a group in a copy of its own, the first in the first and so on."""

    def ablate(value: Tensor, site: Site) -> Tensor:
        changed = value.clone()
        for component, copy in zip(group, changed.unflatten(0, (len(group), -1)), strict=True):
            if component.point == site.point.name:
                component.of(copy)[:] = replacement(component)
        return changed

    return {component.point: [ablate] for component in group}


def _cosines(vectors: Tensor) -> Tensor:
    """Return the cosine of each text in an even place with the next, `[copies, 2n, C]` -> `[copies, n]`, in float64."""
    left, right = vectors.double().unflatten(1, (-1, 2)).unbind(dim=2)
    return torch.cosine_similarity(left, right, dim=-1).cpu()
