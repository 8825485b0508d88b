"""What can be measured: something that encodes. Here ours, with any backend; `peers` has other people's."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilm.bench.workloads import Workload, token_sequences

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from minilm.batch import PackedBatch
    from minilm.encoder import SentenceEncoder

BATCH_SIZE = {"cpu": 32, "cuda": 512}
"""Texts of full length that an engine encodes together: the usual default, and enough to fill a GPU."""

FAITHFUL = {"float64": 1e-9, "float32": 1e-9, "float16": 1e-5, "bfloat16": 5e-4}
"""How far below 1 an engine's smallest cosine to plain torch in float32 may be, by what it computes in."""


class EngineError(RuntimeError):
    """The engine can't run here."""


@dataclass(frozen=True)
class Choice:
    """Which engine, on what.

    Attributes:
        label: its name in tables.
        role: `backend` for ours, `peer`, or `machine` for the ceilings.
        name: the backend or peer.
        dtype: what it computes in.
        device: `cpu`, `cuda` or `cuda:N`.
        scratch: the folder with the workloads and what else `reference.build` wrote.
        threads: how many threads it has; None as its libraries like.
    """

    label: str
    role: str
    name: str
    dtype: str
    device: str
    scratch: str
    threads: int | None = None


class Engine:
    """Something that encodes; subclass it for a peer.

    Attributes:
        kinds: the kinds of workload that it does.
        devices: the kinds of device it runs on.
        packages: the distributions it needs, whose versions are recorded.
        extra: which of our extras brings them.
        dtypes: what it can compute in; None for whatever torch can.
        precision: what its matrix products are computed in, where that is not the dtype.
        min_cosine: how close to the reference it promises to stay; None for what `FAITHFUL` says of its precision.
        compiles_each_shape: whether a workload takes it so long to make ready that it does only the headline ones.
    """

    kinds: tuple[str, ...] = ("texts",)
    devices: tuple[str, ...] = ("cpu", "cuda")
    packages: tuple[str, ...] = ()
    extra: str | None = None
    dtypes: tuple[str, ...] | None = None
    precision: str | None = None
    min_cosine: float | None = None
    compiles_each_shape = False

    def __init__(self, choice: Choice) -> None:
        if choice.device.split(":")[0] not in self.devices:
            raise EngineError(f"{choice.name} runs only on {' and '.join(self.devices)}")
        if self.dtypes is not None and choice.dtype not in self.dtypes:
            raise EngineError(f"{choice.name} computes in {' or '.join(self.dtypes)}, not in {choice.dtype}")
        self.choice = choice

    def imports(self) -> None:
        """Import what it needs."""

    def load(self) -> None:
        """Load the model."""
        raise NotImplementedError

    def call(self, workload: Workload, rotation: int) -> Callable[[], Any]:
        """Make a workload's inputs ready; return the call to time, which returns a row a text, sequence or token."""
        raise NotImplementedError

    def takes(self, workload: Workload) -> bool:
        """Tell whether it does a workload."""
        return workload.kind in self.kinds and (workload.is_headline or not self.compiles_each_shape)

    def own_workloads(self) -> list[Workload] | None:
        """Return workloads that only this engine does; None for the common ones."""
        return None

    def facts(self) -> dict[str, Any]:
        """Return what else there is to say of it."""
        return {}

    @property
    def num_threads(self) -> int:
        """How many threads to compute with, for engines that have to be told: as many as it may use processors."""
        available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return self.choice.threads or available or 1

    @cached_property
    def plan(self) -> dict[str, Any]:
        """What `reference.build` wrote of the model: `model`, `folder`, `config`, `encoding`, `frame`."""
        text = (Path(self.choice.scratch) / "plan.json").read_text(encoding="utf-8")
        plan: dict[str, Any] = json.loads(text)
        return plan

    @property
    def batch_size(self) -> int:
        """How many texts of full length to encode together."""
        return BATCH_SIZE[self.choice.device.split(":")[0]]

    # For those who compute with torch.

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype, as torch knows it."""
        import torch

        dtype: torch.dtype = getattr(torch, self.choice.dtype)
        return dtype

    def sequences(self, workload: Workload, rotation: int) -> list[list[int]]:
        """Return the word ids of a token workload's sequences."""
        import numpy as np

        corpus = np.load(Path(self.choice.scratch) / "corpus.npy")
        return token_sequences(workload.lengths, corpus, self.plan["frame"], rotation)

    def heads(self, workload: Workload) -> tuple[Tensor, Tensor, Tensor]:
        """Return the query, key and value of an attention workload: `[T, H, D]` each."""
        config = self.plan["config"]
        shape = (workload.num_tokens, config["num_heads"], config["hidden_size"] // config["num_heads"])
        query, key, value = random_heads(shape)
        device, dtype = self.choice.device, self.torch_dtype
        return query.to(device, dtype), key.to(device, dtype), value.to(device, dtype)

    def packed(self, workload: Workload, rotation: int) -> PackedBatch:
        """Return a token or attention workload as a packed batch on the device."""
        from minilm.batch import PackedBatch

        if workload.kind == "attention":
            return PackedBatch.from_sequences([[0] * length for length in workload.lengths], None, self.choice.device)
        return PackedBatch.from_sequences(self.sequences(workload, rotation), None, self.choice.device)


class WeightsOnDisk(Engine):
    """A peer that reads the weights from the folder made for it."""

    extra: str | None = "peers"

    def __init__(self, choice: Choice) -> None:
        super().__init__(choice)
        if "folder_error" in self.plan:
            raise EngineError(f"no weights for it: {self.plan['folder_error']}")


class Ours(Engine):
    """This library, with one of its backends or someone's own."""

    kinds = ("texts", "tokens", "attention")
    packages = ("torch", "tokenizers")

    def imports(self) -> None:
        """See `Engine`."""
        import minilm.encoder  # noqa: F401

    def load(self) -> None:
        """See `Engine`."""
        from minilm.encoder import load

        choice = self.choice
        self.encoder = load(self.plan["model"], device=choice.device, dtype=choice.dtype, backend=choice.name)
        backend = self.encoder.model.backend
        self.precision, self.min_cosine = backend.precision, backend.min_cosine

    def call(self, workload: Workload, rotation: int) -> Callable[[], Any]:
        """See `Engine`."""
        if workload.kind == "texts":
            texts = list(workload.texts)

            def encode() -> Any:
                self.encoder.max_seq_length = workload.limit
                return self.encoder.encode(texts, batch_size=self.batch_size, on_truncate="ignore")

            return encode
        batch = self.packed(workload, rotation)
        if workload.kind == "tokens":
            return lambda: vectors(self.encoder, batch)
        query, key, value = self.heads(workload)
        return _inferring(lambda: self.encoder.model.backend.attention(query, key, value, batch))

    def facts(self) -> dict[str, Any]:
        """See `Engine`."""
        return {"backend": self.encoder.model.backend.name, **self.encoder.model.backend.describe()}


def vectors(encoder: SentenceEncoder, batch: PackedBatch) -> Tensor:
    """Return the vectors of a packed batch, as `SentenceEncoder.encode` computes them: float32 `[B, C]`."""
    import torch

    from minilm.embed import pooled_vectors

    with torch.inference_mode():
        return pooled_vectors(encoder.model, batch, encoder.encoding, encoder.encoding.normalize)


def make_engine(choice: Choice) -> Engine:
    """Return the engine chosen, not loaded yet.

    Raises:
        EngineError: it can't run on this device.
    """
    if choice.role == "backend":
        return Ours(choice)
    if choice.role == "machine":
        from minilm.bench.ceilings import Machine

        return Machine(choice)
    from minilm.bench.peers import PEERS

    return PEERS[choice.name](choice)


def _inferring(function: Callable[[], Any]) -> Callable[[], Any]:
    """Make a function compute without gradients."""
    import torch

    decorated: Callable[[], Any] = torch.inference_mode()(function)
    return decorated


def random_heads(shape: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value for attention alone: normally distributed, always the same."""
    import torch

    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, *shape, generator=generator)
    return query, key, value


def agreement(result: Any, reference: Path) -> dict[str, float]:
    """Compare an engine's rows with the first ones' truth, if there is one.

    Returns:
        `min_cosine`, and `max_error`: the largest difference, relative to the true row's length. NaN where the shapes
        differ, or a number is NaN.
    """
    if not reference.exists():
        return {}
    import numpy as np

    truth = np.load(reference).astype(np.float64)
    rows = result.detach().double().cpu().numpy() if hasattr(result, "detach") else np.asarray(result, np.float64)
    rows = rows[: len(truth)].reshape(min(len(rows), len(truth)), -1)
    if rows.shape != truth.shape:
        return {"min_cosine": float("nan"), "max_error": float("nan")}
    norms = np.linalg.norm(truth, axis=1)
    cosines = (rows * truth).sum(axis=1) / np.maximum(np.linalg.norm(rows, axis=1) * norms, 1e-30)
    errors = np.linalg.norm(rows - truth, axis=1) / np.maximum(norms, 1e-30)
    return {"min_cosine": float(cosines.min()), "max_error": float(errors.max())}


def is_faithful(facts: dict[str, float], precision: str, min_cosine: float | None) -> bool:
    """Tell whether an engine's rows agree with the reference: for unit vectors, whether every cosine is high enough.

    A cosine sees no difference of length, so what is judged is the distance that such a cosine means.
    """
    limit = 1 - min_cosine if min_cosine is not None else FAITHFUL.get(precision, FAITHFUL["bfloat16"])
    return facts["max_error"] <= math.sqrt(2 * max(0.0, limit))  # a NaN is no agreement
