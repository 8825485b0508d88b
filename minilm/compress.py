"""Weights in 8 bits: a file of a quarter of the size, which a CPU computes with in 8-bit integers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minilm.activations import calibration_batches, measure_input_ranges
from minilm.encoder import SentenceEncoder
from minilm.kernels.int8_linear import QuantizedWeights, input_steps
from minilm.model import Linear
from minilm.weights import int8
from minilm.weights.checkpoint import Checkpoint


def compress(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint with its matrices rounded to 8 bits a number, one scale a row.

    Linear maps also get the ranges of their inputs on this package's calibration sentences. What only an export needs,
    or was computed with the weights as they were, is left out.
    """
    encoder = SentenceEncoder(checkpoint, "torch")
    measure_input_ranges(encoder.model, calibration_batches(encoder.tokenizer))
    stored: dict[str, Tensor] = dict(encoder.model.state_dict())
    for name, module in encoder.model.named_modules():
        if isinstance(module, Linear):
            stored |= _rounded(name, module.weight, module)
        elif isinstance(module, nn.Embedding):
            stored |= _rounded(name, module.weight)
    tensors = int8.restore(stored, "the weights to compress")
    return checkpoint.with_weights(tensors, stored)


def _rounded(name: str, weight: Tensor, linear: Linear | None = None) -> dict[str, Tensor]:
    """Return what is stored of a matrix."""
    weight, inputs = weight.detach(), {}
    if linear is not None and linear.input_range is not None:
        step = input_steps(linear.input_range)[0]
        if name.endswith("feed_forward.output"):  # no step can be taken up behind a GELU: see int8_linear
            step = torch.ones_like(step)
        inputs = {f"{name}.{int8.STEP}": step, f"{name}.{int8.RANGE}": linear.input_range}
        weight = weight * step
    rounded = QuantizedWeights.round(weight)
    return {f"{name}.weight": rounded.values, f"{name}.weight{int8.SCALE}": rounded.scale, **inputs}
