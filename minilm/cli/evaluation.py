"""`minilm eval`: how good the vectors are, of one model or of several side by side."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilm import __version__
from minilm.cli.common import (
    Commands,
    Parser,
    UsageError,
    add_command,
    add_model_options,
    load_encoder,
    shows_progress,
)
from minilm.cli.evaluation_measures import MEASURES, OPTIONS

if TYPE_CHECKING:
    from minilm.encoder import SentenceEncoder
    from minilm.evaluate import Result

COMPARE_EPILOG = """\
Every model's figures on the same data with 95% bootstrap intervals; each is compared with the first by a paired
bootstrap, in which all models are computed on the same resamples, and * marks figures that differ with p < 0.05 (one by
one: with many models or tasks some will by chance). The data is laid out as `minilm eval MEASURE --help` says.

examples:
  minilm eval compare all-MiniLM-L6-v2 my-model/ --data sts/ --plot models.png
  minilm eval compare first/ second/ third/ --data sts/ --tasks stsb --split dev --json figures.json
  minilm eval compare first/ second/ --measure retrieval --data scifact/ --samples 10000
"""


def add_commands(commands: Commands[Parser]) -> None:
    """Add `eval` with a command for each measure, and `eval compare`."""
    evaluations = commands.add_parser(
        "eval", help="measure a model's quality", description="Measure a model's quality."
    )
    measures = evaluations.add_subparsers(title="measures", metavar="MEASURE", required=True)
    for name, measure in MEASURES.items():
        parser = add_command(measures, name, run_measure, summary=measure.summary, epilog=measure.epilog)
        parser.set_defaults(measure=name)
        where = " (default: the public sets, from the Hugging Face hub)" if name == "sts" else ""
        parser.add_argument("--data", required=name != "sts", metavar=measure.data, help="the data" + where)
        _add_options(parser, measure.options)
        add_model_options(parser)

    parser = add_command(measures, "compare", run_compare, summary="several models side by side", epilog=COMPARE_EPILOG)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folders or names; the first is the yardstick")
    parser.add_argument("--measure", choices=MEASURES, default="sts", help="what is measured (default: sts)")
    parser.add_argument("--data", metavar="PATH", help="the data, as that measure wants it")
    _add_options(parser, OPTIONS)
    parser.add_argument("--plot", metavar="FILE", help="draw a picture, as PNG")
    add_model_options(parser, named=False)


def _add_options(parser: Parser, names: Iterable[str]) -> None:
    """Add options of evaluators, and those of every measure."""
    for name in names:
        parser.add_argument(f"--{name.replace('_', '-')}", **OPTIONS[name])
    help_text = "bootstrap samples for the 95%% intervals; 0 for none (default: 1000)"
    parser.add_argument("--samples", type=int, default=1000, metavar="N", help=help_text)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of whatever is drawn (default: 0)")
    parser.add_argument(
        "--json", metavar="FILE", help="write the figures there too; - prints them instead of the table"
    )


def run_measure(arguments: argparse.Namespace) -> int:
    """Evaluate a model, and print or write the figures."""
    from minilm.evaluate import with_intervals

    encoder = load_encoder(arguments)
    result = _evaluate(encoder, arguments)
    if arguments.samples:
        result = with_intervals(result, arguments.samples, arguments.seed)
    _report(arguments, result.table(), {"model": _described(encoder), **result.to_dict()})
    return 0


def run_compare(arguments: argparse.Namespace) -> int:
    """Evaluate several models on the same data, and print, write or draw the comparison."""
    from minilm.cli.files import open_output
    from minilm.evaluate.comparison import compare

    _check_comparison(arguments)
    if arguments.plot:
        from minilm.evaluate.comparison_plot import plot
        from minilm.plot_style import check_matplotlib

        check_matplotlib()  # now, not after minutes of measuring
    results, models = {}, {}
    for name, model in zip(_short_names(arguments.models), arguments.models, strict=True):
        encoder = load_encoder(argparse.Namespace(**{**vars(arguments), "model": model}))
        results[name] = _evaluate(encoder, arguments)
        models[name] = {"name": model, **_described(encoder)}
    comparison = compare(results, arguments.samples, arguments.seed)
    report = comparison.to_dict()
    for name, described in models.items():
        report["models"][name] = {"model": described, **report["models"][name]}
    _report(arguments, comparison.table(), report)
    if arguments.plot:
        with open_output(arguments.plot) as file:
            plot(comparison, file)
    return 0


def _check_comparison(arguments: argparse.Namespace) -> None:
    """Refuse what would be ignored or can't be compared."""
    measure = MEASURES[arguments.measure]
    if len(set(arguments.models)) < len(arguments.models):
        raise UsageError(f"each model is compared once, got {' '.join(arguments.models)}")
    if arguments.data is None and arguments.measure != "sts":
        raise UsageError(f"--measure {arguments.measure} needs --data {measure.data}")
    for name in OPTIONS:
        if getattr(arguments, name) is not None and name not in measure.options:
            raise UsageError(f"--{name.replace('_', '-')} is not for --measure {arguments.measure}")


def _evaluate(encoder: SentenceEncoder, arguments: argparse.Namespace) -> Result:
    """Measure an encoder as the options say."""
    import minilm.evaluate

    measure = MEASURES[arguments.measure]
    options = {name: value for name in measure.options if (value := getattr(arguments, name)) is not None}
    if measure.takes_seed:
        options["seed"] = arguments.seed
    evaluate = getattr(minilm.evaluate, measure.evaluator)
    result: Result = evaluate(encoder, arguments.data, show_progress_bar=shows_progress(arguments), **options)
    return result


def _described(encoder: SentenceEncoder) -> dict[str, Any]:
    """Tell which encoder gave the figures."""
    return {"fingerprint": encoder.fingerprint(), **encoder.encoding.to_dict()}


def _short_names(models: list[str]) -> list[str]:
    """Return the last part of each path where these differ, else the names as they are."""
    short = [Path(model).name or model for model in models]
    return short if len(set(short)) == len(short) else models


def _report(arguments: argparse.Namespace, table: str, report: dict[str, Any]) -> None:
    """Print the table, and write the report where `--json` says."""
    from minilm.cli.files import open_output

    if arguments.json != "-":
        print(table)
    if arguments.json is not None:
        with open_output(arguments.json) as file:
            file.write((json.dumps({"minilm": __version__, **report}, indent=2, allow_nan=False) + "\n").encode())
