"""A run's state on disk: one file, replaced as a whole, that a killed run goes on from as if nothing had happened."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint can't be read, or is another run's."""


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state of tensors and plain values; whatever happens, the file is the old one or the new one, whole.

    It is written beside the old one, flushed to the disk, and renamed over it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing")
    with temporary.open("wb") as file:
        torch.save({"format": FORMAT, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    with suppress(OSError):  # the rename itself, where a folder can be flushed
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load_checkpoint(path: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the state that was saved last, on the CPU; None if there is none. No code in it is run.

    Raises:
        CheckpointError: the file is damaged, or was made by a run with other `settings` (those that differ are named).
    """
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} can't be read ({error}); delete it to begin anew") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no checkpoint of this version of minilm; delete it to begin anew")
    theirs = state["settings"]
    changed = sorted(name for name in {*theirs, *settings} if theirs.get(name) != settings.get(name))
    if changed:
        pairs = ", ".join(f"{name} was {theirs.get(name)!r} and is {settings.get(name)!r}" for name in changed)
        raise CheckpointError(
            f"{path} belongs to a run with other settings: {pairs}. Set them back to go on, or choose another output"
        )
    return state
