"""Methods side by side: several recipes, each with several seeds, as runs of one folder.

    runs = plan(["mse", "hpd"], "runs/methods", seeds=[0, 1, 2], changes=["epochs=2"])
    table = MethodTable(score_start(runs[0]), [carry_out(run) for run in runs])

A run lives in `OUTPUT/RECIPE-seed-SEED` and ends with `sts.json`, the figures of its model; those of the start are in
`OUTPUT/start`. What is finished is only read, and what was killed goes on from its checkpoint.

The seed is the recipe's `training.seed`. It chooses the sample of the data (`data.sample`) and the order of its rows,
dropout, and how an objective's own weights begin. So with one seed all recipes of the same data see the same rows, and
what varies over seeds is all that is left to chance, the choice of the rows too.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from minilm.encoder import load
from minilm.evaluate.result import json_numbers
from minilm.evaluate.sts import evaluate_sts
from minilm.evaluate.vectors import Encoder
from minilm.train.log import logged_seconds, read_log
from minilm.train.recipe import Recipe, RecipeError, load_recipe
from minilm.train.runs import check_folder, chosen_device, entries, make_encoder, train
from minilm.weights.files import read_object, write_json

logger = logging.getLogger(__name__)

SHARED = ("model.name", "model.pooling", "model.normalize", "model.max_seq_length", "evaluation.data")
"""Entries of a recipe that runs must have in common for their figures to be comparable: the start, and what judges."""


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes:
        recipe: the run.
        figures: by name, of its model: `dimensions`, Spearman's correlation x 100 on `stsb dev`, on each of the seven
            tasks and their `average`, and the `steps` and `seconds` of training; nan for what has no value. Empty if
            the run failed.
        failure: why it failed; empty if it did not.
    """

    recipe: Recipe
    figures: Mapping[str, float]
    failure: str = ""

    @property
    def name(self) -> str:
        """The name of the run: that of its folder."""
        return self.recipe.training.folder.name


def plan(
    sources: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    seeds: Sequence[int] = (),
    changes: Iterable[str] = (),
) -> list[Recipe]:
    """Read recipes, and make a run of each with each seed: all recipes with the first seed, then with the next.

    Args:
        sources: TOML files, or names of shipped recipes.
        output: the folder of the runs' folders.
        seeds: in place of the recipes' own.
        changes: of entries in all of the recipes, as `load_recipe` takes them.

    Raises:
        RecipeError: a recipe can't be read, is there twice, starts from another model or is judged by other data than
            the first; or a run's folder holds one with other settings.
        ValueError: a seed out of range.
    """
    changes = list(changes)
    recipes = [load_recipe(source, changes) for source in sources]
    turns: Sequence[int | None] = seeds or [None]
    runs = [_as_run(recipe, seed, Path(output)) for seed in turns for recipe in recipes]
    folders = [run.training.folder for run in runs]
    if len(set(folders)) < len(folders):
        raise RecipeError(f"expected recipes and seeds that differ, got {', '.join(folder.name for folder in folders)}")
    for run in runs:
        _check_shared(runs[0], run)
        check_folder(run)
    return runs


def score_start(run: Recipe, *, show_progress_bar: bool | None = None) -> dict[str, float]:
    """Return the figures of the model that runs start from, as `Outcome` has them, but for steps and seconds.

    They are kept beside the run's folder, in `start/sts.json`.

    Args:
        run: one of a `plan`; all of them have the same start.
        show_progress_bar: by default, if the `minilm` logger is at level INFO or below.

    Raises:
        EvaluationDataError: data is missing, malformed or out of reach.
    """
    path = run.training.folder.parent / "start" / "sts.json"
    start = {entry: entries(run)[entry] for entry in SHARED}
    kept = read_object(path, missing_ok=True)
    if kept.get("start") != start:
        encoder = make_encoder(run.model, chosen_device(run.model))
        figures = _score(encoder, run.evaluation.data or None, show_progress_bar)
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {"start": start, "figures": json_numbers(figures)}
        write_json(path, kept)
    return _from_json(kept["figures"])


def carry_out(run: Recipe, *, show_progress_bar: bool | None = None) -> Outcome:
    """Train, score what came out and keep its figures in the run's folder; or read them if that is done.

    What data, numbers or memory make impossible is told in the outcome, and with a warning, so that other runs go on.

    Args:
        run: one of a `plan`.
        show_progress_bar: by default, if the `minilm` logger is at level INFO or below.
    """
    folder = run.training.folder
    path = folder / "sts.json"
    if not path.exists():
        try:
            result = train(run, show_progress_bar=show_progress_bar)
            encoder = load(folder / "model", device=chosen_device(run.model), dtype="float32")
            figures = _score(encoder, run.evaluation.data or None, show_progress_bar)
        except (OSError, RuntimeError, ValueError) as error:
            failure = f"{type(error).__name__}: {' '.join(str(error).split())}"
            logger.warning("%s failed: %s", folder.name, failure)
            return Outcome(run, {}, failure)
        seconds = logged_seconds(read_log(folder / "log.csv")) or math.nan
        write_json(path, {"figures": json_numbers({**figures, "steps": result.steps, "seconds": seconds})})
    return Outcome(run, _from_json(read_object(path)["figures"]))


def _as_run(recipe: Recipe, seed: int | None, output: Path) -> Recipe:
    """Give a recipe a seed, if one is wanted, and a folder."""
    seed = recipe.training.seed if seed is None else seed
    folder = output / f"{recipe.name}-seed-{seed}"
    return replace(recipe, training=replace(recipe.training, seed=seed, output=str(folder)))


def _check_shared(first: Recipe, run: Recipe) -> None:
    """Raise `RecipeError` if two runs have another start, or are judged by other data."""
    expected, got = entries(first), entries(run)
    for entry in SHARED:
        if got[entry] != expected[entry]:
            raise RecipeError(
                f"expected recipes with the same start and evaluation, got {entry} {expected[entry]!r} in {first.name} "
                f"and {got[entry]!r} in {run.name}; set it for all with --set {entry}=..., or leave one out"
            )


def _score(encoder: Encoder, data: str | None, show: bool | None) -> dict[str, float]:
    """Return the width of a model's vectors, and Spearman's correlation x 100 on STS-B dev and the seven tasks."""
    dev = evaluate_sts(encoder, data, tasks=("stsb",), split="dev", show_progress_bar=show)
    test = evaluate_sts(encoder, data, show_progress_bar=show)
    return {"dimensions": encoder.encode(["a"]).shape[1], "stsb dev": dev.average, **test.figures}


def _from_json(figures: Mapping[str, float | None]) -> dict[str, float]:
    """Undo `json_numbers`."""
    return {name: math.nan if value is None else value for name, value in figures.items()}
