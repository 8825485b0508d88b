"""Choosing a backend: who supplies the encoder's operations, and what to say where it can't."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType

from minilm.config import MiniLMConfig
from minilm.kernels.torch_backend import TorchBackend

BACKENDS = {
    "torch": "minilm.kernels.torch_backend:TorchBackend",
    "packed": "minilm.kernels.packed_backend:PackedBackend",
    "int8": "minilm.kernels.int8_backend:Int8Backend",
    "triton": "minilm.kernels.triton_backend:TritonBackend",
}
AUTOMATIC = {"cpu": "packed", "cuda": "triton"}  # what `auto` tries on a kind of device before plain torch

BackendChoice = str | type[TorchBackend]


class BackendError(ValueError):
    """The backend asked for can't be found, or can't run here."""


class BackendWarning(UserWarning):
    """Plain torch computes what a backend would have."""


def make_backend(choice: BackendChoice, config: MiniLMConfig, device: str = "cpu") -> TorchBackend:
    """Return the backend that `choice` means, for a model of these sizes on a kind of device.

    Args:
        choice: `auto` for the fastest that runs here; a name in `BACKENDS`; a subclass of `TorchBackend`, or where one
            is: `package.module:Class` or `path/to/file.py:Class`.
        config: the model's sizes.
        device: the kind of device the model is on, `cpu` or `cuda`.

    Raises:
        BackendError: the choice can't be found, or can't run; the message says why. Only `auto` falls back, with a
            `BackendWarning`.
        TypeError: neither a string nor a subclass of `TorchBackend`.
    """
    if choice == "auto":
        return _automatic(config, device)
    chosen = backend_class(choice)
    reason = chosen.unavailable(config, device)
    if reason is not None:
        raise BackendError(f"the {chosen.name} backend can't run here: {reason}")
    return chosen(config)


def backend_class(choice: BackendChoice) -> type[TorchBackend]:
    """Return the class that `choice` (not `auto`) names; see `make_backend`."""
    if isinstance(choice, type) and issubclass(choice, TorchBackend):
        return choice
    if not isinstance(choice, str):
        raise TypeError(f"backend must be a name or a subclass of TorchBackend, got {choice!r}")
    place, colon, name = BACKENDS.get(choice, choice).rpartition(":")
    if not colon:
        raise BackendError(
            f"unknown backend {choice!r}: expected auto, {', '.join(BACKENDS)}, or where a subclass of TorchBackend "
            f"is, as package.module:Class or path/to/file.py:Class"
        )
    found = getattr(_module(place, choice), name, None)
    if not (isinstance(found, type) and issubclass(found, TorchBackend)):
        wanted = f"a subclass of TorchBackend called {name} in {place}"
        raise BackendError(f"expected {wanted}, {'found none' if found is None else f'got {found!r}'}")
    return found


def _automatic(config: MiniLMConfig, device: str) -> TorchBackend:
    """Return the fastest backend that runs on this kind of device."""
    name = AUTOMATIC.get(device)
    if name is not None:
        try:
            return make_backend(name, config, device)
        except BackendError as error:
            warnings.warn(f"{error}; plain torch computes instead", BackendWarning, stacklevel=2)
    return TorchBackend(config)


def _module(place: str, choice: str) -> ModuleType:
    """Import a module by name, or from a file."""
    try:
        return module_of_file(Path(place).resolve()) if place.endswith(".py") else importlib.import_module(place)
    except ImportError as error:
        if choice in BACKENDS:
            reason = f'{error}; pip install "minilm[{choice}]" brings what it needs'
        else:
            reason = f"{error}; a file is given by its path, as in path/to/file.py:Class"
        raise BackendError(f"the backend {choice!r} can't be imported: {reason}") from error
    except OSError as error:
        raise BackendError(f"the backend {choice!r} can't be read: {error}") from error


@cache
def module_of_file(path: Path) -> ModuleType:
    """Run a file as a module, once."""
    name = str(path)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs, as dataclasses and pickle need it there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
