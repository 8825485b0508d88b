"""A model whose vectors a linear map takes to another width: what distillation into fewer dimensions ends with."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minilm.encoder import SentenceEncoder, load

OUTPUT_LAYER = "output_layer.safetensors"


class ProjectedEncoder:
    """W·(the encoder's vector before normalisation), scaled to length 1 if the encoder's vectors are.

    Args:
        encoder: the encoder; left as it is.
        weight: W `[D, C]`.
    """

    def __init__(self, encoder: SentenceEncoder, weight: Tensor) -> None:
        self.normalize = encoding = encoder.encoding.normalize
        self.encoder, self.weight = copy.copy(encoder), weight
        if encoding:
            self.encoder.encoding = replace(encoder.encoding, normalize=False)

    def encode(self, sentences: str | Iterable[str], **options: Any) -> NDArray[np.float32]:
        """Encode texts: float32 `[n, D]`, or `[D]` for one string; `options` are `SentenceEncoder.encode`'s."""
        vectors = torch.from_numpy(self.encoder.encode(sentences, **options)).to(self.weight) @ self.weight.T
        vectors = F.normalize(vectors, dim=-1) if self.normalize else vectors
        return vectors.float().cpu().numpy()


def load_projected(run: str | os.PathLike[str], **options: Any) -> ProjectedEncoder:
    """Load what a run with an output layer gave, from the run's folder; `options` are `minilm.load`'s."""
    encoder = load(Path(run) / "model", **options)
    return ProjectedEncoder(encoder, read_output_layer(Path(run))["weight"].to(encoder.device))


def load_trained(run: str | os.PathLike[str], **options: Any) -> SentenceEncoder | ProjectedEncoder:
    """Load what a run gave, with its output layer if it has one, from its folder; `options` are `minilm.load`'s."""
    has_layer = (Path(run) / OUTPUT_LAYER).exists()
    return load_projected(run, **options) if has_layer else load(Path(run) / "model", **options)


def save_output_layer(layer: nn.Linear, run: Path) -> None:
    """Write a map's weight into a run's folder, whole or not at all."""
    temporary = run / f".{OUTPUT_LAYER}"
    save_file({name: tensor.cpu() for name, tensor in layer.state_dict().items()}, temporary)
    temporary.replace(run / OUTPUT_LAYER)


def read_output_layer(run: Path) -> dict[str, Tensor]:
    """Read the map of a run: its state."""
    return load_file(run / OUTPUT_LAYER)
