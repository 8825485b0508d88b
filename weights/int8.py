"""Weights in 8 bits, a quarter of the file: how they are stored, and how they become float32 again.

For each matrix `X.weight` (linear maps and embedding tables) a file holds

    X.weight        int8 [N, K]
    X.weight_scale  float32 [N]       one scale a row
    X.input_step    float32 [K]       what a linear map's inputs are divided by: weights take it up, as in SmoothQuant
    X.input_range   float32 [2, K]    the least and greatest value of each input, for arithmetic in 8-bit integers

and the weight is `scale·values / step`. Tables have neither step nor range; vectors (biases, LayerNorms) stay as they
are. The names are those of the canonical tensors.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from minilm.weights.files import WeightsError

SCALE, STEP, RANGE = "_scale", "input_step", "input_range"


def is_int8(stored: Mapping[str, torch.Tensor]) -> bool:
    """Whether stored tensors are in this form."""
    return any(name.endswith(SCALE) for name in stored)


def restore(stored: Mapping[str, torch.Tensor], where: object) -> dict[str, torch.Tensor]:
    """Return the canonical tensors, in float32, that stored ones stand for.

    Raises:
        WeightsError: a part of a matrix is missing, or does not fit it.
    """
    return {
        name: _matrix(name, stored, where) if tensor.dtype is torch.int8 else tensor
        for name, tensor in stored.items()
        if not name.endswith((SCALE, STEP, RANGE))
    }


def input_ranges(stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the range of each linear map's inputs, `[2, K]`, by the map's name."""
    return {name.removesuffix(f".{RANGE}"): tensor for name, tensor in stored.items() if name.endswith(f".{RANGE}")}


def _matrix(name: str, stored: Mapping[str, torch.Tensor], where: object) -> torch.Tensor:
    """Return one matrix in float32."""
    values, module = stored[name], name.removesuffix(".weight")
    scale, step = stored.get(name + SCALE), stored.get(f"{module}.{STEP}")
    limits = stored.get(f"{module}.{RANGE}")
    if scale is None or values.dim() != 2 or scale.shape != values.shape[:1]:
        raise WeightsError(f"{where}: expected {name}{SCALE} with one number for each row of {name}, and it has none")
    shapes = [None if part is None else tuple(part.shape) for part in (step, limits)]
    if shapes not in ([None, None], [(values.shape[1],), (2, values.shape[1])]):
        raise WeightsError(f"{where}: {module} has an input_step and input_range of shapes {shapes}, which do not fit")
    weight = values.float().mul_(scale.unsqueeze(1))  # in place: new memory costs more than the arithmetic
    return weight if step is None else weight.div_(step)
