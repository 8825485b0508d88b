"""Recipes: what they may say, and whole runs of small ones."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

import minilm
from minilm.encoder import SentenceEncoder
from minilm.train import runs
from minilm.train.centering import center
from minilm.train.objectives import Matryoshka
from minilm.train.recipe import OBJECTIVES, RecipeError, load_recipe, shipped_recipes
from minilm.train.rows import DataError
from minilm.train.sources import MIXTURES
from minilm.train.trainer import Trainer
from minilm.weights.download import SourceError
from minilm.weights.sources import read_model

TABLE = {
    "simcse",
    "simcse-supervised",
    "mse",
    "hpd",
    "crd",
    "ibkd",
    "ibkd-fine-tuning",
    "similarity",
    "minilm-sts-start",
    "minilm-sts",
    "minilm-sts-graded",
}


def test_there_is_a_recipe_for_every_row_of_the_table():
    assert set(shipped_recipes()) == TABLE


@pytest.mark.parametrize("name", sorted(TABLE))
def test_shipped_recipes_fit_together(name):
    recipe = load_recipe(name)
    objective = recipe.make_objective(384, 768)
    offered = set()
    for source in MIXTURES[recipe.data.mixture]:
        offered |= {*source.kinds, *(into for draw in source.draw for into in draw.into)}
    assert set(objective.columns) <= offered
    assert recipe.training.evaluate_every > 0
    assert recipe.has_teacher == ("teacher" in objective.targets) == bool(recipe.teacher.names)
    assert recipe.training.output == f"runs/{name}"


MINIMAL = '[objective]\nname = "simcse"\n[data]\nmixture = "sentences"\n'


@pytest.fixture
def write(tmp_path):
    def written(text):
        path = tmp_path / "mine.toml"
        path.write_text(text)
        return path

    return written


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "[trianing]\n", r"mine: there is no table 'trianing'; did you mean training\?"),
        (MINIMAL + "[training]\nepoch = 2\n", r"\[training\]: there is no entry 'epoch'; did you mean epochs"),
        (MINIMAL + '[training]\nepochs = "2"\n', "training.epochs must be of type int or float, got '2'"),
        (MINIMAL + "[training]\nmax_steps = true\n", "training.max_steps must be of type int, got True"),
        (MINIMAL + "[training]\nepochs = -2\n", r"\[training\]: epochs must be positive, got -2"),
        (MINIMAL + '[training]\nschedule = "step"\n', "schedule must be one of linear, cosine, constant"),
        (MINIMAL + "[[data.sources]]\n", "expected either data.mixture or data.sources"),
        (MINIMAL.replace("simcse", "simsce"), r"there is no objective 'simsce'; did you mean simcse, mse\?"),
        (
            MINIMAL.replace("[data]", "tau = 1\n[data]"),
            r"\[objective\]: there is no entry 'tau'; there are temperature",
        ),
        (MINIMAL.replace("simcse", "mse"), "objective 'mse' learns from a teacher; give teacher.names"),
        (
            MINIMAL + "[teacher]\nnames = ['a']\nweights = [1.0, 0.5]\n",
            "expected one of teacher.weights for each of teacher.names, got 2 for 1",
        ),
        ("[objective\n", "mine.toml is not TOML"),
    ],
)
def test_what_a_recipe_may_not_say(text, message, write):
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(text))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.epoch=3", r"there is no entry 'training.epoch'; did you mean training.epochs"),
        ("learning_rat=3", r"there is no entry 'learning_rat'; did you mean training.learning_rate"),
        ("zzz=3", "there is no entry 'zzz'; there are model.name"),
        ("name=x", "'name' may be model.name or objective.name; say which"),
        ("epochs", "expected table.key=value, got 'epochs'"),
    ],
)
def test_what_may_not_be_set(change, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe("simcse", [change])


def test_entries_are_set():
    changes = ["epochs=3", "training.schedule=cosine", "objective.temperature = 0.1", "data.on_leak='drop'"]
    recipe = load_recipe("simcse", [*changes, "matryoshka=[8, 4]", "model.normalize=false"])
    assert (recipe.training.epochs, recipe.training.schedule, recipe.data.on_leak) == (3, "cosine", "drop")
    objective = recipe.make_objective(32, 0)
    assert isinstance(objective, Matryoshka)
    assert objective.objective.temperature == 0.1
    assert recipe.model.normalize is False


def test_no_such_recipe():
    with pytest.raises(RecipeError, match=r"no recipe 'simsce'; did you mean simcse, .*; or give a TOML file"):
        load_recipe("simsce")


def test_every_objective_has_plain_arguments():
    for name in OBJECTIVES:
        teacher = 'teacher.names=["x"]'
        recipe = load_recipe("mse", [f"objective.name={name}", teacher])
        assert recipe.make_objective(32, 16).columns


# Whole runs.


@pytest.mark.filterwarnings("ignore::minilm.embed.TruncationWarning")
def test_distillation_brings_the_student_to_the_teacher(prepared, tmp_path):
    result = runs.train(load_recipe(prepared("similarity"), ["learning_rate=3e-3", "epochs=12"]))
    texts = (tmp_path / "texts.txt").read_text().splitlines()
    start, teacher, student = (
        minilm.load(tmp_path / name, device="cpu").encode(texts) for name in ("start", "teacher", "run/model")
    )
    before, after = (((x @ x.T - teacher @ teacher.T) ** 2).mean() for x in (start, student))
    assert after < before / 4
    assert result.model == tmp_path / "run" / "model"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        *("checkpoint.pt", "log.csv", "log.png", "model", "recipe.json"),
    ]
    recipe = load_recipe(tmp_path / "run" / "recipe.json")  # what was run can be run again
    assert asdict(recipe) == asdict(load_recipe(prepared("similarity"), ["learning_rate=3e-3", "epochs=12"]))


def test_an_ensemble_with_a_hidden_state_and_weights(prepared, tmp_path):
    teachers = [f"{tmp_path}/teacher", f"{tmp_path}/teacher:layer.0"]
    changes = [f"teacher.names={teachers}", "teacher.weights=[1.0, 0.5]", "learning_rate=3e-3", "epochs=12"]
    recipe = load_recipe(prepared("similarity"), changes)
    runs.train(recipe)
    texts = (tmp_path / "texts.txt").read_text().splitlines()
    start, student = (minilm.load(tmp_path / name, device="cpu").encode(texts) for name in ("start", "run/model"))
    teacher = runs.make_teacher(recipe).encode(texts)
    before, after = (((x @ x.T - teacher @ teacher.T) ** 2).mean() for x in (start, student))
    assert after < before / 4


def test_a_run_may_start_from_some_layers_and_centered(prepared, tmp_path):
    changes = ["model.layers=[2]", "model.center=true", "learning_rate=1e-12", "epochs=1", "keep_best=false"]
    runs.train(load_recipe(prepared("similarity"), changes))
    texts = (tmp_path / "texts.txt").read_text().splitlines()
    expected = SentenceEncoder(read_model(tmp_path / "start").with_layers([2]))
    center(expected, texts)
    trained = minilm.load(tmp_path / "run" / "model", device="cpu")
    assert trained.config.num_layers == 1
    np.testing.assert_allclose(trained.encode(texts), expected.encode(texts), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [("model.name=not/there/model", "neither an existing folder nor a model's name"), ("model.layers=[3]", "1 to 2")],
)
def test_a_start_that_is_not_there_ends_a_run_before_the_teacher_is_asked(prepared, tmp_path, change, message):
    with pytest.raises((SourceError, ValueError), match=message):
        runs.train(load_recipe(prepared("similarity"), [change]))
    assert not (tmp_path / "vectors").exists()


def test_a_run_of_another_teacher_is_not_gone_on_with(prepared, tmp_path, tiny_encoder):
    runs.train(load_recipe(prepared("similarity"), ["checkpoint_every=5"]))
    tiny_encoder(dropout=0.0, seed=2).save(tmp_path / "other")
    other = load_recipe(prepared("similarity"), ["checkpoint_every=5", f"teacher.names=['{tmp_path}/other']"])
    with pytest.raises(RecipeError, match=r"run holds a run with other settings: teacher.names was .*teacher.* is"):
        runs.train(other)


def test_an_output_layer_comes_with_the_model(prepared, tmp_path):
    result = runs.train(load_recipe(prepared("hpd"), ["output_width=4", "objective_learning_rate=0.01"]))
    encoder = minilm.load(result.model, device="cpu")
    texts = (tmp_path / "texts.txt").read_text().splitlines()
    vectors = encoder.encode(texts)
    assert vectors.shape == (30, 4)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    recipe = load_recipe(prepared("hpd"))
    assert runs.dev_score(recipe)(encoder) == pytest.approx(result.score, abs=1e-3)  # what was scored is what is kept
    layer = encoder.model.output_layer.weight.detach().numpy()
    encoder.model.output_layer, encoder.encoding = None, replace(encoder.encoding, normalize=False)
    projected = encoder.encode(texts) @ layer.T
    np.testing.assert_allclose(vectors, projected / np.linalg.norm(projected, axis=1, keepdims=True), atol=1e-5)


def test_a_leak_is_found(prepared, tmp_path):
    with (tmp_path / "texts.txt").open("a") as file:
        file.write((tmp_path / "sts" / "stsb" / "dev.tsv").read_text().split("\t")[1].upper() + "!\n")
    with pytest.raises(DataError, match=r"texts.txt, line 31: .* \(stsb "):
        runs.train(load_recipe(prepared("simcse")))
    assert len(runs.read_mixture(load_recipe(prepared("simcse", "ignore")))) == 31


def test_a_second_start_does_nothing_anew(prepared, monkeypatch):
    recipe = load_recipe(prepared("simcse"), ["dropout=0.1"])
    first = runs.train(recipe)
    monkeypatch.setattr(Trainer, "_take_step", lambda *_: 1 / 0)
    again = runs.train(recipe)
    assert (again.steps, again.score, again.best_step) == (first.steps, first.score, first.best_step) != (0, 0, 0)
    with pytest.raises(ValueError, match="holds a run already; resume it"):
        runs.train(recipe, resume=False)


def test_the_same_seed_gives_the_same_model(prepared, tmp_path):
    states = []
    for seed, output in ((1, "a"), (1, "b"), (2, "c")):
        torch.rand(seed + len(output))  # what was drawn before does not matter
        result = runs.train(
            load_recipe(prepared("ibkd"), [f"seed={seed}", f"output={tmp_path / output}", "plot=false"])
        )
        states.append(minilm.load(result.model, device="cpu").model.state_dict())
        figures = json.loads((tmp_path / output / "recipe.json").read_text())["training"]
        assert figures["seed"] == seed
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])
