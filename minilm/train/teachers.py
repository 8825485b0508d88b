"""Who is learnt from: anything that gives texts vectors; one model, one of its hidden states, or several together."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from minilm.encoder import SentenceEncoder, load
from minilm.model import floating_dtype
from minilm.train.states import StatePooler
from minilm.weights.files import WeightsError

logger = logging.getLogger(__name__)


class Teacher(Protocol):
    """Anything that turns n texts into an `[n, D]` array or tensor: this library's encoder, or another's."""

    def encode(self, sentences: list[str], /) -> Any:
        """Return one vector a text, in order."""


class Ensemble:
    """Several teachers as one, whose inner product is the weighted mean of their cosines.

    Its vectors are those of its teachers side by side, each scaled to length √w, the weights w adding up to 1.

    Args:
        teachers: cached or not.
        weights: a positive number for each; equal ones by default.

    Raises:
        ValueError: there is no teacher, or not one positive weight for each.
    """

    def __init__(self, teachers: Sequence[Teacher], weights: Sequence[float] = ()) -> None:
        if not teachers:
            raise ValueError("an ensemble needs at least one teacher")
        weights = weights or [1.0] * len(teachers)
        if len(weights) != len(teachers) or not all(0 < weight < math.inf for weight in weights):
            raise ValueError(f"expected {len(teachers)} positive weights, one for each teacher; got {list(weights)}")
        self.teachers = list(teachers)
        self.weights = [weight / sum(weights) for weight in weights]

    @property
    def identity(self) -> str:
        """What tells it from other teachers."""
        parts = zip(self.teachers, self.weights, strict=True)
        return f"ensemble of {', '.join(f'{weight:.4g} {teacher_identity(teacher)}' for teacher, weight in parts)}"

    def encode(self, sentences: Sequence[str]) -> NDArray[np.float32]:
        """Return the texts' vectors, float32 `[n, sum of the teachers' widths]`."""
        parts = [encode(teacher, sentences) for teacher in self.teachers]
        norms = (np.linalg.norm(part, axis=1, keepdims=True) for part in parts)
        scales = (
            np.float32(weight**0.5) / np.where(n == 0, 1, n) for n, weight in zip(norms, self.weights, strict=True)
        )
        return np.concatenate([part * scale for part, scale in zip(parts, scales, strict=True)], axis=1)


class InnerLayer:
    """A teacher that is an encoder's hidden state, averaged over the tokens of a text.

    Layer 0 is the embeddings' output: it knows the words of a text and not what they mean together, and so says of two
    texts how many words they share.

    Args:
        encoder: the model.
        state: `layer.0` to `layer.N`, N its number of layers.

    Raises:
        ValueError: the model has no such state.
    """

    def __init__(self, encoder: SentenceEncoder, state: str) -> None:
        self.encoder, self.state, self.device = encoder, state, encoder.device
        self._pooler = StatePooler(encoder, (state,))

    @property
    def identity(self) -> str:
        """What tells it from other teachers."""
        return f"{self.state} of {teacher_identity(self.encoder)}"

    @torch.inference_mode()
    def encode(self, sentences: Sequence[str]) -> NDArray[np.float32]:
        """Return the texts' vectors, float32 `[n, C]`."""
        vectors: NDArray[np.float32] = self._pooler.encode(sentences)[:, 0].float().cpu().numpy()
        return vectors


def load_teacher(
    name_or_path: str | os.PathLike[str], *, device: str | None = None, dtype: str | torch.dtype = "float32"
) -> Teacher:
    """Load a model as a teacher: by this library, or, what it doesn't take (such as MPNet), by sentence-transformers.

    Args:
        name_or_path: as either takes it; `NAME:layer.K` is a hidden state of what this library takes (`InnerLayer`).
        device: as either takes it.
        dtype: what it computes in; rounded weights are another teacher, with vectors of its own.

    Raises:
        ImportError: sentence-transformers is needed, and not installed.
        ValueError: the dtype is no floating point type.
    """
    dtype = floating_dtype(dtype)
    name, colon, layer = os.fspath(name_or_path).rpartition(":layer.")
    if colon:
        return InnerLayer(load(name, device=device, dtype=dtype), f"layer.{layer}")
    try:
        return load(name_or_path, device=device, dtype=dtype)
    except WeightsError as error:
        reason = error
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(
            f'{name_or_path} needs sentence-transformers as a teacher: pip install "minilm[teachers]". '
            f"This library doesn't take it: {reason}"
        ) from error
    logger.info("%s is loaded by sentence-transformers; this library doesn't take it: %s", name_or_path, reason)
    model = SentenceTransformer(os.fspath(name_or_path), device=device).to(dtype)
    return _InBatches(model, 32 if model.device.type == "cpu" else 512)


class _InBatches:
    """A sentence-transformers model that encodes so many texts at a time."""

    def __init__(self, model: Any, batch_size: int) -> None:
        self.model, self.batch_size, self.device = model, batch_size, model.device
        self.identity = teacher_identity(model)

    def encode(self, sentences: Sequence[str]) -> Any:
        """Return the model's vectors."""
        return self.model.encode(list(sentences), batch_size=self.batch_size, show_progress_bar=False)


def teacher_identity(teacher: Teacher) -> str:
    """Return what tells a teacher from others: its attribute `identity`, or a hash of its weights and settings.

    Raises:
        ValueError: it has neither.
    """
    if isinstance(identity := getattr(teacher, "identity", None), str):
        return identity
    if isinstance(teacher, SentenceEncoder):
        return f"minilm {teacher.fingerprint()}, {teacher.max_seq_length} tokens"
    if isinstance(teacher, nn.Module):
        digest = hashlib.sha256(repr(teacher).encode())
        for name, tensor in teacher.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return f"{type(teacher).__name__} {digest.hexdigest()}, {getattr(teacher, 'max_seq_length', 'all')} tokens"
    raise ValueError(f"{type(teacher).__name__} says not who it is: give it an attribute identity, a string")


def encode(teacher: Teacher, sentences: Sequence[str]) -> NDArray[np.float32]:
    """Return a teacher's vectors of texts, `[n, D]`.

    Raises:
        ValueError: it gives something else.
    """
    given = teacher.encode(list(sentences))
    vectors = np.asarray(given.detach().float().cpu() if isinstance(given, torch.Tensor) else given, np.float32)
    if vectors.ndim != 2 or len(vectors) != len(sentences) or not np.isfinite(vectors).all():
        raise ValueError(f"expected finite vectors [{len(sentences)}, D] of the teacher, got an array {vectors.shape}")
    return vectors
