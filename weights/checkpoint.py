"""The canonical form of a model's weights: `Checkpoint`, the folder it is stored in, and its fingerprint.

A canonical folder is `model.safetensors` and `tokenizer.json`, and needs nothing else; beside them may be a model card,
`README.md`. The safetensors metadata holds the model's and the encoding's configuration, where the weights came from,
and the fingerprint of all that decides a sentence vector, which shows an altered bit that the file format cannot see.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minilm.config import EncodingConfig, MiniLMConfig
from minilm.weights import int8
from minilm.weights.convert import check_canonical
from minilm.weights.files import WeightsError, new_folder, read_safetensors, read_text, standalone, write_safetensors
from minilm.weights.names import OPTIONAL, OUTPUT_LAYER
from minilm.weights.vocabulary import check_vocabulary

FORMAT, FORMAT_VERSION = "minilm", "2"
WEIGHTS_FILE, TOKENIZER_FILE, CARD_FILE = "model.safetensors", "tokenizer.json", "README.md"
METADATA = ("config", "encoding", "provenance", "calibration", "golden", "fingerprint", "checksum")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model's weights and everything needed to run it.

    Attributes:
        config: the model's sizes and constants.
        encoding: pooling, normalisation, maximum length, prompts and similarity.
        tensors: the weights by canonical name (see `names`), the optional ones and an output layer's included; in the
            source's dtype, or in float32 where they come from an encoder (`SentenceEncoder.to_checkpoint`).
        tokenizer_json: a complete Hugging Face `tokenizers` JSON, with neither truncation nor padding.
        provenance: `source`, `source_format` (minilm, sentence-transformers, modelscope or bert), `source_sha256`,
            `source_max_seq_length`, `licence` and `converted_with`; of a trained model, those of its start.
        calibration: [2, C or D] float32, each dimension's minimum and maximum over real sentences, for int8 output.
        golden: sentences with their expected result: `text`, `ids` and `vector`.
        ignored: names of source tensors that are no part of the model and were left out.
        stored_fingerprint: the fingerprint that a canonical file was saved with.
        int8: the 8-bit form (see `minilm.weights.int8`) that the weights were restored from, and are saved in.
        card: the model card of a canonical folder, in Markdown.
    """

    config: MiniLMConfig
    encoding: EncodingConfig
    tensors: dict[str, torch.Tensor]
    tokenizer_json: str
    provenance: dict[str, Any] = field(default_factory=dict)
    calibration: torch.Tensor | None = None
    golden: list[dict[str, Any]] | None = None
    ignored: tuple[str, ...] = ()
    stored_fingerprint: str | None = None
    int8: dict[str, torch.Tensor] | None = None
    card: str | None = None

    @property
    def model_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of the model, without the optional ones that only an export needs."""
        return {name: tensor for name, tensor in self.tensors.items() if name not in OPTIONAL}

    @property
    def optional_tensors(self) -> dict[str, torch.Tensor]:
        """The others."""
        return {name: tensor for name, tensor in self.tensors.items() if name in OPTIONAL}

    @property
    def output_width(self) -> int | None:
        """D, what width an output layer takes the pooled vectors to; None without such a layer."""
        return len(self.tensors[OUTPUT_LAYER]) if OUTPUT_LAYER in self.tensors else None

    @property
    def stored(self) -> dict[str, torch.Tensor]:
        """What a file holds of the weights: their 8-bit form if they have one, else the tensors as they are."""
        return self.int8 or self.tensors

    @property
    def input_ranges(self) -> dict[str, torch.Tensor]:
        """The range of each linear map's inputs, `[2, K]`, by the map's name; none unless the weights are 8-bit."""
        return int8.input_ranges(self.int8 or {})

    def with_encoding(self, **changes: Any) -> Checkpoint:
        """Return the checkpoint with other settings (fields of `EncodingConfig`), without what was told of these.

        Raises:
            ValueError: a setting out of range.
        """
        if not changes:
            return self
        changed = replace(self, encoding=replace(self.encoding, **changes), stored_fingerprint=None, card=None)
        return changed if changes.keys() == {"max_seq_length"} else replace(changed, golden=None, calibration=None)

    def with_dtype(self, dtype: torch.dtype) -> Checkpoint:
        """Return the checkpoint with its weights rounded to `dtype`, without what was told of the others."""
        tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.tensors.items()}
        return self.with_weights(tensors)

    def with_weights(
        self, tensors: dict[str, torch.Tensor], int8_form: dict[str, torch.Tensor] | None = None
    ) -> Checkpoint:
        """Return the checkpoint with other weights (`tensors`, and `int8` if any), without what was told of these."""
        untold: dict[str, Any] = {"golden": None, "calibration": None, "stored_fingerprint": None, "card": None}
        return replace(self, tensors=tensors, int8=int8_form, **untold)

    def with_layers(self, layers: Sequence[int]) -> Checkpoint:
        """Return a smaller model, of some of the layers, counted from 1, without what was told of the whole.

        Raises:
            ValueError: no layers, one that there is not, or not in rising order.
        """
        every = range(1, self.config.num_layers + 1)
        if not layers or list(layers) != sorted(set(layers) & set(every)):
            raise ValueError(f"expected layers in rising order from 1 to {len(every)}, got {list(layers)}")
        tensors = {name: tensor for name, tensor in self.tensors.items() if not name.startswith("layers.")}
        for place, layer in enumerate(layers):
            prefix = f"layers.{layer - 1}."
            own = [name for name in self.tensors if name.startswith(prefix)]
            tensors |= {f"layers.{place}.{name.removeprefix(prefix)}": self.tensors[name] for name in own}
        return replace(self.with_weights(tensors), config=replace(self.config, num_layers=len(layers)))

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the canonical folder, whole or not at all, and return it.

        An earlier canonical folder is replaced; any other folder that is not empty is a `WeightsError`, as are tensors
        that do not fit the configuration.
        """
        target = Path(folder).expanduser().resolve()
        check_canonical(self.tensors, self.config, "the checkpoint to save")
        with new_folder(target, replaces=_replaceable_files(target)) as temporary:
            (temporary / TOKENIZER_FILE).write_text(self.tokenizer_json, encoding="utf-8")
            if self.card is not None:
                (temporary / CARD_FILE).write_text(self.card, encoding="utf-8")
            write_safetensors(temporary / WEIGHTS_FILE, self.stored, self._metadata())
        return target

    def _metadata(self) -> dict[str, str]:
        """Return the safetensors metadata; every value but the format is JSON."""
        values = {
            "config": self.config.to_dict(),
            "encoding": self.encoding.to_dict(),
            "provenance": self.provenance,
            "calibration": None if self.calibration is None else self.calibration.float().tolist(),
            "golden": self.golden,
            "fingerprint": fingerprint(self),
            "checksum": _checksum(self.stored, self.tokenizer_json),
        }
        return {"format": FORMAT, "format_version": FORMAT_VERSION} | {k: json.dumps(values[k]) for k in METADATA}


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return the sha256, in hexadecimal, of all that decides a sentence vector.

    That is the model's tensors (name, shape and values in float32), its head count and LayerNorm epsilon, the tokenizer
    and the encoding configuration; the optional tensors, provenance and layout of the files have no part in it.
    """
    settings = {
        "num_heads": checkpoint.config.num_heads,
        "layer_norm_eps": checkpoint.config.layer_norm_eps,
        "encoding": checkpoint.encoding.to_dict(),
        "tokenizer": json.loads(checkpoint.tokenizer_json),
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(checkpoint.model_tensors.items()):
        digest.update(f"\n{name} {list(tensor.shape)}\n".encode())
        digest.update(standalone(tensor.float()).reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _checksum(tensors: dict[str, torch.Tensor], tokenizer_json: str) -> str:
    """Return a sha256 that shows damage, such as a flipped bit, to anything a folder stores beside its metadata.

    It is taken over sums: each tensor's bytes are a table of 64-bit words, 512 a row, of which every row and every
    column is summed up modulo 2^64. That takes a fifth of the time of a sha256 over all bytes, and any change in fewer
    than four words alters a sum. (It is stored beside what it checks: against intent there would be no use in more.)
    """
    digest = hashlib.sha256(tokenizer_json.encode())
    for _, tensor in sorted(tensors.items()):
        data = standalone(tensor).reshape(-1).view(torch.uint8).numpy()
        table, rest = np.split(data, [data.size // _ROW * _ROW])
        words = table.view("<u8").reshape(-1, _ROW // 8)
        for part in (words.sum(axis=1), words.sum(axis=0), rest):
            digest.update(part.data)
    return digest.hexdigest()


def _checksum_of_version_1(tensors: dict[str, torch.Tensor], tokenizer_json: str) -> str:
    """Return the sha256 of all that a folder stores beside its metadata, as files of format version 1 have it."""
    digest = hashlib.sha256(tokenizer_json.encode())
    for _, tensor in sorted(tensors.items()):
        digest.update(standalone(tensor).reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


_ROW = 4_096  # bytes
_CHECKSUMS = {"1": _checksum_of_version_1, FORMAT_VERSION: _checksum}


def _replaceable_files(folder: Path) -> frozenset[str]:
    """Return the names of the files that may be replaced in a folder: those of a canonical one, else none."""
    try:
        return frozenset({WEIGHTS_FILE, TOKENIZER_FILE, CARD_FILE} if is_canonical(folder / WEIGHTS_FILE) else ())
    except WeightsError:
        return frozenset()


def is_canonical(path: Path) -> bool:
    """Whether this is a safetensors file that minilm wrote; `WeightsError` if it is a damaged one."""
    if path.suffix != ".safetensors" or not path.exists():
        return False
    return read_safetensors(path, metadata_only=True)[1].get("format") == FORMAT


def read_canonical(path: Path) -> Checkpoint:
    """Read a canonical weights file and the tokenizer beside it.

    Raises:
        WeightsError: the file, its metadata, a tensor or the tokenizer is missing, damaged or contradicts the rest.
    """
    stored, metadata = read_safetensors(path)
    version = metadata.get("format_version")
    if version not in _CHECKSUMS:
        known = " and ".join(_CHECKSUMS)
        raise WeightsError(f"{path} has format version {version}, this minilm reads {known}. Update minilm")
    try:
        values = {name: json.loads(metadata[name]) for name in METADATA}
        calibration, checksum = values["calibration"], values["checksum"]
        config, encoding = MiniLMConfig.from_dict(values["config"]), EncodingConfig.from_dict(values["encoding"])
        limits = None if calibration is None else torch.tensor(calibration, dtype=torch.float32)
        width = len(stored[OUTPUT_LAYER]) if OUTPUT_LAYER in stored else config.hidden_size
        if limits is not None and limits.shape != (2, width):
            raise ValueError(f"calibration must be [2, {width}], got {list(limits.shape)}")
    except (KeyError, ValueError, TypeError) as error:
        raise WeightsError(f"{path} has damaged metadata ({error}). Convert or download it again") from error
    tensors = int8.restore(stored, path) if int8.is_int8(stored) else stored
    check_canonical(tensors, config, path)
    tokenizer_json = read_text(path.with_name(TOKENIZER_FILE))
    check_vocabulary(tokenizer_json, config, path.with_name(TOKENIZER_FILE))
    if _CHECKSUMS[version](stored, tokenizer_json) != checksum:
        raise WeightsError(f"{path.parent} is damaged: not what was saved there. Convert or download it again")
    return Checkpoint(
        config,
        encoding,
        tensors,
        tokenizer_json,
        values["provenance"],
        limits,
        values["golden"],
        stored_fingerprint=str(values["fingerprint"]),
        int8=None if tensors is stored else stored,
        card=_read_card(path.with_name(CARD_FILE)),
    )


def _read_card(path: Path) -> str | None:
    """Return a model card, if there is one."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
