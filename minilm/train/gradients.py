"""The gradients of one batch: texts encoded, vectors gathered from all processes, loss, and all the way back.

Random numbers are drawn from the run's seed and the batch's number alone, and the process's own are left as they were:
so a resumed run draws what it would have drawn. Dropout differs between processes; what the objective draws does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from minilm.batch import PackedBatch
from minilm.encoder import SentenceEncoder
from minilm.kernels.backend import BackendChoice
from minilm.train import cached, distributed
from minilm.train.contiguous import training_backend
from minilm.train.objectives import Objective
from minilm.train.settings import TrainingSettings
from minilm.train.states import Layout, StatePooler


class TrainingError(ValueError):
    """A run can't go on; the message says where it was."""


class Batch(Protocol):
    """Rows to train on together, or one process's share of them (see `distributed.share`)."""

    @property
    def texts(self) -> Mapping[str, Sequence[Any]]:
        """Each text column's n texts, or n lists of k texts."""

    @property
    def targets(self) -> Mapping[str, Tensor]:
        """What else of the rows is needed: `[n, ...]` each."""

    @property
    def total(self) -> int:
        """The rows of the whole batch, over all processes."""


class Gradients:
    """Computes what a batch adds to `.grad` of the encoder's and the objective's parameters.

    Args:
        encoder: the model.
        objective: what to minimise.
        settings: precision, backend, size of pieces, accumulation, seed.

    Attributes:
        pooler: what encodes texts.
        scaler: keeps float16's gradients in range; does nothing in other precisions.
        texts: how many texts were encoded, over all processes.
    """

    def __init__(self, encoder: SentenceEncoder, objective: Objective, settings: TrainingSettings) -> None:
        self.encoder, self.objective, self.settings = encoder, objective, settings
        self.pooler = StatePooler(encoder, objective.states)
        self.scaler = torch.amp.GradScaler(encoder.device.type, enabled=settings.precision == "float16")
        self.backend: BackendChoice = settings.backend
        if settings.backend == "auto":
            self.backend = training_backend(encoder.config, encoder.device.type)
        self.texts = 0

    def add(self, batch: Batch, number: int) -> Tensor:
        """Add a batch's gradients, and return its loss, detached.

        Args:
            batch: this process's share of it.
            number: the batch's number in the run.

        Raises:
            TrainingError: the loss is no finite number.
        """
        layout = self._layout(batch)
        pieces, places = self.pooler.pack(layout.texts, self.settings.piece_tokens)
        found: list[Tensor] = []

        def loss(states: Tensor) -> Tensor:
            texts = self._gathered(layout, states[places], batch.total)
            with self._random_numbers(number):
                value = self.objective(texts, self.targets(batch))
            found.append(value.detach())
            if not torch.isfinite(value):
                first = next(iter(layout.texts), "")
                raise TrainingError(f"the loss is {value.item()} on batch {number}, which begins with {first!r}")
            scaled: Tensor = self.scaler.scale(value / self.settings.accumulation)
            return scaled

        self.encoder.model.train()
        with self._random_numbers(number, distributed.rank() + 1), self.encoder.model.use_backend(self.backend):
            cached.backward(self._encode, pieces, loss)
        self.texts += len(layout.texts) * distributed.world_size()
        return found[0]

    @torch.no_grad()
    def states(self, batch: Batch) -> dict[str, dict[str, Tensor]]:
        """Return the whole batch's pooled states, as the objective gets them, but without dropout."""
        layout = self._layout(batch)
        pieces, places = self.pooler.pack(layout.texts, self.settings.piece_tokens)
        self.encoder.model.eval()
        with self.encoder.model.use_backend(self.backend):
            found = torch.cat([self._encode(piece) for piece in pieces])
        return self._gathered(layout, found[places], batch.total)

    def targets(self, batch: Batch) -> dict[str, Tensor]:
        """Return the whole batch's targets that the objective needs, on the model's device."""
        own = {name: batch.targets[name].to(self.encoder.device) for name in self.objective.targets}
        return {name: distributed.gather(target, batch.total) for name, target in own.items()}

    def _layout(self, batch: Batch) -> Layout:
        """Lay out the texts of the columns that the objective needs."""
        return Layout.of({column: batch.texts[column] for column in self.objective.columns}, self.objective.views)

    def _gathered(self, layout: Layout, states: Tensor, total: int) -> dict[str, dict[str, Tensor]]:
        """Give each column its states by name, of the rows of all processes."""
        columns = layout.columns(states, self.objective.states)
        return {c: {s: distributed.gather(x, total) for s, x in own.items()} for c, own in columns.items()}

    def _encode(self, piece: PackedBatch) -> Tensor:
        """Encode a packed batch; behind it, autocast forgets its copies of the weights: some may be without graph."""
        precision = getattr(torch, self.settings.precision)
        with torch.autocast(self.encoder.device.type, precision, enabled=precision != torch.float32):
            return self.pooler(piece)

    @contextmanager
    def _random_numbers(self, *places: int) -> Iterator[None]:
        """Draw random numbers from the run's seed and these numbers alone, until the block ends."""
        sequence = np.random.SeedSequence([self.settings.seed, *places])
        device = self.encoder.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1)))
            yield
