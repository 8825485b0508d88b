"""`minilm eval`: how good the vectors are."""

from __future__ import annotations

import argparse
import json

from minilm import __version__
from minilm.cli.common import Commands, Parser, add_command, add_model_options, load_encoder, shows_progress

STS_EPILOG = """\
The figure of the field is Spearman's correlation x 100, averaged over the tasks sts12 ... sts16, stsb and sickr.
Data in DIR: sts12/SUBSET.tsv ... sts16/SUBSET.tsv, stsb/test.tsv, sickr/test.tsv; each line is
score<TAB>sentence1<TAB>sentence2 in UTF-8, without a header. Without --data, MTEB's copies of these sets are fetched
from the Hugging Face hub (mteb/sts12-sts ... mteb/sts16-sts, mteb/stsbenchmark-sts, mteb/sickr-sts).

examples:
  minilm eval sts --data sts/
  minilm eval sts --data sts/ --tasks stsb sickr --split dev --model my-model/
  minilm eval sts --data sts/ --json - | jq .average_spearman
"""


def add_commands(commands: Commands[Parser]) -> None:
    """Add `eval sts`."""
    evaluations = commands.add_parser(
        "eval", help="measure a model's quality", description="Measure a model's quality."
    )
    measures = evaluations.add_subparsers(title="measures", metavar="MEASURE", required=True)
    parser = add_command(
        measures, "sts", run_sts, summary="semantic textual similarity, seven tasks", epilog=STS_EPILOG
    )
    parser.add_argument("--data", metavar="DIR", help="the data (default: the public sets, from the Hugging Face hub)")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these")
    parser.add_argument("--split", default="test", help="test (default), or dev for the tasks stsb and sickr")
    parser.add_argument(
        "--json", metavar="FILE", help="write the figures there too; - prints them instead of the table"
    )
    add_model_options(parser)


def run_sts(arguments: argparse.Namespace) -> int:
    """Evaluate, and print or write the figures."""
    from minilm.cli.files import open_output
    from minilm.evaluate.sts import evaluate_sts
    from minilm.evaluate.sts_data import TASKS

    encoder = load_encoder(arguments)
    result = evaluate_sts(
        encoder,
        arguments.data,
        tasks=arguments.tasks or TASKS,
        split=arguments.split,
        show_progress_bar=shows_progress(arguments),
    )
    if arguments.json != "-":
        print(result.table())
    if arguments.json is not None:
        model = {"fingerprint": encoder.fingerprint(), **encoder.encoding.to_dict()}
        report = {"minilm": __version__, "model": model, **result.to_dict()}
        with open_output(arguments.json) as file:
            file.write((json.dumps(report, indent=2, allow_nan=False) + "\n").encode())
    return 0
