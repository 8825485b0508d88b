"""`minilm info`: what is installed, and what the model is."""

from __future__ import annotations

import argparse
import platform
from typing import Any

from minilm import __version__
from minilm.cli.common import Commands, Parser, add_command, add_model_options, load_encoder, print_fields, print_json

EPILOG = """\
examples:
  minilm info
  minilm info --model my-model/ --json
"""


def add_commands(commands: Commands[Parser]) -> None:
    """Add `info`."""
    parser = add_command(commands, "info", run, summary="show versions, device and the model's settings", epilog=EPILOG)
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_model_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print what is known, also where the model can't be loaded."""
    report = _environment()
    try:
        report |= _model(arguments)
    finally:
        (print_json if arguments.json else print_fields)(report)
    return 0


def _environment() -> dict[str, Any]:
    """Describe the installation and the machine."""
    import numpy as np
    import tokenizers
    import torch

    from minilm.weights.sources import cache_directory, shipped_models

    cuda = torch.cuda.is_available()
    return {
        "minilm": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tokenizers": tokenizers.__version__,
        "numpy": np.__version__,
        "cuda": f"{torch.version.cuda}, {torch.cuda.get_device_name()}" if cuda else None,
        "threads": torch.get_num_threads(),
        "cache": str(cache_directory()),
        "shipped models": shipped_models(),
    }


def _model(arguments: argparse.Namespace) -> dict[str, Any]:
    """Load and describe the model."""
    from minilm.weights.known import DEFAULT_MODEL
    from minilm.weights.sources import locate

    encoder = load_encoder(arguments)
    encoding, provenance = encoder.encoding, encoder.checkpoint.provenance
    return {
        "model": arguments.model or DEFAULT_MODEL,
        "folder": str(locate(arguments.model)),
        "source": provenance.get("source"),
        "training": provenance.get("training"),
        "format": provenance.get("source_format"),
        "licence": provenance.get("licence"),
        "device": str(encoder.device),
        "dtype": str(encoder.model.embeddings.word.weight.dtype).removeprefix("torch."),
        "backend": {"name": encoder.model.backend.name, **encoder.model.backend.describe()},
        "dimensions": encoder.get_embedding_dimension(),
        "config": encoder.config.to_dict(),
        "max_seq_length": encoder.max_seq_length,
        "pooling": encoding.pooling,
        "normalize": encoding.normalize,
        "similarity": encoding.similarity,
        "prompts": encoder.prompts,
        "fingerprint": encoder.fingerprint(),
    }
