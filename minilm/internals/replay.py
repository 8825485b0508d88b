"""A batch computed once, and again from any layer on in many copies, each of which is changed in its own way.

What lies below the change is the same in all copies, and is not computed again.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from minilm.batch import PackedBatch
from minilm.encoder import SentenceEncoder
from minilm.internals.observed import Visitors, observe

TOKENS_AT_ONCE = 4_096  # of all copies together


class Replay:
    """A batch of B texts with T tokens, ready to be computed again.

    Copies lie one after the other: a visitor meets `[copies · T, ...]`, and `value.unflatten(0, (copies, -1))` tells
    them apart.

    Args:
        encoder: whose; patches in force are seen.
        batch: the texts.

    Attributes:
        states: what goes into each layer, and the last one's output: `[T, C]` each.
    """

    def __init__(self, encoder: SentenceEncoder, batch: PackedBatch) -> None:
        self.encoder = encoder
        self.batch = batch
        self._copies: dict[int, PackedBatch] = {1: batch}
        encoder.model.eval()
        with torch.no_grad(), observe(encoder, {}):
            self.states: tuple[Tensor, ...] = encoder.model(batch, hidden_states=True).hidden_states

    def __call__(self, copies: int, visitors: Visitors, layer: int = -1) -> Tensor:
        """Compute copies of the batch, as visitors change them: their embeddings, `[copies, B, C]`.

        Args:
            copies: how many.
            visitors: as `observe` takes them.
            layer: the first that they can change anything in; -1 for the embeddings before it.
        """
        model, encoding = self.encoder.model, self.encoder.encoding
        batch = self._copies.get(copies) or self._copies.setdefault(copies, repeated(self.batch, copies))
        pools_several = encoding.pooling in ("avg_top2", "avg_first_last")
        known = self.states[0 if pools_several else max(layer, 0) : layer + 1]
        with torch.no_grad(), observe(self.encoder, visitors) as backend:
            states = [state.repeat(copies, 1) for state in known] or [model.embeddings(batch, backend)]
            for each in model.layers[max(layer, 0) :]:
                states.append(each(states[-1], batch, backend))
            vectors: Tensor = backend.pool(
                states, batch, encoding.pooling, encoding.first_hidden_index, encoding.normalize
            )
        return vectors.view(copies, self.batch.num_sequences, -1)


def repeated(batch: PackedBatch, copies: int) -> PackedBatch:
    """Return so many copies of a batch, one after the other, as one batch."""
    lengths = batch.lengths * copies
    starts = torch.tensor([0, *lengths], device=batch.ids.device).cumsum(dim=0).int()
    ids, positions, types = (tensor.repeat(copies) for tensor in (batch.ids, batch.positions, batch.type_ids))
    return PackedBatch(ids, positions, types, starts, lengths)


def layer_of(point: str) -> int:
    """Return the layer that a point is in; -1 if it is before all of them."""
    found = re.match(r"layers\.(\d+)\.", point)
    return int(found[1]) if found else -1
