"""The ranges of a model's activations on ordinary sentences, which 8-bit arithmetic goes by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from minilm.batch import PackedBatch
from minilm.kernels.int8_backend import RangeRecorder
from minilm.model import Linear, MiniLM
from minilm.quantization import calibration_sentences
from minilm.tokenizer import Tokenizer


def ensure_input_ranges(model: MiniLM, tokenizer: Tokenizer) -> None:
    """Measure the ranges on this package's calibration sentences, if the backend needs them and they are not known.

    Ranges stay as they are when weights change: after training, measure them anew.
    """
    if model.backend.needs_input_ranges and model.layers[0].attention.qkv.input_range is None:
        measure_input_ranges(model, calibration_batches(tokenizer, model.embeddings.word.weight.device))


def calibration_batches(tokenizer: Tokenizer, device: torch.device | None = None) -> list[PackedBatch]:
    """Return this package's calibration sentences, tokenised, as one batch."""
    sentences = [tokenizer(text).ids for text in calibration_sentences()]
    return [PackedBatch.from_sequences(sentences, device=device)]


def set_input_ranges(model: MiniLM, ranges: Mapping[str, Tensor]) -> None:
    """Give linear maps the ranges of their inputs, known by the maps' names."""
    for name, known in ranges.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, Linear), name
        linear.input_range = known


def measure_input_ranges(model: MiniLM, batches: Iterable[PackedBatch]) -> None:
    """Measure the least and greatest value of each input channel of each linear map, and keep them with the maps.

    Each `minilm.model.Linear` gets its own as `input_range`, float32 `[2, K]`.
    """
    recorder = RangeRecorder(model.config)
    with torch.no_grad():
        for batch in batches:
            x = model.embeddings(batch, recorder)
            for layer in model.layers:
                x = layer(x, batch, recorder)
    for linear, measured in recorder.ranges.items():
        linear.input_range = measured
