"""The plain-torch encoder with every interesting tensor passing a named point, where visitors see and replace it.

It is one more backend: a model that nobody observes computes as ever, with nothing in its way.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from minilm.batch import PackedBatch
from minilm.embed import level_outside
from minilm.encoder import SentenceEncoder
from minilm.internals.points import HEADS, TOKENS, Point, points_of
from minilm.kernels.backend import BackendWarning
from minilm.kernels.operands import EmbeddingWeights, LayerWeights
from minilm.kernels.torch_backend import TorchBackend
from minilm.model import MiniLM


@dataclass(frozen=True, eq=False)
class Site:
    """Where a visitor meets a tensor.

    Attributes:
        point: which point it is.
        batch: the batch that is being computed.
        sequences: of an attention tensor `[n, H, L, L]`: which of the batch's texts these n are, int64 `[n]`; None for
            all other tensors, which have the batch's tokens `[T, ...]`, or its texts `[B, C]`, in order.
    """

    point: Point
    batch: PackedBatch
    sequences: Tensor | None = None

    @property
    def texts(self) -> Sequence[int]:
        """Which of the batch's texts the tensor is of."""
        return range(self.batch.num_sequences) if self.sequences is None else self.sequences.tolist()

    def split(self, value: Tensor) -> Sequence[Tensor]:
        """Return the part of each of these texts, in the shape of `point.shape` (views)."""
        return value.split(self.batch.lengths) if self.point.rows in (TOKENS, HEADS) else value.unbind()

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Put together again what `split` takes apart."""
        return torch.cat(list(parts)) if self.point.rows in (TOKENS, HEADS) else torch.stack(list(parts))


Visitor = Callable[[Tensor, Site], Tensor | None]  # returns what is to take the tensor's place; None to leave it
Visitors = Mapping[str, Sequence[Visitor]]


class ObservedBackend(TorchBackend):
    """Plain torch whose tensors pass their visitors.

    Attention is computed as its formula, so that scores and pattern exist; otherwise it is `TorchBackend`, which it is
    held to by the parity suite.

    Args:
        model: whose layers it is to know by name.
        visitors: by point, whom to call with its tensor, one after the other.
    """

    name = "observed"

    def __init__(self, model: MiniLM, visitors: Visitors) -> None:
        super().__init__(model.config)
        self.visitors = visitors
        self._model = model
        self._points = points_of(model.config)
        self._names = {layer: f"layers.{index}" for index, layer in enumerate(model.layers)}
        self._now = threading.local()  # the batch, which the feed-forward block is not told

    def visit(self, point: str, value: Tensor, batch: PackedBatch, sequences: Tensor | None = None) -> Tensor:
        """Return a point's tensor, or what visitors put in its place: those of outer blocks first, then its own.

        Raises:
            ValueError: a replacement of another shape.
        """
        blocks = [block for block in self._model.backend_choices if isinstance(block, ObservedBackend)]
        for visitor in chain.from_iterable(block.visitors.get(point, ()) for block in blocks):
            replacement = visitor(value, Site(self._points[point], batch, sequences))
            if replacement is not None:
                if replacement.shape != value.shape:
                    got, wanted = list(replacement.shape), list(value.shape)
                    raise ValueError(f"what takes the place of {point} must have its shape {wanted}, got {got}")
                value = replacement
        return value

    def embed(self, batch: PackedBatch, weights: EmbeddingWeights) -> Tensor:  # type: ignore[override]
        """LN(word + token type + position)."""
        word = self.visit("embeddings.word", weights.word(batch.ids), batch)
        token_type = self.visit("embeddings.token_type", weights.token_type(batch.type_ids), batch)
        position = self.visit("embeddings.position", weights.position(batch.positions), batch)
        x = self.layer_norm(word + token_type + position, weights.norm)
        return self.visit("embeddings", F.dropout(x, self.config.hidden_dropout, weights.training), batch)

    def attention_block(self, x: Tensor, layer: LayerWeights, batch: PackedBatch) -> Tensor:  # type: ignore[override]
        """LN(x + W_o·attention(W_qkv·x))."""
        name, training = self._names[layer], layer.training  # type: ignore[index]
        self._now.batch = batch
        context = self._attend(x, layer, batch, f"{name}.attention").flatten(1)
        update = self.visit(f"{name}.attention.output", self.linear(context, layer.attention.output), batch)
        update = F.dropout(update, self.config.hidden_dropout, training)
        residual = self.visit(f"{name}.attention_residual", update + x, batch)
        return self.visit(f"{name}.attention_norm", self.layer_norm(residual, layer.attention_norm), batch)

    def feed_forward_block(self, x: Tensor, layer: LayerWeights) -> Tensor:
        """LN(x + W_2·gelu(W_1·x))."""
        name, batch = self._names[layer], self._now.batch  # type: ignore[index]
        inner = self.linear(x, layer.feed_forward.intermediate)
        inner = self.gelu(self.visit(f"{name}.feed_forward.pre_activation", inner, batch))
        inner = self.visit(f"{name}.feed_forward.activation", inner, batch)
        update = self.visit(f"{name}.feed_forward.output", self.linear(inner, layer.feed_forward.output), batch)
        update = F.dropout(update, self.config.hidden_dropout, layer.training)
        residual = self.visit(f"{name}.feed_forward_residual", update + x, batch)
        return self.visit(f"{name}.output", self.layer_norm(residual, layer.feed_forward_norm), batch)

    def pool(  # type: ignore[override]
        self, hidden_states: Sequence[Tensor], batch: PackedBatch, pooling: str, first: int = 0, normalize: bool = False
    ) -> Tensor:
        """Token vectors -> one vector a sequence."""
        pooled = self.visit("pooled", super().pool(hidden_states, batch, pooling, first), batch)
        return self.visit("embedding", F.normalize(pooled, dim=-1) if normalize else pooled, batch)

    def _attend(self, x: Tensor, layer: LayerWeights, batch: PackedBatch, name: str) -> Tensor:
        """softmax(q·kᵀ / √D)·v of every head: `[T, C]` -> `[T, H, D]`."""
        heads = zip(("query", "key", "value"), self.project_heads(x, layer.attention), strict=True)
        query, key, value = (self.visit(f"{name}.{which}", tensor, batch) for which, tensor in heads)
        dropout = self.config.attention_dropout if layer.training else 0.0
        context = query.new_empty(query.shape)
        root = self.config.head_size**-0.25  # of 1/√D, on both sides, as torch's own attention scales
        for indices, rows in batch.length_groups:
            q, k, v = (tensor[rows].transpose(1, 2) for tensor in (query, key, value))  # [n, H, L, D]
            scores = (q * root) @ (k * root).transpose(2, 3)
            scores = self.visit(f"{name}.scores", scores, batch, indices)
            pattern = self.visit(f"{name}.pattern", scores.softmax(dim=-1), batch, indices)
            context[rows] = (F.dropout(pattern, dropout) @ v).transpose(1, 2)
        return self.visit(f"{name}.head_outputs", context, batch)


@contextmanager
def observe(encoder: SentenceEncoder, visitors: Visitors) -> Iterator[ObservedBackend]:
    """Within a `with` block, let visitors see and replace the tensors of all that this encoder computes.

    Blocks nest: visitors of an outer block come first. Afterwards everything is as before, whatever happens inside, and
    in whichever order blocks end. Other threads that use this encoder meanwhile are observed as well.

    Args:
        encoder: whose tensors.
        visitors: by point name (`minilm.internals.points`), functions `(tensor, site) -> tensor or None`.

    Raises:
        ValueError: the model has an output layer, so that its vectors are not the point `embedding`.

    Warns:
        BackendWarning: the encoder was told to use a backend that has no such points; plain torch takes over.
    """
    model = encoder.model
    if model.output_layer is not None:
        raise ValueError(
            "the points of a model end at its pooled vectors, and this one has an output layer behind them; take it "
            "away with encoder.model.output_layer = None, and look at the rest"
        )
    outer, choice = model.backend, model.backend_choices[-1]
    if not isinstance(outer, ObservedBackend) and choice not in ("auto", "torch", TorchBackend):
        message = f"the {outer.name} backend has no points to look at; plain torch computes within this block"
        warnings.warn(message, BackendWarning, stacklevel=level_outside())
    observed = ObservedBackend(model, visitors)
    with model.use_backend(observed):
        yield observed
