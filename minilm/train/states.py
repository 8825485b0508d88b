"""From a batch's texts to the pooled vectors that an objective sees.

Texts are tokenised, laid side by side in packed batches, neighbours of equal length together, and encoded with the
encoder's own formulas; the result is one tensor `[N, S, C]`: N texts, S pooled states of each, C hidden.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minilm.batch import PackedBatch
from minilm.embed import plan_batches
from minilm.encoder import SentenceEncoder
from minilm.texts import check_text

TextColumn = Sequence[str] | Sequence[Sequence[str]]

BATCH_TOKENS = 16_384
"""Tokens that `StatePooler.encode` encodes at a time."""


@dataclass(frozen=True)
class Layout:
    """How a batch's texts lie in one list: column after column, row after row.

    Attributes:
        texts: all of them, N.
        shapes: of each column `(n,)`, or `(n, k)` where it holds k texts a row.
    """

    texts: list[str]
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, columns: Mapping[str, TextColumn], views: int = 1) -> Layout:
        """Lay columns out, each text `views` times (next to itself).

        Raises:
            ValueError: a column's rows hold different numbers of texts, or several texts a row are to be seen twice.
        """
        texts: list[str] = []
        shapes: dict[str, tuple[int, ...]] = {}
        for name, column in columns.items():
            if all(isinstance(cell, str) for cell in column):
                texts.extend(check_text(cell, name) for cell in column for _ in range(views))
                shapes[name] = (len(column),) if views == 1 else (len(column), views)
                continue
            sizes = {len(cell) for cell in column}
            if views != 1 or len(sizes) != 1 or any(isinstance(cell, str) for cell in column):
                wanted = "one text a row" if views != 1 else "as many texts in each row"
                raise ValueError(f"column {name!r} must hold {wanted}, got lists of {sorted(sizes)}")
            texts.extend(check_text(text, name) for cell in column for text in cell)
            shapes[name] = (len(column), sizes.pop())
        return cls(texts, shapes)

    def columns(self, states: Tensor, names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        """Give each column its pooled states by name: `[N, S, C]` -> `[column][state]` of `[n, C]` or `[n, k, C]`."""
        parts = states.split([torch.Size(shape).numel() for shape in self.shapes.values()])
        return {
            column: {name: part[:, s].reshape(*shape, -1) for s, name in enumerate(names)}
            for (column, shape), part in zip(self.shapes.items(), parts, strict=True)
        }


@dataclass
class StatePooler:
    """Encodes texts into the pooled states that an objective names.

    Attributes:
        encoder: the model, its tokenizer and its settings.
        names: `embedding`, `unnormalized` or `layer.K` (see `minilm.train.objectives.Objective`).
        truncated: texts cut at the length limit so far.

    Raises:
        ValueError: a state that the model does not have.
    """

    encoder: SentenceEncoder
    names: Sequence[str]
    truncated: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        """Check the names."""
        layers = self.encoder.config.num_layers
        for name in self.names:
            layer = re.fullmatch(r"layer\.(\d+)", name)
            if name not in ("embedding", "unnormalized") and (layer is None or int(layer[1]) > layers):
                raise ValueError(f"expected a state embedding, unnormalized or layer.0 to layer.{layers}, got {name!r}")

    def pack(self, texts: Sequence[str], token_budget: int | None = None) -> tuple[list[PackedBatch], Tensor]:
        """Tokenise texts and pack them, longest first.

        Args:
            texts: at least one.
            token_budget: tokens in a batch, at most (but at least one text); all in one batch by default.

        Returns:
            the batches, and for each text the row, counted through all batches, that it has become: int64 `[N]`.
        """
        tokenizer, limit = self.encoder.tokenizer, self.encoder.max_seq_length
        pieces = [tokenizer(text) for text in texts]
        lengths = [min(len(piece), limit) for piece in pieces]
        self.truncated += sum(len(piece) > limit for piece in pieces)
        plan = plan_batches(lengths, token_budget or sum(lengths))
        batches = [
            PackedBatch.from_sequences(
                [tokenizer.truncate(pieces[index], limit).ids for index in indices], device=self.encoder.device
            )
            for indices in plan
        ]
        order = torch.tensor([index for indices in plan for index in indices])
        return batches, order.argsort().to(self.encoder.device)

    def __call__(self, batch: PackedBatch) -> Tensor:
        """Encode a packed batch of B texts into their S pooled states, float32 `[B, S, C]`."""
        encoding, model = self.encoder.encoding, self.encoder.model
        whole = {"embedding", "unnormalized"} >= set(self.names) and encoding.pooling[:4] != "avg_"
        output = model(batch, hidden_states=not whole)
        hidden = output.hidden_states or (output.last_hidden_state,)

        def pooled(name: str) -> Tensor:
            if name.startswith("layer."):
                return model.backend.pool((hidden[int(name[6:])],), batch, "mean")
            normalize = encoding.normalize and name == "embedding"
            return model.backend.pool(hidden, batch, encoding.pooling, encoding.first_hidden_index, normalize)

        return torch.stack([pooled(name) for name in self.names], dim=1)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Encode any number of texts, a batch at a time, into `[N, S, C]`, in their order."""
        batches, places = self.pack(texts, BATCH_TOKENS)
        return torch.cat([self(batch) for batch in batches])[places]
