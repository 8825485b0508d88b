"""From a recipe to a trained model: everything it names is loaded, checked and put together."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

from minilm.encoder import SentenceEncoder
from minilm.evaluate.sts import evaluate_sts
from minilm.train import distributed
from minilm.train.batches import Batches
from minilm.train.centering import center
from minilm.train.data import Source
from minilm.train.leaks import evaluation_sentences, without_leaks
from minilm.train.mixtures import Mixture
from minilm.train.recipe import ModelSettings, Recipe, RecipeError, load_recipe
from minilm.train.sources import MIXTURES
from minilm.train.teacher_cache import CachedTeacher
from minilm.train.teachers import Ensemble, Teacher, load_teacher
from minilm.train.trainer import Trainer, TrainingResult
from minilm.weights.files import write_json
from minilm.weights.sources import read_model

CENTERED_TEXTS = 5_000
"""About how many texts, spread over the data, a start is centered by."""


def train(recipe: Recipe, *, resume: bool = True, show_progress_bar: bool | None = None) -> TrainingResult:
    """Do what a recipe says: embed with the teacher what it has not embedded yet, and train.

    Under `torchrun` every process calls this.

    Args:
        recipe: the run.
        resume: go on from the output folder's checkpoint if there is one; if false, that is an error.
        show_progress_bar: by default, if the `minilm` logger is at level INFO or below.

    Raises:
        RecipeError, DataError: the recipe or its data can't be used, or its folder holds a run of another.
        CheckpointError, TrainingError: see `Trainer.run`.
    """
    check_folder(recipe)
    device = chosen_device(recipe.model)
    with distributed.process_group(device):
        encoder = make_encoder(recipe.model, device)  # first, as a start that is not there ends a run at once
        mixture, vectors, width = read_mixture(recipe), {}, 0
        if recipe.has_teacher:
            teacher = make_teacher(recipe, device)
            embed(mixture, teacher, show_progress_bar=show_progress_bar)
            vectors = {"teacher": ("text", teacher.encode)}
            width = teacher.encode([next(mixture.texts())[1]]).shape[1]
        if recipe.model.center:
            texts = [text for _, text in mixture.texts()]
            center(encoder, texts[:: max(1, len(texts) // CENTERED_TEXTS)])
        with torch.random.fork_rng():
            torch.manual_seed(recipe.training.seed)
            objective = recipe.make_objective(encoder.config.hidden_size, width)
        data = Batches(
            mixture,
            recipe.data.batch_size,
            columns=objective.columns,
            targets=objective.targets,
            vectors=vectors,
            seed=recipe.training.seed,
            rows_per_epoch=recipe.data.rows_per_epoch or None,
            by_source=recipe.data.by_source,
            on_bad_row=recipe.data.on_bad_row,
            smallest=max(2, distributed.world_size()),
        )
        trainer = Trainer(encoder, objective, data, recipe.training, evaluate=dev_score(recipe))
        if distributed.rank() == 0:
            recipe.training.folder.mkdir(parents=True, exist_ok=True)
            write_json(recipe.training.folder / "recipe.json", asdict(recipe))
        return trainer.run(resume=resume, show_progress_bar=show_progress_bar)


def entries(recipe: Recipe) -> dict[str, Any]:
    """Return what a recipe says, but for its folder: `{"table.key": value}`, the values as JSON has them."""
    tables = json.loads(json.dumps(asdict(recipe)))
    del tables["name"], tables["training"]["output"]
    return {f"{table}.{key}": value for table, values in tables.items() for key, value in values.items()}


def check_folder(run: Recipe) -> None:
    """Check that a run's folder holds none that was made with other settings, such as another teacher.

    Raises:
        RecipeError: it does; the message names what changed.
    """
    folder = run.training.folder
    started = any((folder / name).exists() for name in ("checkpoint.pt", "model"))
    if not started or not (folder / "recipe.json").exists():
        return
    was, wanted = entries(load_recipe(folder / "recipe.json")), entries(run)
    names = sorted({*was, *wanted})
    changed = [f"{n} was {was.get(n)!r} and is {wanted.get(n)!r}" for n in names if was.get(n) != wanted.get(n)]
    if changed:
        raise RecipeError(
            f"{folder} holds a run with other settings: {', '.join(changed)}. Set them back to go on, delete the "
            "folder, or choose another output"
        )


def read_mixture(recipe: Recipe) -> Mixture:
    """Read the data, choose the sample, and see to it that no evaluation sentence is in it.

    Raises:
        DataError: a row can't be used, or an evaluation sentence is there.
        RecipeError: there is no such mixture.
    """
    settings = recipe.data
    if settings.mixture and settings.mixture not in MIXTURES:
        raise RecipeError(f"there is no data.mixture {settings.mixture!r}; there are {', '.join(MIXTURES)}")
    sources = MIXTURES.get(settings.mixture) or [Source.from_settings(source) for source in settings.sources]
    mixture = Mixture.read(sources, settings.folder)
    if settings.on_leak != "ignore":
        sentences = evaluation_sentences(recipe.evaluation.data or None)
        mixture = without_leaks(mixture, sentences, settings.on_leak)
    return mixture.sample(settings.sample, recipe.training.seed) if settings.sample else mixture


def make_teacher(recipe: Recipe, device: str | None = None) -> CachedTeacher | Ensemble:
    """Make the recipe's teacher, each of its models with a folder of vectors of its own."""
    settings = recipe.teacher

    def cached(name: str) -> CachedTeacher:
        folder = f"{settings.cache}/{re.sub('[/:]+', '--', name.strip('/'))}"
        return CachedTeacher(folder, load_teacher(name, device=device, dtype=settings.precision), dtype=settings.dtype)

    teachers = [cached(str(name)) for name in settings.names]
    return teachers[0] if len(teachers) == 1 else Ensemble(teachers, settings.weights)


def embed(mixture: Mixture, teacher: Teacher, *, show_progress_bar: bool | None = None) -> int:
    """Let the teacher embed what it has not embedded yet of a mixture's texts; return how many vectors that took."""
    parts = teacher.teachers if isinstance(teacher, Ensemble) else [teacher]
    texts = list(dict.fromkeys(text for _, text in mixture.texts()))
    return sum(
        part.embed(texts, show_progress_bar=show_progress_bar) for part in parts if isinstance(part, CachedTeacher)
    )


def chosen_device(settings: ModelSettings) -> str:
    """Return the device that is asked for; else this process's GPU, if there is one."""
    return settings.device or distributed.local_device() or ("cuda" if torch.cuda.is_available() else "cpu")


def make_encoder(settings: ModelSettings, device: str) -> SentenceEncoder:
    """Load the start, in float32, with the recipe's settings."""
    checkpoint = read_model(settings.name or None)
    if settings.layers:
        checkpoint = checkpoint.with_layers(settings.layers)
    wanted: dict[str, Any] = {"pooling": settings.pooling, "max_seq_length": settings.max_seq_length}
    wanted = {name: value for name, value in wanted.items() if value}
    if isinstance(settings.normalize, bool):
        wanted["normalize"] = settings.normalize
    if settings.dropout >= 0:
        config = replace(checkpoint.config, hidden_dropout=settings.dropout, attention_dropout=settings.dropout)
        checkpoint = replace(checkpoint, config=config)
    return SentenceEncoder(checkpoint.with_encoding(**wanted)).to(device, "float32")


def dev_score(recipe: Recipe) -> Callable[[Any], float] | None:
    """Return what scores a model while it trains: Spearman's correlation x 100 on STS-B dev; None if nothing does."""
    if not recipe.training.evaluate_every:
        return None
    data = recipe.evaluation.data or None
    return lambda model: evaluate_sts(model, data, tasks=("stsb",), split="dev", show_progress_bar=False).average
