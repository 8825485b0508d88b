"""Reading and writing the files of a weights folder: whole or not at all, with errors that say what to do."""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import pickle
import re
import shutil
import sys
import uuid
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

logger = logging.getLogger("minilm.weights")

WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")
_GIT_LFS = b"version https://git-lfs"


class WeightsError(ValueError):
    """The weights, or the folder around them, cannot be used; the message says what was found and what to do."""


def check_file(path: Path) -> None:
    """Raise `WeightsError` if a file is missing, empty, or a git-lfs pointer instead of its content."""
    if not path.is_file():
        raise WeightsError(f"{path} is missing. Download the folder again, or point to the folder that holds it")
    if path.stat().st_size == 0:
        raise WeightsError(f"{path} is empty: a download or copy was cut short. Download it again")
    with path.open("rb") as file:
        if file.read(len(_GIT_LFS)) == _GIT_LFS:
            raise WeightsError(
                f"{path} is a git-lfs pointer, not the file itself. Run `git lfs pull` in its repository"
            )


def read_text(path: Path) -> str:
    """Return a UTF-8 file's text, whatever its line ends; `WeightsError` if it cannot be read as that."""
    check_file(path)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path} cannot be read as UTF-8 text ({error}). Download it again") from error


def read_json(path: Path) -> Any:
    """Return what a JSON file holds; `WeightsError` if it is not JSON."""
    try:
        return json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise WeightsError(f"{path} is not valid JSON ({error}). Download it again, or repair it") from error


def read_object(path: Path, *, missing_ok: bool = False) -> dict[str, Any]:
    """Return the dictionary a JSON file holds ({} for a missing file, if that is allowed)."""
    if missing_ok and not path.exists():
        return {}
    values = read_json(path)
    if not isinstance(values, dict):
        raise WeightsError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return values


def parse_toml(text: str, where: object) -> dict[str, Any]:
    """Return what a TOML text says: by the standard library since Python 3.11, by tomli before that.

    Raises:
        WeightsError: it is not TOML.
        ImportError: tomli is needed and not installed.
    """
    try:
        parser = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    except ImportError as error:
        raise ImportError('TOML needs tomli on Python 3.10: pip install "minilm[train]"') from error
    try:
        values: dict[str, Any] = parser.loads(text)
    except parser.TOMLDecodeError as error:
        raise WeightsError(f"{where} is not TOML: {error}") from error
    return values


def find_weights(folder: Path) -> list[Path]:
    """Return a folder's weights: one file, or the shards that its index names; safetensors before PyTorch's."""
    for name in WEIGHTS_FILES:
        if (folder / name).exists():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.exists():
            shards = read_object(index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
                raise WeightsError(f"{index} has no weight_map from tensor to file. Download it again")
            return [folder / Path(shard).name for shard in sorted(set(shards.values()))]
    held = ", ".join(sorted(entry.name for entry in folder.iterdir())) or "nothing"
    raise WeightsError(f"{folder} holds no weights: expected {' or '.join(WEIGHTS_FILES)}, found {held}")


def read_tensors(paths: Sequence[Path]) -> dict[str, torch.Tensor]:
    """Return the tensors of weights files by the names they are stored under, memory-mapped where the format allows."""
    tensors: dict[str, torch.Tensor] = {}
    for path in paths:
        tensors |= read_safetensors(path)[0] if path.suffix == ".safetensors" else _read_pickle(path)
    return tensors


def read_safetensors(path: Path, *, metadata_only: bool = False) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors, memory-mapped, and the metadata of a safetensors file (no tensors if only that is wanted)."""
    check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            names = () if metadata_only else file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        remedy = "it was cut short or altered. Download or convert it again"
        raise WeightsError(f"{path} is not a whole safetensors file ({error}): {remedy}") from error


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a PyTorch state dict, without running any code that the pickle asks for."""
    check_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} is refused: it is damaged, or asks for more than tensors{_asked_for(error)}, and reading more "
            "could run any code. If you trust its origin, load it there and save its state dict with "
            "safetensors.torch.save_file"
        ) from error
    except Exception as error:  # torch names no set of errors for damaged files
        raise WeightsError(f"{path} is not a whole PyTorch file ({error}). Download it again") from error
    if not isinstance(state, dict):
        raise WeightsError(f"{path} must hold a dictionary of tensors, got {type(state).__name__}")
    other = [str(name) for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if other:
        raise WeightsError(
            f"{path} must hold tensors only, but these are not: {', '.join(other)}. "
            "If it is a training checkpoint, save the model's state dict alone"
        )
    return {str(name): value.detach() for name, value in state.items()}


def _asked_for(error: pickle.UnpicklingError) -> str:
    """Return what a refused pickle asks for, where torch's message names it."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    return f" ({found[1].rstrip('.,')})" if found else ""


def sha256(paths: Sequence[Path]) -> str:
    """Return the sha256, in hexadecimal, of files read one after another."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def write_json(path: Path, values: Any) -> None:
    """Write a value as indented JSON; the file appears, or replaces the old one, whole."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write tensors, wherever they live, to a safetensors file that has the permissions of any new file."""
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file({name: standalone(tensor) for name, tensor in tensors.items()}, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written ({error})") from error
    path.chmod(mode)  # safetensors makes its files private to the user


def standalone(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor on the CPU, contiguous, and with no other tensor in its memory; copied only if need be."""
    tensor = tensor.detach().cpu().contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()


@contextmanager
def new_folder(folder: str | os.PathLike[str], *, replaces: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Yield an empty folder that becomes `folder` when the block ends, and vanishes if the block raises.

    Args:
        folder: the folder to make; missing parents are made too.
        replaces: an existing folder is replaced if it holds nothing but files of these names.

    Raises:
        WeightsError: `folder` exists and holds something else.
    """
    target = Path(folder).expanduser().resolve()
    _check_replaceable(target, replaces)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(target)
    temporary.mkdir()
    try:
        yield temporary
        _check_replaceable(target, replaces)
        _move(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sibling(target: Path) -> Path:
    """Return a hidden path beside `target` that nothing else uses."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}")


def _move(folder: Path, target: Path) -> None:
    """Rename a folder to `target`; what is there moves aside first, and comes back if the rename fails."""
    if not target.exists():
        folder.rename(target)
        return
    old = target.rename(_sibling(target))
    try:
        folder.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _check_replaceable(target: Path, replaces: frozenset[str]) -> None:
    """Raise `WeightsError` if writing a folder here would delete something it must not."""
    if not target.exists():
        return
    if not target.is_dir():
        raise WeightsError(f"{target} is a file; name a folder to write to")
    held = sorted(entry.name for entry in target.iterdir())
    if not set(held) <= replaces:
        raise WeightsError(f"{target} is not empty ({', '.join(held)}) and is left as it is; name a new folder")
