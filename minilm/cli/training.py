"""`minilm train` and `minilm distill`: from a recipe to a model."""

from __future__ import annotations

import argparse
import json
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING

from minilm.cli.common import Commands, Parser, UsageError, add_command, print_fields, shows_progress

if TYPE_CHECKING:
    from minilm.train.methods_table import MethodTable
    from minilm.train.recipe import Recipe

logger = logging.getLogger(__name__)

RECIPES = """\
A recipe is a TOML file with the tables model, objective, data, teacher, evaluation and training, or the name of one
that comes with minilm (--list). A killed run goes on from its last checkpoint when started again.

Several recipes, or --seeds, make a table: each recipe is trained with each seed in a folder RECIPE-seed-SEED of
--output, and scored on STS-B dev and the seven STS tasks, the start too. What --set changes, it changes in all of them.
A seed chooses the sample and order of the data, dropout, and how an objective's own weights begin: with one seed all
recipes see the same rows (what else they differ in stands below the table), with another seed other rows. The figures,
mean and standard deviation over seeds, are printed, and written to table.json, table.md and, with matplotlib,
table.png. A run that fails is told with its reason, the others go on, and the exit code is 1. The same command again
does what is left to do: finished runs are only read.
"""
TRAIN_EPILOG = f"""\
{RECIPES}
examples:
  minilm train simcse --set data.folder=train/ --set evaluation.data=sts/
  minilm train my-recipe.toml --set training.epochs=3 --set seed=1
  minilm train simcse my-recipe.toml --seeds 0,1,2 --output runs/table --set evaluation.data=sts/
  torchrun --nproc-per-node 2 $(which minilm) train my-recipe.toml
"""
DISTILL_EPILOG = f"""\
{RECIPES}
The teacher embeds every text once, and its vectors are kept: that too goes on where it was.

examples:
  minilm distill similarity --set data.folder=train/ --set evaluation.data=sts/
  minilm distill ibkd --set 'teacher.names=["all-mpnet-base-v2/", "sentence-transformers/all-MiniLM-L6-v2"]'
  minilm distill mse --embed-only
  minilm distill mse hpd crd ibkd --seeds 0,1,2 --output runs/methods --set epochs=2 --set evaluation.data=sts/
"""


def add_commands(commands: Commands[Parser]) -> None:
    """Add `train` and `distill`."""
    trained = add_command(commands, "train", run_train, summary="train a model by a recipe", epilog=TRAIN_EPILOG)
    summary = "train a model to be like a teacher, by a recipe"
    distilled = add_command(commands, "distill", run_distill, summary=summary, epilog=DISTILL_EPILOG)
    for parser in (trained, distilled):
        parser.add_argument("recipes", nargs="*", metavar="RECIPE", help="TOML files, or names of shipped recipes")
        parser.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="change an entry; can be repeated"
        )
        parser.add_argument("--seeds", metavar="N,...", help="train with each of them, for a table")
        output = "the run's folder (as --set training.output=DIR); that of the runs' folders, if there are several"
        parser.add_argument("--output", metavar="DIR", help=output)
        parser.add_argument("--list", action="store_true", help="list the shipped recipes")
    distilled.add_argument("--embed-only", action="store_true", help="let the teacher embed the texts, and stop")


def run_train(arguments: argparse.Namespace) -> int:
    """Train, and say what came out."""
    return _run(arguments, needs_teacher=False)


def run_distill(arguments: argparse.Namespace) -> int:
    """Distil, and say what came out."""
    return _run(arguments, needs_teacher=True)


def _run(arguments: argparse.Namespace, *, needs_teacher: bool) -> int:
    """Do what one recipe says, or make a table of several runs."""
    from minilm.train.recipe import load_recipe, shipped_recipes

    if arguments.list:
        for name in shipped_recipes():
            if load_recipe(name).has_teacher or not needs_teacher:
                print(name)
        return 0
    if not arguments.recipes:
        raise UsageError("a recipe is missing: give a TOML file, or a name of --list")
    is_table = len(arguments.recipes) > 1 or arguments.seeds is not None
    runs = _planned(arguments) if is_table else [_recipe(arguments)]
    for run in runs:
        if needs_teacher and not run.has_teacher:
            raise UsageError(f"objective {run.objective['name']!r} has no teacher to learn from; use minilm train")
    if needs_teacher and arguments.embed_only:
        return _embed(runs, show_progress_bar=shows_progress(arguments))
    run_them = _make_table if is_table else _train
    return run_them(runs, show_progress_bar=shows_progress(arguments))


def _recipe(arguments: argparse.Namespace) -> Recipe:
    """Read the one recipe."""
    from minilm.train.recipe import load_recipe

    output = [f"training.output={arguments.output}"] if arguments.output else []
    return load_recipe(arguments.recipes[0], [*arguments.set, *output])


def _planned(arguments: argparse.Namespace) -> list[Recipe]:
    """Read several recipes, and make their runs."""
    from minilm.train.distributed import started_with
    from minilm.train.methods import plan

    if not arguments.output:
        raise UsageError("several runs need a folder to put theirs in: give --output DIR")
    if started_with() > 1:
        raise UsageError("torchrun is for one run at a time: give one recipe, and --set seed=N in place of --seeds")
    return plan(arguments.recipes, arguments.output, seeds=_seeds(arguments.seeds), changes=arguments.set)


def _seeds(text: str | None) -> list[int]:
    """Read `0,1,2`; none where nothing is said."""
    seeds = [] if text is None else text.split(",")
    if not all(seed.strip().isdecimal() for seed in seeds):
        raise UsageError(f"--seeds takes whole numbers with commas between them, such as 0,1,2; got {text!r}")
    return [int(seed) for seed in seeds]


def _embed(runs: list[Recipe], *, show_progress_bar: bool) -> int:
    """Let the teachers embed the texts of all runs, and say how many that took."""
    from minilm.train.runs import embed, make_teacher, read_mixture

    count = 0
    for run in runs:
        teacher = make_teacher(run, run.model.device or None)
        count += embed(read_mixture(run), teacher, show_progress_bar=show_progress_bar)
    print_fields({"vectors computed": count, "kept in": list(dict.fromkeys(run.teacher.cache for run in runs))})
    return 0


def _train(runs: list[Recipe], *, show_progress_bar: bool) -> int:
    """Train by the one recipe, and say what came out."""
    from minilm.train.distributed import started_as
    from minilm.train.runs import train

    (recipe,) = runs
    result = train(recipe, show_progress_bar=show_progress_bar)
    if started_as() == 0:
        scores = {"STS-B dev before": result.first_score, "STS-B dev after": result.score}
        shown = {name: f"{score:.2f}" for name, score in scores.items() if not math.isnan(score)}
        print_fields({"model": str(result.model), "steps": result.steps, "from step": result.best_step, **shown})
    return 0


def _make_table(runs: list[Recipe], *, show_progress_bar: bool) -> int:
    """Carry out what is left of all runs, and print and write their table; 1 if a run failed."""
    from minilm.train.methods import carry_out, score_start
    from minilm.train.methods_table import HEADLINE, MethodTable

    start, outcomes = score_start(runs[0], show_progress_bar=show_progress_bar), []
    for number, run in enumerate(runs, 1):
        outcome = carry_out(run, show_progress_bar=show_progress_bar)
        outcomes.append(outcome)
        found = "failed" if outcome.failure else f"{HEADLINE} {outcome.figures[HEADLINE]:.2f}"
        print(f"{number} of {len(runs)}: {outcome.name}, {found}", flush=True)
    table = MethodTable(start, outcomes)
    print(f"\n{table.text()}")
    _write_table(table, runs[0].training.folder.parent)
    return 1 if table.failures() else 0


def _write_table(table: MethodTable, folder: Path) -> None:
    """Write a table into a folder as JSON, as Markdown and, where matplotlib is, as a picture."""
    from minilm.cli.files import open_output
    from minilm.train.methods_plot import plot

    with open_output(str(folder / "table.json")) as file:
        file.write((json.dumps(table.to_dict(), indent=2, allow_nan=False) + "\n").encode())
    with open_output(str(folder / "table.md")) as file:
        file.write(table.markdown().encode())
    try:
        with open_output(str(folder / "table.png")) as file:
            plot(table, file)
    except ImportError as error:
        logger.warning("there is no picture of the table: %s", error)
