"""A small sentence encoder: `minilm.load().encode("some text")`.

The public names below are imported on first use, so `import minilm` alone is quick and does not import torch. No
submodule has the name of a public function: importing one would set it as an attribute here, over the function.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "EncodingConfig",
    "MiniLM",
    "MiniLMConfig",
    "PackedBatch",
    "SentenceEncoder",
    "__version__",
    "load",
    "pipeline",
    "search",
    "similarity",
    "similarity_pairwise",
]

_HOME = {
    "EncodingConfig": "minilm.config",
    "MiniLM": "minilm.model",
    "MiniLMConfig": "minilm.config",
    "PackedBatch": "minilm.batch",
    "SentenceEncoder": "minilm.encoder",
    "load": "minilm.encoder",
    "pipeline": "minilm.pipelines",
    "search": "minilm.similarities",
    "similarity": "minilm.similarities",
    "similarity_pairwise": "minilm.similarities",
}

if TYPE_CHECKING:
    from minilm.batch import PackedBatch
    from minilm.config import EncodingConfig, MiniLMConfig
    from minilm.encoder import SentenceEncoder, load
    from minilm.model import MiniLM
    from minilm.pipelines import pipeline
    from minilm.similarities import search, similarity, similarity_pairwise
else:

    def __getattr__(name: str) -> object:
        """Import a public name from its module and keep it here."""
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_HOME[name]), name)
        return value


def __dir__() -> list[str]:
    """List the public names, imported already or not."""
    return sorted({*globals(), *__all__})
