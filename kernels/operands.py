"""What the encoder's operations are given: the shape of a batch and of each block's parameters, as types.

`minilm.batch.PackedBatch` and the modules of `minilm.model` have these shapes; a backend depends on nothing more.
"""

# ruff: noqa: D102 - the attributes are described where they are defined

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn


class Packed(Protocol):
    """What an operation needs to know of a batch; `minilm.PackedBatch` says what each is."""

    @property
    def ids(self) -> Tensor: ...

    @property
    def positions(self) -> Tensor: ...

    @property
    def type_ids(self) -> Tensor: ...

    @property
    def cu_seqlens(self) -> Tensor: ...

    @property
    def lengths(self) -> tuple[int, ...]: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def max_seqlen(self) -> int: ...

    @property
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """Neighbouring sequences of equal length L: (first token row, number of sequences n, L), in the batch's order.

        Sequences come longest first from `SentenceEncoder`, so there a run holds all sequences of its length.
        """

    @property
    def length_groups(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """For each distinct length L: the sequences' indices `[n]` and their token rows `[n, L]`."""


class EmbeddingWeights(Protocol):
    """The parameters of the embeddings."""

    @property
    def word(self) -> nn.Embedding: ...

    @property
    def position(self) -> nn.Embedding: ...

    @property
    def token_type(self) -> nn.Embedding: ...

    @property
    def norm(self) -> nn.LayerNorm: ...

    @property
    def training(self) -> bool: ...


class AttentionWeights(Protocol):
    """The parameters of an attention block; `qkv` holds query, key and value, stacked in this order."""

    @property
    def qkv(self) -> nn.Linear: ...

    @property
    def output(self) -> nn.Linear: ...


class FeedForwardWeights(Protocol):
    """The parameters of a feed-forward block."""

    @property
    def intermediate(self) -> nn.Linear: ...

    @property
    def output(self) -> nn.Linear: ...


class LayerWeights(Protocol):
    """The parameters of one transformer layer, and whether it is in training mode."""

    @property
    def attention(self) -> AttentionWeights: ...

    @property
    def attention_norm(self) -> nn.LayerNorm: ...

    @property
    def feed_forward(self) -> FeedForwardWeights: ...

    @property
    def feed_forward_norm(self) -> nn.LayerNorm: ...

    @property
    def training(self) -> bool: ...


class EncoderWeights(Protocol):
    """The parameters of the whole encoder, and whether it is in training mode."""

    @property
    def embeddings(self) -> EmbeddingWeights: ...

    @property
    def layers(self) -> Sequence[LayerWeights]: ...

    @property
    def training(self) -> bool: ...
