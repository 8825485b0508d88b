"""Recipes: a run as a TOML file, with a table for each thing that a run is made of.

    [model]       what to start from                       ModelSettings
    [objective]   `name`, and that objective's arguments   OBJECTIVES
    [data]        what to train on, in batches             DataSettings
    [teacher]     who is learnt from                       TeacherSettings
    [evaluation]  where the STS data is                    EvaluationSettings
    [training]    how                                      minilm.train.settings.TrainingSettings

Paths are relative to where the run is started. `--set training.epochs=3`, or `epochs=3` where no other table has that
key, changes an entry; what is no entry is an error that names the nearest ones. `minilm.train.runs` does what a recipe
says.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

from minilm.train import distillation, objectives
from minilm.train.objectives import Matryoshka, Objective
from minilm.train.settings import TrainingSettings
from minilm.weights.files import WeightsError, parse_toml

OBJECTIVES: dict[str, type[Objective]] = {
    "simcse": objectives.UnsupervisedSimCSE,
    "contrastive": objectives.Contrastive,
    "ranking": objectives.Ranking,
    "cosine-regression": objectives.CosineRegression,
    "cosent": objectives.CoSENT,
    "mse": distillation.MSE,
    "hpd": distillation.HPD,
    "crd": distillation.CRD,
    "ibkd": distillation.IBKD,
    "ibkd-fine-tuning": distillation.IBKDFineTuning,
    "similarity": distillation.SimilarityDistillation,
}
WIDTHS = ("student_width", "teacher_width")


class RecipeError(ValueError):
    """A recipe can't be read or followed; the message names the entry."""


@dataclass(frozen=True)
class ModelSettings:
    """What to start from.

    Attributes:
        name: as `minilm.load` takes it; empty for all-MiniLM-L6-v2.
        layers: start from these of its layers alone, counted from 1; empty for all.
        center: first take the mean over some of the data's texts off its vectors (`minilm.train.centering`).
        device: empty for a GPU if there is one.
        pooling, normalize, max_seq_length: in place of the model's own; empty, `"own"` and 0 for those.
        dropout: of hidden states and attention; negative for the model's own.
    """

    name: str = ""
    layers: list[Any] = field(default_factory=list)
    center: bool = False
    device: str = ""
    pooling: str = ""
    normalize: bool | str = "own"
    max_seq_length: int = 0
    dropout: float = -1.0


@dataclass(frozen=True)
class DataSettings:
    """What to train on.

    Attributes:
        folder: where the files are.
        mixture: a name of `minilm.train.sources.MIXTURES`; empty to go by `sources`.
        sources: tables as `minilm.train.data.Source` has them.
        sample: choose so many rows, once and for all; 0 for all.
        batch_size: rows of a batch, over all processes.
        rows_per_epoch: 0 for as many as there are.
        by_source: make each batch of one source alone.
        on_leak: evaluation sentences among them are an `error`, or to `drop`, or (for models that are not judged by
            them) to `ignore`.
        on_bad_row: a batch with too few rows is an `error`, or to `skip`.
    """

    folder: str = "data/train"
    mixture: str = ""
    sources: list[Any] = field(default_factory=list)
    sample: int = 0
    batch_size: int = 128
    rows_per_epoch: int = 0
    by_source: bool = False
    on_leak: str = "error"
    on_bad_row: str = "skip"


@dataclass(frozen=True)
class TeacherSettings:
    """Who is learnt from.

    Attributes:
        names: models as `minilm.train.teachers.load_teacher` takes them; several are an ensemble.
        weights: of each in an ensemble; empty for equal ones.
        cache: the folder in which each one's vectors are kept.
        dtype: of the vectors kept, `float16` or `float32`.
        precision: what the models compute in; `bfloat16` is several times as fast on a processor made for it.
    """

    names: list[Any] = field(default_factory=list)
    weights: list[Any] = field(default_factory=list)
    cache: str = "teacher"
    dtype: str = "float16"
    precision: str = "float32"


@dataclass(frozen=True)
class EvaluationSettings:
    """Where the STS data is: for STS-B dev's score while training, and to find evaluation sentences in training data.

    Attributes:
        data: a folder (`minilm.evaluate.sts_data`); empty for the public sets.
    """

    data: str = ""


@dataclass(frozen=True)
class Recipe:
    """A run: its tables.

    Attributes:
        name: of the file, without suffix.
        objective: `name`, its constructor's arguments but for the widths, and `matryoshka`, a list of widths.
    """

    name: str
    model: ModelSettings
    objective: Mapping[str, Any]
    data: DataSettings
    teacher: TeacherSettings
    evaluation: EvaluationSettings
    training: TrainingSettings

    @property
    def has_teacher(self) -> bool:
        """Whether its objective learns from a teacher."""
        return "teacher" in OBJECTIVES[self.objective["name"]].targets

    def make_objective(self, student_width: int, teacher_width: int) -> Objective:
        """Make the objective for vectors of these widths."""
        options = {name: value for name, value in self.objective.items() if name not in ("name", "matryoshka")}
        kind = OBJECTIVES[self.objective["name"]]
        widths = dict(zip(WIDTHS, (student_width, teacher_width), strict=True))
        made = kind(**{n: w for n, w in widths.items() if n in inspect.signature(kind).parameters}, **options)
        wanted = self.objective.get("matryoshka")
        return Matryoshka(made, wanted) if wanted else made


_TABLES: dict[str, type[Any]] = {
    "model": ModelSettings,
    "data": DataSettings,
    "teacher": TeacherSettings,
    "evaluation": EvaluationSettings,
    "training": TrainingSettings,
}


def shipped_recipes() -> list[str]:
    """Return the names of the recipes that come with the package."""
    folder = files("minilm.train") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_recipe(source: str | os.PathLike[str], changes: Iterable[str] = ()) -> Recipe:
    """Read a recipe and change some of its entries.

    Args:
        source: a TOML file (or JSON, as a run's folder keeps it), or the name of a shipped recipe.
        changes: `table.key=value`, or `key=value`, the value in TOML; a word needs no quotes.

    Raises:
        RecipeError: it can't be read, or has an entry that there is none of, or a wrong value.
    """
    name, tables = _read(source)
    for change in changes:
        table, key, value = _change(change, tables)
        tables.setdefault(table, {})[key] = value
    if unknown := sorted(set(tables) - {*_TABLES, "objective"}):
        raise RecipeError(f"{name}: there is no table {_not_there(unknown[0], [*_TABLES, 'objective'])}")
    objective = _objective(name, tables.get("objective", {}))
    made = {table: _table(name, table, kind, tables.get(table, {})) for table, kind in _TABLES.items()}
    recipe = Recipe(name, objective=objective, **made)
    if recipe.has_teacher and not recipe.teacher.names:
        raise RecipeError(f"{name}: objective {objective['name']!r} learns from a teacher; give teacher.names")
    if recipe.teacher.weights and len(recipe.teacher.weights) != len(recipe.teacher.names):
        counts = f"{len(recipe.teacher.weights)} for {len(recipe.teacher.names)}"
        raise RecipeError(f"{name}: expected one of teacher.weights for each of teacher.names, got {counts}")
    if bool(recipe.data.mixture) == bool(recipe.data.sources):
        raise RecipeError(f"{name}: expected either data.mixture or data.sources")
    return recipe


def _read(source: str | os.PathLike[str]) -> tuple[str, dict[str, Any]]:
    """Return a recipe's name and tables."""
    path = Path(source)
    if path.suffix not in (".toml", ".json"):
        if str(source) not in shipped_recipes():
            raise RecipeError(f"there is no recipe {_not_there(str(source), shipped_recipes())}; or give a TOML file")
        return str(source), _toml(
            (files("minilm.train") / "recipes" / f"{source}.toml").read_text("utf-8"), str(source)
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} can't be read: {error}") from error
    if path.suffix == ".toml":
        return path.stem, _toml(text, str(path))
    values = json.loads(text)
    return values.pop("name"), values


def _toml(text: str, where: str) -> dict[str, Any]:
    """Parse TOML."""
    try:
        return parse_toml(text, where)
    except WeightsError as error:
        raise RecipeError(str(error)) from error


def _change(change: str, tables: Mapping[str, Any]) -> tuple[str, str, Any]:
    """Return the table, key and value of a `table.key=value`."""
    path, equals, text = change.partition("=")
    table, dot, key = path.strip().rpartition(".")
    if not equals:
        raise RecipeError(f"expected table.key=value, got {change!r}")
    objective = tables.get("objective", {})
    known = {name: [f.name for f in fields(kind)] for name, kind in _TABLES.items()}
    known["objective"] = ["name", *_arguments(str(objective.get("name", "")))]
    if not dot:
        homes = [name for name, keys in known.items() if key in keys]
        if len(homes) > 1:
            raise RecipeError(f"{key!r} may be {' or '.join(f'{home}.{key}' for home in homes)}; say which")
        table = homes[0] if homes else ""
    if key not in known.get(table, ()):
        choices = [f"{name}.{entry}" for name, keys in known.items() for entry in keys]
        raise RecipeError(f"there is no entry {_not_there(path.strip(), choices)}")
    try:
        return table, key, _toml(f"value = {text.strip()}", change)["value"]
    except RecipeError:
        return table, key, text.strip()


def _arguments(objective: str) -> dict[str, Any]:
    """Return the arguments that a recipe may give an objective, with their defaults."""
    if objective not in OBJECTIVES:
        return {}
    parameters = inspect.signature(OBJECTIVES[objective]).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in WIDTHS} | {"matryoshka": []}


def _objective(recipe: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Check the objective's table."""
    name = values.get("name")
    if name not in OBJECTIVES:
        raise RecipeError(f"{recipe}: there is no objective {_not_there(str(name), list(OBJECTIVES))}")
    arguments = _arguments(name)
    _check(recipe, "objective", {key: value for key, value in values.items() if key != "name"}, arguments)
    return dict(values)


def _table(recipe: str, table: str, kind: type[Any], values: Mapping[str, Any]) -> Any:
    """Make a table's settings."""
    defaults = {f.name: f.default_factory() if f.default_factory is not MISSING else f.default for f in fields(kind)}
    if table == "training":
        defaults["output"], values = "", {"output": f"runs/{recipe}", **values}
    _check(recipe, table, values, defaults)
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{recipe}, [{table}]: {error}") from error


def _check(recipe: str, table: str, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise if a key is unknown, or a value of another kind than the default."""
    for key, value in values.items():
        if key not in defaults:
            raise RecipeError(f"{recipe}, [{table}]: there is no entry {_not_there(key, list(defaults))}")
        default = defaults[key]
        wanted: tuple[type, ...] = (type(default),)
        if isinstance(default, float):
            wanted = (int, float)
        elif isinstance(default, tuple):
            wanted = (list, tuple)
        elif key == "normalize":
            wanted = (bool, str)
        if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
            names = " or ".join(kind.__name__ for kind in wanted)
            raise RecipeError(f"{recipe}: {table}.{key} must be of type {names}, got {value!r}")


def _not_there(name: str, choices: list[str]) -> str:
    """Name what is not there, and the nearest that are."""
    ends = {choice.rpartition(".")[2]: choice for choice in choices}
    near = get_close_matches(name, choices, 3, 0.5) or [ends[n] for n in get_close_matches(name, list(ends), 3, 0.5)]
    return f"{name!r}; did you mean {', '.join(near)}?" if near else f"{name!r}; there are {', '.join(choices)}"
