"""`minilm train` and `minilm distill`: from a recipe to a model."""

from __future__ import annotations

import argparse
import math

from minilm.cli.common import Commands, Parser, UsageError, add_command, print_fields, shows_progress

RECIPES = """\
A recipe is a TOML file with the tables model, objective, data, teacher, evaluation and training, or the name of one
that comes with minilm (--list). A killed run goes on from its last checkpoint when started again.
"""
TRAIN_EPILOG = f"""\
{RECIPES}
examples:
  minilm train simcse --set data.folder=train/ --set evaluation.data=sts/
  minilm train my-recipe.toml --set training.epochs=3 --set seed=1
  torchrun --nproc-per-node 2 $(which minilm) train my-recipe.toml
"""
DISTILL_EPILOG = f"""\
{RECIPES}
The teacher embeds every text once, and its vectors are kept: that too goes on where it was.

examples:
  minilm distill similarity --set data.folder=train/ --set evaluation.data=sts/
  minilm distill ibkd --set 'teacher.names=["all-mpnet-base-v2/", "sentence-transformers/all-MiniLM-L6-v2"]'
  minilm distill mse --embed-only
"""


def add_commands(commands: Commands[Parser]) -> None:
    """Add `train` and `distill`."""
    trained = add_command(commands, "train", run_train, summary="train a model by a recipe", epilog=TRAIN_EPILOG)
    summary = "train a model to be like a teacher, by a recipe"
    distilled = add_command(commands, "distill", run_distill, summary=summary, epilog=DISTILL_EPILOG)
    for parser in (trained, distilled):
        parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a TOML file, or the name of a shipped recipe")
        parser.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="change an entry; can be repeated"
        )
        parser.add_argument("--output", metavar="DIR", help="the run's folder (as --set training.output=DIR)")
        parser.add_argument("--list", action="store_true", help="list the shipped recipes")
    distilled.add_argument("--embed-only", action="store_true", help="let the teacher embed the texts, and stop")


def run_train(arguments: argparse.Namespace) -> int:
    """Train, and say what came out."""
    return _run(arguments, needs_teacher=False)


def run_distill(arguments: argparse.Namespace) -> int:
    """Distil, and say what came out."""
    return _run(arguments, needs_teacher=True)


def _run(arguments: argparse.Namespace, *, needs_teacher: bool) -> int:
    """Do what a recipe says."""
    from minilm.train import distributed
    from minilm.train.recipe import load_recipe, shipped_recipes
    from minilm.train.runs import embed, make_teacher, read_mixture, train

    if arguments.list:
        for name in shipped_recipes():
            if load_recipe(name).has_teacher or not needs_teacher:
                print(name)
        return 0
    if arguments.recipe is None:
        raise UsageError("a recipe is missing: give a TOML file, or a name of --list")
    output = [f"training.output={arguments.output}"] if arguments.output else []
    recipe = load_recipe(arguments.recipe, [*arguments.set, *output])
    if needs_teacher and not recipe.has_teacher:
        raise UsageError(f"objective {recipe.objective['name']!r} has no teacher to learn from; use minilm train")
    progress = shows_progress(arguments)
    if needs_teacher and arguments.embed_only:
        teacher = make_teacher(recipe, recipe.model.device or None)
        count = embed(read_mixture(recipe), teacher, show_progress_bar=progress)
        print_fields({"vectors computed": count, "kept in": recipe.teacher.cache})
        return 0
    result = train(recipe, show_progress_bar=progress)
    if distributed.started_as() == 0:
        scores = {"STS-B dev before": result.first_score, "STS-B dev after": result.score}
        shown = {name: f"{score:.2f}" for name, score in scores.items() if not math.isnan(score)}
        print_fields({"model": str(result.model), "steps": result.steps, "from step": result.best_step, **shown})
    return 0
