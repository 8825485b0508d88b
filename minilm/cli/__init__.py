"""The `minilm` command. Each command is a file here; the heavy imports happen inside the command that needs them."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from minilm import __version__
from minilm.cli import bench, compare, encode, evaluation, info, internals, kernels, parity, training, weights
from minilm.cli.common import Parser, messages_on_stderr

EPILOG = """\
examples:
  minilm similarity "A man is eating." "Someone eats." "A plane takes off."
  minilm encode sentences.txt -o vectors.npy
  minilm encode reviews.csv --column body -o reviews.parquet
  cat sentences.txt | minilm encode > vectors.jsonl
  minilm search "how to boil an egg" --corpus recipes.txt --top-k 3
  minilm eval sts --data sts/
  minilm explain "A man is eating." "Someone eats." -o report.html
  minilm train recipe.toml --set epochs=2
  minilm weights convert my-finetuned-model/ my-model/
  minilm parity --backend own_attention.py:OwnAttention
  minilm bench --backend torch,own_attention.py:OwnAttention
  minilm kernels report --hardware sm_90
  minilm info

`minilm COMMAND --help` tells more. Exit codes: 0 done, 1 a check failed, 2 wrong usage or input, 130 interrupted.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: arguments without the program's name; those of the process by default.
    """
    debug = False
    try:
        arguments = build_parser().parse_args(argv)
        debug = arguments.debug
        with messages_on_stderr(quiet=arguments.quiet):
            code: int = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
        return 141  # as if ended by SIGPIPE, like other programs whose reader went away
    except KeyboardInterrupt:
        return 130
    except (ImportError, OSError, TypeError, ValueError) as error:
        if debug:
            traceback.print_exc()
        print(f"minilm: error: {error}", file=sys.stderr)
        return 2
    return code


def build_parser() -> Parser:
    """Build the parser of all commands; a parsed command has its function as `run`."""
    parser = Parser(prog="minilm", description="Sentences to vectors with MiniLM.", epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"minilm {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (encode, compare, evaluation, internals, training, weights, parity, bench, kernels, info):
        module.add_commands(commands)
    return parser


def _discard_output() -> None:
    """Send what is still buffered for stdout nowhere, so that the interpreter does not fail on it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
