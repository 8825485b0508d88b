"""What evaluators ask of an encoder: each text encoded once, its vector scaled to length 1."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from minilm.progress import progress_bar

CHUNK = 1024
"""Texts handed to the encoder at a time, between two steps of the progress bar."""


class Encoder(Protocol):
    """Anything that turns n texts into an `[n, C]` array or CPU tensor: this library's encoder, or another's."""

    def encode(self, sentences: list[str], /) -> Any:
        """Return one vector a text, in order."""


@dataclass(frozen=True)
class UnitVectors:
    """Texts and their vectors of length 1 (a zero vector stays zero).

    Attributes:
        rows: each text's row.
        matrix: float64 `[n, C]`.
    """

    rows: dict[str, int]
    matrix: NDArray[np.float64]

    def __getitem__(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Return the vectors of some of the texts, `[len(texts), C]`."""
        return self.matrix[[self.rows[text] for text in texts]]

    def cosines(self, first: Sequence[str], second: Sequence[str]) -> NDArray[np.float64]:
        """Return the cosine of each text of `first` with its partner in `second`, `[n]`.

        Rounded to what float32 vectors tell apart, so that pairs of equal texts tie.
        """
        cosines: NDArray[np.float64] = np.einsum("nc,nc->n", self[first], self[second])
        return np.round(cosines, 7)


def unit_vectors(
    encode: Callable[[list[str]], Any], texts: Iterable[str], show_progress_bar: bool | None = None
) -> UnitVectors:
    """Encode each different text once.

    Args:
        encode: an encoder's `encode`, or another function of its shape.
        texts: the texts; a repeated one is encoded once.
        show_progress_bar: `None` shows it if the `minilm` logger is at level INFO or below.

    Raises:
        ValueError: what `encode` returned is not a finite vector a text.
    """
    distinct = list(dict.fromkeys(texts))
    chunks: list[NDArray[np.float64]] = []
    with progress_bar(show_progress_bar, len(distinct), "encode", "text") as advance:
        for start in range(0, len(distinct), CHUNK):
            chunk = distinct[start : start + CHUNK]
            vectors = np.asarray(encode(chunk), dtype=np.float64)
            if vectors.ndim != 2 or len(vectors) != len(chunk) or not np.isfinite(vectors).all():
                raise ValueError(f"expected finite vectors [{len(chunk)}, C] of encode(), got an array {vectors.shape}")
            norms = np.linalg.norm(vectors, axis=1, keepdims=True)
            chunks.append(vectors / np.where(norms == 0, 1, norms))
            advance(len(chunk))
    return UnitVectors({text: row for row, text in enumerate(distinct)}, np.concatenate(chunks))
