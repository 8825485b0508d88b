"""What the commands share: the parser, common options, and how messages reach the terminal."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from minilm.config import POOLINGS

if TYPE_CHECKING:
    from minilm.encoder import SentenceEncoder

Commands = argparse._SubParsersAction
MODEL_HELP = "a folder, or a name: one that comes with minilm, or on a hub (default: all-MiniLM-L6-v2)"
BACKEND_HELP = "auto, torch, triton, module:Class or path/to/file.py:Class (default: auto)"


class UsageError(ValueError):
    """The command line itself is wrong."""


class Parser(argparse.ArgumentParser):
    """An argument parser that keeps line breaks in its epilog, and whose errors are exceptions."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        """Raise `UsageError`, where argparse would end the process."""
        raise UsageError(f"{message} (see {self.prog} --help)")


def add_command(
    commands: Commands[Parser], name: str, run: Callable[[argparse.Namespace], int], *, summary: str, epilog: str = ""
) -> Parser:
    """Add a command with the options that every command has."""
    parser = commands.add_parser(name, help=summary, description=summary[:1].upper() + summary[1:] + ".", epilog=epilog)
    parser.set_defaults(run=run)
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no warnings")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def add_model_options(parser: Parser, *, named: bool = True) -> None:
    """Add the options that say which model to load (if it is to be `named` by one) and how."""
    group = parser.add_argument_group("model")
    if named:
        group.add_argument("--model", metavar="NAME", help=MODEL_HELP)
    group.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    group.add_argument("--dtype", help="float32, float16 or bfloat16 (default: float16 on a GPU, else float32)")
    group.add_argument("--backend", default="auto", metavar="NAME", help=BACKEND_HELP)
    group.add_argument("--max-seq-length", type=int, metavar="N", help="tokens kept of a text (default: the model's)")
    group.add_argument("--pooling", choices=POOLINGS, help="how token vectors become one (default: the model's)")


def load_encoder(arguments: argparse.Namespace) -> SentenceEncoder:
    """Load the encoder that the model options describe."""
    from minilm.encoder import load

    return load(
        arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        backend=arguments.backend,
        max_seq_length=arguments.max_seq_length,
        pooling=arguments.pooling,
    )


def shows_progress(arguments: argparse.Namespace) -> bool:
    """Tell whether to draw progress bars: on a terminal, unless quiet."""
    return not arguments.quiet and sys.stderr.isatty()


def print_json(value: Any) -> None:
    """Print a value as indented JSON."""
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def print_fields(fields: Mapping[str, Any], indent: str = "") -> None:
    """Print names and values as aligned lines; the values of a value that is a dictionary follow it, indented."""
    width = max((len(name) for name in fields), default=0)
    for name, value in fields.items():
        if isinstance(value, Mapping) and value:
            print(f"{indent}{name}")
            print_fields(value, indent + "  ")
        elif isinstance(value, list):
            print(f"{indent}{name:<{width}}  {', '.join(map(str, value)) or 'none'}")
        else:
            print(f"{indent}{name:<{width}}  {'none' if value is None or value == {} else value}")


def one_line(text: str) -> str:
    """Return a text with its line breaks and runs of blanks as single spaces, for a table."""
    return " ".join(text.split())


@contextmanager
def messages_on_stderr(*, quiet: bool) -> Iterator[None]:
    """Show the library's warnings, logged or issued, as `minilm: warning: ...`; only errors if `quiet`."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("minilm: %(levelname)s: %(message)s"))
    handler.setLevel(logging.ERROR if quiet else logging.WARNING)
    handler.addFilter(_lower_level_name)
    logger = logging.getLogger("minilm")
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        logger.warning("%s", message)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = show
            yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def _lower_level_name(record: logging.LogRecord) -> bool:
    """Write `warning`, not `WARNING`."""
    record.levelname = record.levelname.lower()
    return True
