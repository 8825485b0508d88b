"""`minilm encode`: a file of texts to a file of vectors."""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from minilm.cli.common import Commands, Parser, add_command, add_model_options, load_encoder, shows_progress
from minilm.cli.files import (
    OUTPUT_FORMATS,
    WRITERS,
    add_input_options,
    import_pyarrow,
    open_output,
    output_format,
    read_input,
)
from minilm.config import ON_TRUNCATE, PRECISIONS

if TYPE_CHECKING:
    from minilm.cli.files import Row
    from minilm.encoder import SentenceEncoder

READ_AHEAD = 1_024
"""Texts encoded together; also what bounds the memory."""

EPILOG = """\
examples:
  minilm encode sentences.txt -o vectors.npy          one text a line; row i of the array is line i, blank or not
  minilm encode docs.jsonl --field body -o out.jsonl  {"body": "..."} in, {"text": ..., "embedding": [...]} out
  minilm encode docs.csv --column body -o out.parquet
  cat sentences.txt | minilm encode | head -1         stdin to stdout, JSON lines
"""


def add_commands(commands: Commands[Parser]) -> None:
    """Add `encode`."""
    parser = add_command(commands, "encode", run, summary="encode a file of texts", epilog=EPILOG)
    parser.add_argument("input", nargs="?", default="-", metavar="INPUT", help="a UTF-8 file; - is stdin (default)")
    parser.add_argument(
        "-o", "--output", default="-", metavar="OUT", help=".npy, .jsonl or .parquet; - is stdout (default)"
    )
    add_input_options(parser)
    parser.add_argument("--output-format", choices=OUTPUT_FORMATS, help="default: by suffix; jsonl for -")
    group = parser.add_argument_group("encoding")
    group.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="texts of full length a batch (default: 32)"
    )
    group.add_argument("--precision", choices=PRECISIONS, default="float32", help="of the vectors (default: float32)")
    group.add_argument("--normalize", action="store_true", help="scale vectors to length 1, whatever the model does")
    group.add_argument("--truncate-dim", type=int, metavar="N", help="keep the first N dimensions")
    group.add_argument("--prompt-name", metavar="NAME", help="a prompt of the model's to put before each text")
    group.add_argument(
        "--on-truncate",
        choices=ON_TRUNCATE,
        default="warn",
        help="what to do with texts that are too long (default: warn)",
    )
    add_model_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Encode the input into the output."""
    from minilm.progress import progress_bar

    form = arguments.output_format or output_format(arguments.output)
    if form == "parquet":
        import_pyarrow()
    texts = read_input(arguments, arguments.input)
    with open_output(arguments.output, seekable=form != "jsonl") as file:
        encoder = load_encoder(arguments)
        options = _encode_options(arguments)
        empty = encoder.encode([], **options)
        with progress_bar(shows_progress(arguments), None, "encode", "text") as advance:
            WRITERS[form](file, _encoded(encoder, texts, options, advance), empty)
    return 0


def _encode_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `SentenceEncoder.encode` that the command line sets."""
    return {
        "on_truncate": arguments.on_truncate,
        "batch_size": arguments.batch_size,
        "precision": arguments.precision,
        "normalize_embeddings": arguments.normalize,
        "truncate_dim": arguments.truncate_dim,
        "prompt_name": arguments.prompt_name,
    }


def _encoded(
    encoder: SentenceEncoder, texts: Iterable[str], options: dict[str, Any], advance: Callable[[int], object]
) -> Iterator[Row]:
    """Pair each text with its vector; no more are in memory than are encoded together."""
    waiting: deque[str] = deque()

    def passing() -> Iterator[str]:
        for text in texts:
            waiting.append(text)
            yield text

    for vector in encoder.encode_stream(passing(), block_size=READ_AHEAD, **options):
        yield waiting.popleft(), vector
        advance(1)
