"""The straight line from a reference to a text at a point of the model, and the embedding's derivatives along it.

What `minilm.internals.attribution` integrates over. Nodes are Gauss-Legendre's on the two halves of the line (its sharp
turn, where LayerNorms see the least variance, lies near the middle); how many is decided by the movement as a whole,
whose integral is known: the embedding at the end less that at the start.

Dimensions: L tokens, C hidden, n places on the line, m directions.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from minilm.batch import PackedBatch
from minilm.encoder import SentenceEncoder
from minilm.internals.captures import pack
from minilm.internals.observed import observe
from minilm.internals.points import hidden_states, resolve

METRICS = ("cosine", "dot")
ROWS = 1_024  # token rows of the directions that are differentiated at once
GRAPH = 8  # a token row of the graph they go through takes as much memory as so many
STEPS = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
ROUNDING = 32  # a relative error of so many eps that more nodes don't make smaller is rounding


class ConvergenceWarning(UserWarning):
    """An integral did not reach the tolerance asked for."""


class Line:
    """The straight line from a reference to a text at a point of the model, and the embedding along it.

    Where pooling reads an earlier hidden state as well (`avg_top2`, `avg_first_last`), that one moves with it.

    Args:
        encoder: whose; patches in force are seen.
        text: where the line ends.
        point: `embeddings` or `layers.K.output`.
        reference: where it starts: one token (`[PAD]`, `[MASK]`, a word), put in the place of each of the text's, or a
            text of as many tokens.
        metric: `cosine` scales the embedding to length 1; `dot` takes it as the model returns it.

    Attributes:
        tokens: the text's word pieces.
        reference_tokens: the reference's.
        point: the point's name.
        start: the reference's hidden states up to the point, `[L, C]` each.
        end: the text's.

    Raises:
        ValueError: no such point or metric; a text too long; a reference of another length; a model in half precision.
    """

    def __init__(self, encoder: SentenceEncoder, text: str, point: str, reference: str, metric: str) -> None:
        depth, self.point = _depth(encoder, point)
        if metric not in METRICS:
            raise ValueError(f"only an inner product splits into pairs: metric must be cosine or dot, got {metric!r}")
        dtype = encoder.model.embeddings.word.weight.dtype
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"derivatives need a model in float32 or float64, got {dtype}; use encoder.to(device, 'float32')"
            )
        self._model, self._encoding = encoder.model.eval(), encoder.encoding
        self._normalize = metric == "cosine" or self._encoding.normalize
        with observe(encoder, {}) as self._backend:  # plain torch, with whatever visitors there are
            pass
        self._ids = pack(encoder, [text])[0].ids.tolist()
        others = _reference_ids(pack(encoder, [reference])[0].ids.tolist(), len(self._ids), reference)
        self.tokens, self.reference_tokens = encoder.tokenizer.tokens(self._ids), encoder.tokenizer.tokens(others)
        with torch.no_grad():
            batch = PackedBatch.from_sequences([self._ids, others], device=encoder.device)
            states = [self._model.embeddings(batch, self._backend)]
            for layer in self._model.layers[:depth]:
                states.append(layer(states[-1], batch, self._backend))
        self.end, self.start = zip(*(state.chunk(2) for state in states), strict=True)

    def at(self, places: Tensor) -> tuple[Tensor, ...]:
        """Return the hidden states at some places t on the line, one after the other: `[n·L, C]` each."""
        t = places.to(self.end[0]).repeat_interleave(len(self._ids)).unsqueeze(1)
        repeats = (len(places), 1)
        return tuple(
            start.repeat(repeats) + t * (end - start).repeat(repeats)
            for start, end in zip(self.start, self.end, strict=True)
        )

    def embed(self, *states: Tensor) -> Tensor:
        """Return the embeddings `[n, C]` that follow from hidden states up to the point, `[n·L, C]` each."""
        batch = PackedBatch.from_sequences([self._ids] * (len(states[0]) // len(self._ids)), device=states[0].device)
        following = list(states)
        for layer in self._model.layers[len(states) - 1 :]:
            following.append(layer(following[-1], batch, self._backend))
        return self._backend.pool(
            following, batch, self._encoding.pooling, self._encoding.first_hidden_index, self._normalize
        )

    def ends(self) -> tuple[Tensor, Tensor]:
        """Return the embeddings of the reference and of the text, float64 `[C]` each."""
        with torch.no_grad():
            start, end = self.embed(*self.at(torch.tensor([0.0, 1.0]))).cpu().double()
        return start, end

    def velocities(self, places: Tensor, moving: Tensor) -> Tensor:
        """Differentiate the embedding along the line, at n places, with only some tokens moving.

        A directional derivative from two reverse passes: the first is linear in the vector u that it is fed with, and
        the second differentiates it by u (Townsend 2017). The first is shared by all directions.

        Args:
            places: t of each place, `[n]`.
            moving: which tokens move in each of m derivatives, 0 or 1, `[m, L]`.

        Returns:
            `[m, n, C]`.
        """
        displacements = [end - start for start, end in zip(self.start, self.end, strict=True)]
        with torch.enable_grad():
            states = [state.requires_grad_() for state in self.at(places)]
            embeddings = self.embed(*states)
            fed = torch.zeros_like(embeddings, requires_grad=True)
            gradients = torch.autograd.grad(embeddings, states, fed, create_graph=True, allow_unused=True)
            reached = [
                (gradient, move)
                for gradient, move in zip(gradients, displacements, strict=True)
                if gradient is not None
            ]
            parts = []
            for some in moving.to(fed).split(max(1, ROWS // len(states[0]))):
                directions = [(some.unsqueeze(2) * move).repeat(1, len(places), 1) for _, move in reached]
                outputs = [gradient for gradient, _ in reached]
                (part,) = torch.autograd.grad(outputs, fed, directions, retain_graph=True, is_grads_batched=True)
                parts.append(part)
        return torch.cat(parts)

    def gradients(self, places: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        """Differentiate embedding·target by the hidden states, at n places: `[n, L, C]` for each state up to the point.

        Args:
            places: t of each place, `[n]`.
            target: a vector `[C]`.
        """
        with torch.enable_grad():
            states = [state.requires_grad_() for state in self.at(places)]
            scores = self.embed(*states) @ target.to(states[0])
            found = torch.autograd.grad(scores.sum(), states, allow_unused=True)
        shape = (len(places), len(self.tokens), -1)
        return tuple(
            (torch.zeros_like(state) if gradient is None else gradient).reshape(shape)
            for state, gradient in zip(states, found, strict=True)
        )

    def integral(self, steps: int, moving: Tensor, advance: Callable[[int], object] = lambda _: None) -> Tensor:
        """Integrate the velocities over the line: `[m, L]` -> float64 `[m, C]`."""
        total = torch.zeros((), dtype=torch.float64)
        for places, weights in self._portions(steps, len(moving)):
            velocities = self.velocities(places, moving).cpu().double()
            total = total + torch.einsum("n,mnc->mc", weights, velocities)
            advance(len(places))
        return total

    def integrated_gradients(self, steps: int, target: Tensor) -> Tensor:
        """Return displacement ⊙ ∫ gradient of embedding·target, summed over hidden states: float64 `[L, C]`."""
        ends = [(start.cpu().double(), end.cpu().double()) for start, end in zip(self.start, self.end, strict=True)]
        total = torch.zeros_like(ends[-1][0])
        for places, weights in self._portions(steps, 1):
            for gradient, (start, end) in zip(self.gradients(places, target), ends, strict=True):
                total += torch.einsum("n,nlc->lc", weights, gradient.cpu().double()) * (end - start)
        return total

    def steps(self, tolerance: float | None = None) -> int:
        """Return how many nodes integrate the whole movement of the embedding to within a tolerance, a distance.

        Without a tolerance, and at most: as many as still make a difference to rounding.

        Warns:
            ConvergenceWarning: the most allowed are not enough.
        """
        start, end = self.ends()
        everything = torch.ones(1, len(self.tokens))
        rounding = ROUNDING * torch.finfo(self.end[0].dtype).eps * float(max(start.norm(), end.norm()))
        best, error = STEPS[0], float("inf")
        for steps in STEPS:
            before, error = error, float((self.integral(steps, everything)[0] - (end - start)).norm())
            if tolerance is not None and error <= tolerance:
                return steps
            if error <= rounding and error > before / 2:
                return best
            best = steps
        if error > max(rounding, tolerance or 0.0):
            message = f"{best} nodes integrate the embedding's movement to {error:.1e} only; residuals will show it"
            warnings.warn(message, ConvergenceWarning, stacklevel=4)
        return best

    def _portions(self, steps: int, directions: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Give the nodes' places and weights, as many at once as memory should hold for so many directions."""
        size = max(1, ROWS // (len(self.tokens) * max(directions, GRAPH)))
        places, weights = nodes(steps)
        return zip(places.split(size), weights.split(size), strict=True)


def nodes(steps: int) -> tuple[Tensor, Tensor]:
    """Return Gauss-Legendre's places and weights on [0, ½] and on [½, 1], half of the steps each: float64 `[steps]`.

    Raises:
        ValueError: steps is not an even number of at least 2.
    """
    if steps < 2 or steps % 2:
        raise ValueError(f"steps must be an even number, half of them for each half of the line, got {steps}")
    places, weights = map(torch.from_numpy, np.polynomial.legendre.leggauss(steps // 2))
    places = (places + 1) / 4
    return torch.cat([places, places + 0.5]), weights.repeat(2) / 4


def _depth(encoder: SentenceEncoder, point: str) -> tuple[int, str]:
    """Return after how many layers a point lies, and its name.

    Raises:
        ValueError: it is no hidden state, or no point at all.
    """
    names = hidden_states(encoder.config)
    found = [known.name for known in resolve(point, encoder.config)]
    if len(found) != 1 or found[0] not in names:
        raise ValueError(f"attribution starts at a hidden state, one of {', '.join(names)}; got {point!r}")
    return names.index(found[0]), found[0]


def _reference_ids(ids: list[int], length: int, reference: str) -> list[int]:
    """Return the ids of a reference of `length` tokens.

    Raises:
        ValueError: it is neither one token nor of this length.
    """
    if len(ids) == length:
        return ids
    if len(ids) == 3:
        return [ids[0], *ids[1:2] * (length - 2), ids[2]]
    raise ValueError(
        f"the reference must be one token or as long as the text: {reference!r} has {len(ids)} tokens with [CLS] and "
        f"[SEP], the text {length}"
    )
