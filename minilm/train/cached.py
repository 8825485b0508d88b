"""Large batches in small memory: gradients of a loss over all of a batch's vectors, with one piece's graph at a time.

Source: Gao et al. 2021 ("Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", arXiv 2101.06983).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Piece = TypeVar("Piece")


def backward(encode: Callable[[Piece], Tensor], pieces: Sequence[Piece], loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Add the gradients of `loss(all vectors)` to `.grad` of every parameter behind it; return the loss, detached.

    With one piece that is an ordinary backward pass. With several, vectors are computed without a graph, then the
    loss's gradient in them, then each piece once more, now with a graph, which takes its share of that gradient.
    Random numbers are replayed, so that dropout is the same both times: the result is that of one graph over all.

    Args:
        encode: a piece of the batch -> its vectors `[b, ...]`.
        pieces: at least one.
        loss: all vectors `[N, ...]`, piece after piece, -> a scalar.
    """
    if len(pieces) == 1:
        value = loss(encode(pieces[0]))
        value.backward()
        return value.detach()
    states, parts = [], []
    with torch.no_grad():
        for piece in pieces:
            states.append(_random_state())
            parts.append(encode(piece))
    vectors = torch.cat(parts).requires_grad_()
    value = loss(vectors)
    value.backward()
    if vectors.grad is None:  # the loss does not look at them
        return value.detach()
    now = _random_state()
    for piece, state, gradient in zip(pieces, states, vectors.grad.split([len(part) for part in parts]), strict=True):
        _set_random_state(state)
        encode(piece).backward(gradient)
    _set_random_state(now)
    return value.detach()


def _random_state() -> tuple[Tensor, Tensor | None]:
    """Return the state of torch's random numbers, on the CPU and on the current GPU if there is one in use."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


def _set_random_state(state: tuple[Tensor, Tensor | None]) -> None:
    """Set the state that `_random_state` returned."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
