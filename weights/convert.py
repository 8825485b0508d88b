"""BERT's tensors and config.json to ours and back, exact to the bit, with every contradiction found at once."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from minilm.config import MiniLMConfig
from minilm.weights.files import WeightsError
from minilm.weights.names import OPTIONAL, OUTPUT_LAYER, POSITION_IDS, is_leftover, plain_name, tensor_names

logger = logging.getLogger("minilm.weights")

Tensors = dict[str, torch.Tensor]

# Our field, and BERT's in config.json. The sizes must be there; the rest have BERT's own defaults.
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "feed_forward_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
}
_CONSTANTS = {
    "num_token_types": "type_vocab_size",
    "layer_norm_eps": "layer_norm_eps",
    "hidden_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "pad_token_id": "pad_token_id",
}
# What this encoder computes; a config.json that asks for something else is refused.
_REQUIRED = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def config_from_bert(values: Mapping[str, Any], where: Path) -> MiniLMConfig:
    """Return our configuration for a BERT config.json's values; `WeightsError` if we cannot run such a model."""
    for name, expected in _REQUIRED.items():
        if values.get(name, expected) != expected:
            raise WeightsError(f"{where}: {name} must be {expected!r}, got {values[name]!r}; minilm has no such model")
    missing = [name for name in _SIZES.values() if name not in values]
    if missing:
        raise WeightsError(f"{where} does not say {', '.join(missing)}. Add what the model was trained with")
    names = {ours: theirs for ours, theirs in (_SIZES | _CONSTANTS).items() if values.get(theirs) is not None}
    try:
        return MiniLMConfig.from_dict({ours: values[theirs] for ours, theirs in names.items()})
    except (ValueError, TypeError) as error:
        raise WeightsError(f"{where}: {error}") from error


def config_to_bert(config: MiniLMConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return the config.json of a BERT model with this configuration, its tensors stored in `dtype`."""
    ours = config.to_dict()
    values = {theirs: ours[name] for name, theirs in (_SIZES | _CONSTANTS).items()}
    kind = {"architectures": ["BertModel"], "dtype": str(dtype).removeprefix("torch.")}
    return dict(sorted((kind | _REQUIRED | values | {"initializer_range": 0.02, "use_cache": False}).items()))


def from_bert(source: Mapping[str, torch.Tensor], config: MiniLMConfig, where: Path) -> tuple[Tensors, tuple[str, ...]]:
    """Return canonical tensors and the source's names that were left out.

    Args:
        source: BERT's tensors, under any names that `plain_name` understands.
        config: the sizes that the tensors must have.
        where: the file they came from, for errors.

    Raises:
        WeightsError: tensors are missing, unexpected, misshapen, given twice or not finite; all are listed.
    """
    found: Tensors = {}
    twice, ignored = [], []
    for original, tensor in source.items():
        name = plain_name(original)
        if is_leftover(name):
            ignored.append(original)
        elif name in found:
            twice.append(original)
        else:
            found[name] = tensor
    if ignored:
        logger.warning("%s: left out %d tensors no vector depends on: %s", where, len(ignored), ", ".join(ignored))
    table = tensor_names(config)
    expected = {name: row.their_shape for row in table for name in row.theirs}
    optional = {name for row in table if row.ours in OPTIONAL for name in row.theirs}
    mixed = [", ".join(row.theirs) for row in table if len({found[n].dtype for n in row.theirs if n in found}) > 1]
    _check(found, expected, optional, where, {"stored twice": twice, "of different dtypes": mixed})
    fused = {row.ours: _stack([found[name] for name in row.theirs]) for row in table if row.theirs[0] in found}
    return fused, tuple(ignored)


def to_bert(tensors: Mapping[str, torch.Tensor], config: MiniLMConfig) -> Tensors:
    """Return BERT's tensors for canonical ones: views of them, under BERT's own names."""
    rows = [row for row in tensor_names(config) if row.ours in tensors]
    return {
        name: part
        for row in rows
        for name, part in zip(row.theirs, tensors[row.ours].chunk(len(row.theirs)), strict=True)
    }


def check_canonical(tensors: Mapping[str, torch.Tensor], config: MiniLMConfig, where: Path | str) -> None:
    """Raise `WeightsError`, listing everything wrong, unless these are the canonical tensors of such a model."""
    expected = {row.ours: row.shape for row in tensor_names(config)}
    if OUTPUT_LAYER in tensors:  # of any width
        expected[OUTPUT_LAYER] = (*tensors[OUTPUT_LAYER].shape[:1], config.hidden_size)
    _check(tensors, expected, OPTIONAL, where)


def _stack(parts: list[torch.Tensor]) -> torch.Tensor:
    """Return the tensors stacked along the first axis; a single one as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _check(
    found: Mapping[str, torch.Tensor],
    expected: Mapping[str, tuple[int, ...]],
    optional: Collection[str],
    where: Path | str,
    problems: Mapping[str, list[str]] | None = None,
) -> None:
    """Raise `WeightsError` with all that is wrong with the tensors found, and the problems known already."""
    known = {name: tensor for name, tensor in found.items() if name in expected}
    problems = {
        "missing": [name for name in expected if name not in found and name not in optional],
        "unexpected": [name for name in found if name not in expected],
        "misshapen": [
            f"{name} is {list(tensor.shape)}, expected {list(expected[name])}"
            for name, tensor in known.items()
            if tuple(tensor.shape) != expected[name]
        ],
        "of a wrong dtype": [
            f"{n} is {t.dtype}" for n, t in known.items() if n != POSITION_IDS and t.dtype not in _DTYPES
        ],
        "with wrong values (NaN, infinite, or not positions)": [n for n, t in known.items() if not _is_sound(n, t)],
        **(problems or {}),
    }
    listed = [f"  {kind} ({len(items)}): {', '.join(items)}" for kind, items in problems.items() if items]
    if listed:
        raise WeightsError(
            "\n".join([f"{where}: the tensors are not those the configuration asks for; nothing was loaded.", *listed])
            + "\nCheck that the configuration belongs to these weights, or download them again"
        )


def _is_sound(name: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor is all finite, or, for the position numbers, 0, 1, 2 and so on."""
    if name == POSITION_IDS:
        return torch.equal(tensor.flatten().long(), torch.arange(tensor.numel()))
    if tensor.dtype not in _DTYPES:
        return True  # reported for its dtype
    # The sum is not finite if any value is not, at a fraction of the cost; it may also overflow: hence the second look.
    return bool(tensor.sum(dtype=torch.float32).isfinite() or tensor.isfinite().all())
