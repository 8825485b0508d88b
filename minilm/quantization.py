"""Smaller embeddings: int8 and uint8 in 256 steps of a fixed range, binary in one bit a dimension.

The ranges belong to the weights, not to the batch, so a row is the same alone and in company.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minilm.config import PRECISIONS

SPREAD = 5  # standard deviations on either side of the mean; of real sentences' values 0.003% lie beyond


def calibration_sentences() -> list[str]:
    """Return about a hundred ordinary English sentences of this package's own."""
    return (files("minilm") / "calibration.txt").read_text(encoding="utf-8").splitlines()


def calibration_ranges(embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the bounds of each dimension, mean ± 5 standard deviations: `[n, C]` -> `[2, C]`."""
    mean, spread = embeddings.mean(axis=0), SPREAD * embeddings.std(axis=0)
    return np.stack([mean - spread, mean + spread])


def normalized_ranges(ranges: NDArray[np.float32], dimensions: int) -> NDArray[np.float32]:
    """Return the bounds for the first dimensions scaled to length 1: `[2, C]` -> `[2, dimensions]`.

    The expected squared length of what is kept is the sum of mean² + variance over its dimensions.
    """
    kept = ranges[:, :dimensions]
    mean, deviation = kept.mean(axis=0), (kept[1] - kept[0]) / (2 * SPREAD)
    scaled: NDArray[np.float32] = kept / np.sqrt((mean**2 + deviation**2).sum())
    return scaled


def quantize(
    embeddings: NDArray[np.float32], precision: str, ranges: NDArray[np.float32] | None = None
) -> NDArray[Any]:
    """Quantise float32 embeddings `[n, C]`.

    Args:
        embeddings: `[n, C]`.
        precision: `uint8`: floor((x - minimum) / step), step = (maximum - minimum) / 255, clipped to the range; `int8`:
            that less 128; `ubinary`: bits x > 0, eight a byte, uint8 `[n, C / 8]`; `binary`: that less 128, int8.
        ranges: minimum and maximum of each dimension, `[2, C]`; needed by int8 and uint8.

    Raises:
        ValueError: an unknown precision, or no ranges where they are needed.
    """
    if precision == "float32":
        return embeddings
    if precision in ("binary", "ubinary"):
        bits = np.packbits(embeddings > 0, axis=-1)
        return bits if precision == "ubinary" else (bits.astype(np.int16) - 128).astype(np.int8)
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
    if ranges is None:
        raise ValueError(f"precision {precision!r} needs calibration ranges [2, C]")
    minimum, maximum = ranges[:, : embeddings.shape[1]]
    step = (maximum - minimum) / 255
    step = np.where(step == 0, 1, step)
    levels: NDArray[np.float32] = np.clip(np.floor((embeddings - minimum) / step), 0, 255)
    return levels.astype(np.uint8) if precision == "uint8" else (levels - 128).astype(np.int8)
