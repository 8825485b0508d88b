"""`minilm explain`, `minilm internals` and `minilm study`: why a similarity is what it is."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from minilm.cli.common import (
    Commands,
    Parser,
    UsageError,
    add_command,
    add_model_options,
    load_encoder,
    print_json,
    shows_progress,
)

if TYPE_CHECKING:
    from minilm.internals.report import Explanation
    from minilm.internals.studies.result import StudyResult

PICTURES_HELP = "write PNG files into this folder, made if need be"
POINT_HELP = "where tokens are followed from: embeddings (default), or layers.K.output, which is faster"
EXPLAIN_EPILOG = """\
Prints what pushed the score. -o writes a page that shows all of it, in one file that needs no network: token by token,
head by head, the attention of every head, layer by layer. --pictures writes the same as PNG.

examples:
  minilm explain "A man is eating." "Someone eats." -o report.html
  minilm explain "The film was good." "The film was not good." --pictures pictures/
  minilm explain "A man is eating." "Someone eats." --json | jq .components
"""
POINTS_EPILOG = """\
L tokens, C hidden size, F feed-forward size, H heads, D head size. In a name, * stands for anything. TransformerLens'
names (blocks.3.attn.hook_q) mean the same points.

examples:
  minilm internals points
  minilm internals points "layers.3.**"
"""
CHECK_EPILOG = """\
Holds what is captured against transformers (where it is installed) and against encode, the parts of a decomposition
against the score they must add up to, and so the token by token attributions. Exit code 1 if an error is larger than
its limit.

examples:
  minilm internals check
  minilm internals check --model my-model/ --json
"""
STUDY_EPILOG = """\
studies:
{studies}

examples:
  minilm study negation
  minilm study heads --data sts/ --pictures pictures/
"""
STUDIES = {  # their files are in minilm/internals/studies; here, so that the parser needs no torch
    "negation": 'what happens to "not"',
    "word-order": "where word order enters",
    "heads": "which heads carry semantic textual similarity (STS data; minutes)",
}


def add_commands(commands: Commands[Parser]) -> None:
    """Add `explain`, `internals points`, `internals check` and `study`."""
    parser = add_command(
        commands, "explain", run_explain, summary="show why two texts score as they do", epilog=EXPLAIN_EPILOG
    )
    parser.add_argument("first", metavar="A", help="a text")
    parser.add_argument("second", metavar="B", help="the text that it is compared with")
    parser.add_argument("-o", "--output", metavar="FILE.html", help="write the page there")
    parser.add_argument("--pictures", metavar="DIR", help=PICTURES_HELP)
    parser.add_argument("--metric", choices=("cosine", "dot"), default="cosine", help="the score (default: cosine)")
    parser.add_argument("--point", default="embeddings", metavar="NAME", help=POINT_HELP)
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_model_options(parser)

    internals = commands.add_parser("internals", help="look inside the model", description="Look inside the model.")
    actions = internals.add_subparsers(title="actions", metavar="ACTION", required=True)
    summary = "list the points that can be captured and patched"
    parser = add_command(actions, "points", run_points, summary=summary, epilog=POINTS_EPILOG)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_model_options(parser)
    summary = "check captured values, decompositions and attributions"
    parser = add_command(actions, "check", run_check, summary=summary, epilog=CHECK_EPILOG)
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_model_options(parser)

    listed = "\n".join(f"  {name:<12} {question}" for name, question in STUDIES.items())
    parser = add_command(
        commands,
        "study",
        run_study,
        summary="run a worked study of the model",
        epilog=STUDY_EPILOG.format(studies=listed),
    )
    parser.add_argument("name", metavar="NAME", choices=STUDIES, help=", ".join(STUDIES))
    parser.add_argument("--data", metavar="DIR", help="STS data, as for eval sts (default: from the Hugging Face hub)")
    parser.add_argument("--pictures", metavar="DIR", help=PICTURES_HELP)
    add_model_options(parser)


def run_explain(arguments: argparse.Namespace) -> int:
    """Explain a score; print it, and write the page and the pictures asked for."""
    from minilm.cli.files import open_output

    if arguments.output not in (None, "-") and Path(arguments.output).suffix.lower() not in (".html", ".htm"):
        hint = "; --pictures writes PNG" if Path(arguments.output).suffix.lower() == ".png" else ""
        raise UsageError(f"-o writes a page, so its name must end in .html{hint}; got {arguments.output}")
    if arguments.output == "-" and arguments.json:
        raise UsageError("-o - writes the page to stdout, and --json figures: one of them, please")
    folder = _pictures_folder(arguments)
    from minilm.internals.report import explain

    arguments.dtype = arguments.dtype or "float32"  # derivatives need it, also on a GPU
    encoder = load_encoder(arguments)
    options = {"metric": arguments.metric, "point": arguments.point, "show_progress_bar": shows_progress(arguments)}
    explanation = explain(encoder, arguments.first, arguments.second, **options)
    if arguments.output is not None:
        with open_output(arguments.output) as file:
            file.write(explanation.page().encode())
    _write_pictures(folder, explanation)
    if arguments.json:
        print_json(explanation.to_dict())
    elif arguments.output != "-":
        print(explanation.table())
    return 0


def run_points(arguments: argparse.Namespace) -> int:
    """List points."""
    from minilm.config import MiniLMConfig
    from minilm.internals.points import resolve

    config = MiniLMConfig() if arguments.model is None else load_encoder(arguments).config
    found = resolve(arguments.names or "*", config)
    if arguments.json:
        print_json([{"name": point.name, "shape": point.shape.split(), "what": point.what} for point in found])
        return 0
    width = max(len(point.name) for point in found)
    for point in found:
        print(f"{point.name:<{width}}  {f'[{point.shape}]':<7}  {point.what}")
    return 0


def run_check(arguments: argparse.Namespace) -> int:
    """Print errors beside their limits, and return 1 if one is larger."""
    from minilm.internals.check import check

    arguments.dtype = arguments.dtype or "float32"
    rows = check(load_encoder(arguments), show_progress_bar=shows_progress(arguments))
    failed = sum(not row.ok for row in rows)
    if arguments.json:
        print_json([row.to_dict() for row in rows])
        return 1 if failed else 0
    width = max(len(row.what) for row in rows)
    print(f"{'':<{width}}  error    limit")
    for row in rows:
        print(f"{row.what:<{width}}  {row.figures}")
    print(f"{len(rows) - failed} of {len(rows)} within their limits")
    return 1 if failed else 0


def run_study(arguments: argparse.Namespace) -> int:
    """Run a study, print its findings, and draw them if asked to."""
    from importlib import import_module
    from inspect import signature

    folder = _pictures_folder(arguments)
    study = import_module(f"minilm.internals.studies.{arguments.name.replace('-', '_')}")
    options = {"show_progress_bar": shows_progress(arguments)}
    if "data" in signature(study.run).parameters:
        options["data"] = arguments.data
    elif arguments.data is not None:
        raise UsageError(f"the study {arguments.name} has sentences of its own and takes no --data")
    result = study.run(load_encoder(arguments), **options)
    _write_pictures(folder, result)
    print(result.table())
    return 0


def _pictures_folder(arguments: argparse.Namespace) -> Path | None:
    """Return the folder that pictures go to, made if need be: now, and not after minutes of computing.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: a file is in its place, or it can't be made.
    """
    if arguments.pictures is None:
        return None
    from minilm.plot_style import check_matplotlib

    check_matplotlib()
    folder = Path(arguments.pictures)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--pictures takes a folder, and {folder} is a file")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write_pictures(folder: Path | None, result: Explanation | StudyResult) -> None:
    """Write what a result has of pictures, if there is a folder for them."""
    from minilm.cli.files import open_output

    if folder is None:
        return
    for name, figure in result.pictures().items():
        with open_output(str(folder / f"{name}.png")) as file:
            figure.savefig(file, format="png")
