"""Weights on the Hugging Face hub and on ModelScope: found in their caches, or downloaded to them.

The caches are read where they are, in each client's own layout, and no network is touched for that. Downloads go
through the client itself (`huggingface_hub`, `modelscope`), so its settings, tokens and mirrors apply.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from minilm.weights.download import SourceError, run_python
from minilm.weights.files import WEIGHTS_FILES, read_json

_HUGGING_FACE_PATIENCE = 8.0
_MODELSCOPE_PATIENCE = 10.0  # to import modelscope takes longer
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt")
_CONFIG = ("config.json",)
_MODULE_FILES = {"Pooling": (_CONFIG,), "Dense": (_CONFIG, WEIGHTS_FILES)}  # of each tuple, one must be there

_CHILD = """
import sys
sys.excepthook = lambda kind, error, trace: print(*f"{kind.__name__}: {error}".split())
"""
# Asking for a file that a repository has not makes the client note its absence, which a later look-up can tell from
# "not downloaded".
_MODEL_CHILD = f"""{_CHILD}
import contextlib, pathlib
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.utils import EntryNotFoundError
cache, name = sys.argv[1:]
patterns = ["*.json", "*.txt", "model.safetensors", "*_Dense/*"]
folder = pathlib.Path(snapshot_download(name, cache_dir=cache, allow_patterns=patterns))
if not (folder / "model.safetensors").exists():
    snapshot_download(name, cache_dir=cache, allow_patterns=["pytorch_model.bin"])
for file in ("modules.json", "sentence_bert_config.json"):
    with contextlib.suppress(EntryNotFoundError):
        hf_hub_download(name, file, revision=folder.name, cache_dir=cache)
"""
_DATASET_CHILD = f"""{_CHILD}
from huggingface_hub import hf_hub_download
cache, name, file, revision = sys.argv[1:]
hf_hub_download(name, file, repo_type="dataset", revision=revision, cache_dir=cache)
"""
_MODELSCOPE_CHILD = f"""{_CHILD}from modelscope.hub.snapshot_download import snapshot_download
snapshot_download(sys.argv[1])
"""


def hugging_face_cache() -> Path:
    """Return huggingface_hub's cache: $HF_HUB_CACHE, $HF_HOME/hub or ~/.cache/huggingface/hub."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def find_in_hugging_face_cache(name: str) -> Path:
    """Return the cached snapshot of `owner/name`, if it has all that loading needs.

    What other programs cached may lack the files that say how to pool and where to cut, without which the model would
    load and give other vectors: each must be there, or be known not to exist.

    Raises:
        SourceError: the model is not there, or not all of it.
    """
    from huggingface_hub import try_to_load_from_cache

    cached = {  # a path; None if never asked for; otherwise the hub has no such file
        file: try_to_load_from_cache(name, file, cache_dir=hugging_face_cache())
        for file in (*WEIGHTS_FILES, *_TOKENIZER_FILES, "modules.json", "sentence_bert_config.json")
    }
    weights = [path for file in WEIGHTS_FILES if isinstance(path := cached[file], str)]
    if not weights:
        raise SourceError("not there")
    folder = Path(weights[0]).parent
    missing = [] if cached["modules.json"] is not None else ["modules.json"]
    if isinstance(cached["modules.json"], str):
        missing += ["sentence_bert_config.json"] if cached["sentence_bert_config.json"] is None else []
        missing += _missing_of_modules(folder)
    if not any(isinstance(cached[file], str) for file in _TOKENIZER_FILES):
        missing.append(" or ".join(_TOKENIZER_FILES))
    if missing:
        raise SourceError(f"{folder} is incomplete: {', '.join(missing)} not downloaded")
    return folder


def _missing_of_modules(folder: Path) -> list[str]:
    """Return the files of Pooling and Dense modules that a sentence-transformers folder names but lacks."""
    modules = read_json(folder / "modules.json")
    try:
        kinds = [(folder / module["path"], module["type"].rpartition(".")[2]) for module in modules]
    except (TypeError, KeyError, AttributeError) as error:
        raise SourceError(f"{folder / 'modules.json'} is not a list of modules ({error!r})") from error
    places = [(path, files) for path, kind in kinds for files in _MODULE_FILES.get(kind, ())]
    missing = [path / files[0] for path, files in places if not any((path / file).is_file() for file in files)]
    return [path.relative_to(folder).as_posix() for path in missing]


def download_from_hugging_face(name: str) -> Path:
    """Download `owner/name` to huggingface_hub's cache and return its snapshot.

    Raises:
        SourceError: the hub is offline by $HF_HUB_OFFLINE, cannot be reached, or has no such model.
    """
    _run_hugging_face_client(_MODEL_CHILD, "models", [name])
    return find_in_hugging_face_cache(name)


def dataset_file(name: str, file: str, revision: str) -> Path:
    """Return a file of the dataset `owner/name` from huggingface_hub's cache, downloaded to it if need be.

    Raises:
        SourceError: the file is not there, and the hub is offline, cannot be reached, or has no such file.
    """
    from huggingface_hub import try_to_load_from_cache

    def cached() -> str | object | None:
        return try_to_load_from_cache(name, file, hugging_face_cache(), revision, repo_type="dataset")

    if not isinstance(cached(), str):
        _run_hugging_face_client(_DATASET_CHILD, "datasets", [name, file, revision])
    if not isinstance(path := cached(), str):
        raise SourceError(f"{file} of the dataset {name} was not downloaded")
    return Path(path)


def _run_hugging_face_client(code: str, kind: str, arguments: Sequence[str]) -> None:
    """Run code that downloads from one of the hub's `models` or `datasets`, named by the first of its arguments."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise SourceError("HF_HUB_OFFLINE is set")
    cache, name = hugging_face_cache(), arguments[0]
    run_python(
        code,
        [str(cache), *arguments],
        cache / f"{kind}--{name.replace('/', '--')}",
        f"{name} from {constants.ENDPOINT}",
        patience=_HUGGING_FACE_PATIENCE,
        # The xet protocol may write late, which would look like a stall.
        environment={"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1"},
    )


def modelscope_cache() -> Path:
    """Return ModelScope's cache: $MODELSCOPE_CACHE or ~/.cache/modelscope."""
    return Path(os.environ.get("MODELSCOPE_CACHE") or Path.home() / ".cache" / "modelscope").expanduser()


def modelscope_folders(name: str) -> list[Path]:
    """Return where versions of ModelScope keep `owner/name`, newest layout first (a `.` may be spelled `___`)."""
    cache, (owner, model) = modelscope_cache(), name.split("/")
    snapshots = cache / "models" / f"{owner}--{model}" / "snapshots"
    found = sorted(snapshots.glob("*"), key=lambda folder: folder.stat().st_mtime, reverse=True)
    roots = (cache / "models", cache / "hub" / "models", cache / "hub", cache)
    spellings = dict.fromkeys((model.replace(".", "___"), model))
    return [*(found or [snapshots / "master"]), *(root / owner / spelled for root in roots for spelled in spellings)]


def find_in_modelscope_cache(name: str) -> Path:
    """Return the cached folder of `owner/name`, if it has all that loading needs.

    Raises:
        SourceError: the model is not there, or not all of it.
    """
    folders, incomplete = modelscope_folders(name), []
    needed = (WEIGHTS_FILES, _TOKENIZER_FILES, ("config.json",), ("configuration.json", "modules.json"))
    for folder in filter(Path.is_dir, folders):
        missing = [" or ".join(files) for files in needed if not any((folder / file).is_file() for file in files)]
        if not missing:
            return folder
        incomplete.append(f"{folder} is incomplete: no {', '.join(missing)}")
    looked = ", ".join(folder.relative_to(modelscope_cache()).as_posix() for folder in folders)
    raise SourceError("; ".join(incomplete) or f"not there: no {looked}")


def download_from_modelscope(name: str) -> Path:
    """Download `owner/name` to ModelScope's cache, with the `modelscope` package, and return its folder.

    Raises:
        SourceError: the package is not installed, the hub cannot be reached, or it has no such model.
    """
    if importlib.util.find_spec("modelscope") is None:
        raise SourceError("the modelscope package is not installed (pip install modelscope)")
    run_python(
        _MODELSCOPE_CHILD,
        [name],
        modelscope_cache(),
        f"{name} from ModelScope",
        patience=_MODELSCOPE_PATIENCE,
    )
    return find_in_modelscope_cache(name)
