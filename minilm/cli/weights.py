"""`minilm weights`: fetch, convert, export, describe, inspect and verify."""

from __future__ import annotations

import argparse
from pathlib import Path

from minilm.cli.common import Commands, Parser, UsageError, add_command, print_fields, print_json

EPILOG = """\
examples:
  minilm weights fetch
  minilm weights convert my-finetuned-model/ my-model/
  minilm weights convert my-model/ a-quarter-of-the-size/ --precision int8
  minilm weights export my-model/ for-modelscope/ --to modelscope
  minilm weights card my-model/ --facts facts.toml --scores sts.json -o my-model/README.md
  minilm weights inspect my-model/ --tensors
  minilm weights verify my-model/
"""
CARD_EPILOG = """\
A model card is a README.md that people and the Hugging Face hub read. Beside the weights of a minilm folder it is kept
with them, and exported with them; changed weights leave it behind. Sizes, settings, licence and origin are the model's
own. Scores are taken from what `minilm eval MEASURE --json FILE` wrote of this very model, with their 95% intervals.
All else is in a TOML file, in which everything may be left out:

  name = "my-model"
  summary = "What it is, in a sentence or two."
  language = "en"
  licence = "Apache-2.0"                     # in place of the one the weights came with
  base_model = ["owner/name"]                # whose weights it started from
  command = "minilm distill my-recipe.toml"  # what trained it
  use = "What it is for."
  limits = ["What it can't do.", "What it should not be used for."]

  [[teachers]]                               # and so each [[data]] that it was trained on
  name = "owner/name"
  licence = "MIT"
  url = "https://example.org"                # url and note may be left out
  note = "In half of the steps."

examples:
  minilm eval sts --model my-model/ --data sts/ --device cpu --json sts.json
  minilm weights card my-model/ --facts facts.toml --scores sts.json -o my-model/README.md
  minilm weights export my-model/ exported/ --to sentence-transformers
"""
SOURCE = "a folder (minilm, sentence-transformers, ModelScope or BERT), or a name, as for --model of other commands"


def add_commands(commands: Commands[Parser]) -> None:
    """Add `weights` with its subcommands."""
    summary = "fetch, convert, export, describe, inspect or verify a model"
    weights = commands.add_parser("weights", help=summary, description=summary.capitalize() + ".", epilog=EPILOG)
    actions = weights.add_subparsers(title="actions", metavar="ACTION", required=True)

    parser = add_command(actions, "fetch", run_fetch, summary="download a model and print its folder")
    parser.add_argument("name", nargs="?", metavar="NAME", help="a name on a hub (default: all-MiniLM-L6-v2)")

    parser = add_command(actions, "convert", run_convert, summary="turn any source into a minilm folder")
    _add_source(parser)
    parser.add_argument("destination", metavar="DEST", help="the folder to write: model.safetensors and tokenizer.json")
    parser.add_argument("--max-seq-length", type=int, metavar="N", help="tokens kept of a text (default: the source's)")
    parser.add_argument(
        "--precision",
        metavar="NAME",
        help="round the weights: float16 or bfloat16 for half the file, int8 for a quarter (default: as they are)",
    )

    parser = add_command(actions, "export", run_export, summary="write a folder that other libraries load")
    _add_source(parser)
    parser.add_argument("destination", metavar="DEST", help="the folder to write")
    parser.add_argument("--to", required=True, choices=("sentence-transformers", "modelscope"), help="whose layout")

    parser = add_command(actions, "card", run_card, summary="write a model card", epilog=CARD_EPILOG)
    _add_source(parser)
    parser.add_argument("--facts", metavar="FILE", help="TOML with what else is known (see below)")
    help_text = "JSON of minilm eval, with its scores; may be given several times"
    parser.add_argument("--scores", metavar="FILE", action="append", default=[], help=help_text)
    parser.add_argument("-o", "--output", default="-", metavar="FILE", help="where to (default: print it)")

    parser = add_command(actions, "inspect", run_inspect, summary="show what a model's weights hold")
    _add_source(parser)
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--json", action="store_true", help="print JSON")

    parser = add_command(actions, "verify", run_verify, summary="check a model against the results stored with it")
    parser.add_argument("model", metavar="SRC", help=SOURCE)
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")


def _add_source(parser: Parser) -> None:
    """Add the argument that says which weights to read."""
    parser.add_argument("source", metavar="SRC", help=SOURCE)


def run_fetch(arguments: argparse.Namespace) -> int:
    """Print the folder that holds the model, downloading it first if need be."""
    from minilm.weights.sources import locate, read_model

    read_model(arguments.name)  # a damaged copy is replaced
    print(locate(arguments.name))
    return 0


def run_convert(arguments: argparse.Namespace) -> int:
    """Read a source and save it in the canonical form, with vectors to verify it by."""
    from minilm.compress import compress
    from minilm.model import floating_dtype
    from minilm.verify import with_golden
    from minilm.weights.sources import read_model

    checkpoint = read_model(arguments.source)
    if arguments.max_seq_length is not None:
        checkpoint = checkpoint.with_encoding(max_seq_length=arguments.max_seq_length)
    if arguments.precision == "int8":
        checkpoint = compress(checkpoint)
    elif arguments.precision is not None:
        checkpoint = checkpoint.with_dtype(floating_dtype(arguments.precision))
    if checkpoint.golden is None or arguments.max_seq_length is not None:
        checkpoint = with_golden(checkpoint)
    print(checkpoint.save(arguments.destination))
    return 0


def run_export(arguments: argparse.Namespace) -> int:
    """Read a source and write it in another library's layout."""
    from minilm.weights.export import export_modelscope, export_sentence_transformers
    from minilm.weights.sources import read_model

    export = export_modelscope if arguments.to == "modelscope" else export_sentence_transformers
    export(read_model(arguments.source), Path(arguments.destination))
    print(arguments.destination)
    return 0


def run_card(arguments: argparse.Namespace) -> int:
    """Print or write a model's card."""
    from minilm.cli.files import open_output
    from minilm.weights.card import Facts, model_card
    from minilm.weights.files import parse_toml, read_object, read_text
    from minilm.weights.sources import read_model

    facts, path = Facts(), arguments.facts
    for file in (path, *arguments.scores):
        if file is not None and not Path(file).is_file():
            raise UsageError(f"there is no file {file}")
    if path is not None:
        facts = Facts.from_dict(parse_toml(read_text(Path(path)), path), path)
    card = model_card(read_model(arguments.source), facts, [read_object(Path(file)) for file in arguments.scores])
    with open_output(arguments.output) as file:
        file.write(card.encode())
    return 0


def run_inspect(arguments: argparse.Namespace) -> int:
    """Print what a source holds."""
    from minilm.weights.checkpoint import fingerprint
    from minilm.weights.sources import locate, read_model

    checkpoint = read_model(arguments.source)
    tensors = checkpoint.tensors
    report = {
        "folder": str(locate(arguments.source)),
        "dimensions": checkpoint.output_width or checkpoint.config.hidden_size,
        "fingerprint": fingerprint(checkpoint),
        "parameters": sum(tensor.numel() for tensor in checkpoint.model_tensors.values()),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in checkpoint.stored.values()}),
        "config": checkpoint.config.to_dict(),
        "encoding": checkpoint.encoding.to_dict(),
        "provenance": checkpoint.provenance,
        "calibrated": checkpoint.calibration is not None,
        "golden_texts": len(checkpoint.golden or ()),
        "card": checkpoint.card is not None,
        "left_out": list(checkpoint.ignored),
    }
    if arguments.tensors:
        report["tensors"] = {name: [str(tensor.dtype), *tensor.shape] for name, tensor in sorted(tensors.items())}
    (print_json if arguments.json else print_fields)(report)
    return 0


def run_verify(arguments: argparse.Namespace) -> int:
    """Load a model, check it, and return 1 if it is not what it should be."""
    from minilm.encoder import load
    from minilm.verify import verify

    report = verify(load(arguments.model, device=arguments.device))
    print("\n".join(report.lines()))
    return 0 if report.ok else 1
