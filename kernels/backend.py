"""Choosing a backend: who supplies the encoder's operations."""

from __future__ import annotations

from minilm.config import MiniLMConfig
from minilm.kernels.torch_backend import TorchBackend

BACKENDS: dict[str, type[TorchBackend]] = {"torch": TorchBackend}


def make_backend(choice: str | type[TorchBackend], config: MiniLMConfig) -> TorchBackend:
    """Return the backend that `choice` names for a model of these sizes.

    Args:
        choice: `auto` (today always `torch`), a name in `BACKENDS`, or a subclass of `TorchBackend`.
        config: the model's sizes.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor a subclass of `TorchBackend`.
    """
    if isinstance(choice, type) and issubclass(choice, TorchBackend):
        return choice(config)
    if not isinstance(choice, str):
        raise TypeError(f"backend must be a name or a subclass of TorchBackend, got {choice!r}")
    name = "torch" if choice == "auto" else choice
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {choice!r}; known: auto, {', '.join(BACKENDS)}")
    return BACKENDS[name](config)
