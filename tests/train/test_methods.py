"""Several recipes with several seeds, as runs of one folder."""

import json
from functools import partial

import numpy as np
import pytest
import scipy.stats
import torch

import minilm
from minilm.evaluate import EvaluationDataError
from minilm.train import methods
from minilm.train.recipe import RecipeError
from minilm.train.runs import read_mixture
from minilm.train.trainer import Trainer

SHORT = ("plot=false", "epochs=1")


@pytest.fixture
def planned(prepared, tmp_path):
    """Return a function that plans short runs of objectives in a folder; hpd's vectors have 4 dimensions."""

    def plan(*objectives, seeds=(), changes=(), output="table"):
        sources = [prepared(objective) for objective in objectives]
        for source in sources:
            source.write_text(source.read_text().replace('"hpd"', '"hpd"\noutput_width = 4'))
        return methods.plan(sources, tmp_path / output, seeds=seeds, changes=[*SHORT, *changes])

    return plan


def spearman_by_hand(vectors_of, path):
    """Return Spearman's correlation x 100 of a TSV file's scores with the cosines of its pairs."""
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    first, second = (np.float64(vectors_of([row[column] for row in rows])) for column in (1, 2))
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    cosines = np.round((first * second).sum(axis=1) / norms, 7)
    return 100 * scipy.stats.spearmanr(cosines, [float(row[0]) for row in rows]).statistic


def check_figures(figures, vectors_of, folder):
    """Hold the figures against vectors, with correlations of scipy."""
    tasks = ("sts12", "sts13", "sts14", "sts15", "sts16", "stsb", "sickr")
    expected = {task: f"{task}/{'part' if task[-1].isdigit() else 'test'}.tsv" for task in tasks}
    expected = {task: spearman_by_hand(vectors_of, folder / file) for task, file in expected.items()}
    assert {task: figures[task] for task in tasks} == pytest.approx(expected, abs=1e-6)
    assert figures["average"] == pytest.approx(np.mean(list(expected.values())))
    assert figures["stsb dev"] == pytest.approx(spearman_by_hand(vectors_of, folder / "stsb" / "dev.tsv"))


def test_the_plan(planned, tmp_path):
    runs = planned("mse", "similarity", seeds=[3, 1], changes=["learning_rate=0.5"])
    assert [(run.name, run.training.seed) for run in runs] == [
        *(("mse", 3), ("similarity", 3), ("mse", 1), ("similarity", 1)),
    ]
    assert runs[2].training.folder == tmp_path / "table" / "mse-seed-1"
    assert {run.training.learning_rate for run in runs} == {0.5}
    assert [run.training.seed for run in planned("mse", "similarity", changes=["seed=7"])] == [7, 7]


def test_what_can_not_be_planned(planned, prepared, tmp_path):
    with pytest.raises(RecipeError, match="seeds that differ, got mse-seed-0, mse-seed-0"):
        planned("mse", "mse")
    with pytest.raises(RecipeError, match="seeds that differ"):
        planned("mse", seeds=[1, 1])
    with pytest.raises(ValueError, match="seed must be a number of at least 0"):
        planned("mse", seeds=[-1])
    other = prepared("crd")
    other.write_text(other.read_text().replace(f"{tmp_path}/start", f"{tmp_path}/teacher"))
    with pytest.raises(RecipeError, match=r"got model.name '.*start' in mse and '.*teacher' in crd; set it for all"):
        methods.plan([prepared("mse"), other], tmp_path / "table")


def test_one_seed_means_the_same_rows(planned):
    def rows(run):
        return [text for _, text in read_mixture(run).texts()]

    changes = ["data.sample=12"]
    mse, similarity, other = planned("mse", "similarity", seeds=[1, 2], changes=changes)[:3]
    assert len(rows(mse)) == 12
    assert rows(mse) == rows(similarity) != rows(other)


def test_two_recipes_with_two_seeds(planned, tmp_path, monkeypatch):
    runs = planned("hpd", "similarity", seeds=[0, 1])
    start = methods.score_start(runs[0])
    outcomes = [methods.carry_out(run) for run in runs]
    sts, load = tmp_path / "sts", partial(minilm.load, device="cpu", normalize=False)
    check_figures(start, load(tmp_path / "start").encode, sts)
    for outcome in outcomes:
        folder = tmp_path / "table" / outcome.name
        encoder, weight = load(folder / "model"), np.eye(32)
        if outcome.recipe.name == "hpd":
            weight = encoder.model.output_layer.weight.detach().numpy()
            encoder.model.output_layer = None
        check_figures(outcome.figures, lambda texts, e=encoder.encode, w=weight: e(texts) @ w.T, sts)
        assert outcome.figures["dimensions"] == len(weight)
        assert outcome.figures["steps"] == 5
        assert outcome.figures["seconds"] > 0
        assert json.loads((folder / "sts.json").read_text())["figures"] == outcome.figures
    averages = [outcome.figures["average"] for outcome in outcomes]
    assert len({*averages, start["average"]}) == 5
    for name in ("train", "evaluate_sts", "make_encoder"):
        monkeypatch.setattr(methods, name, None)  # whatever is done is only read
    assert methods.score_start(runs[0]) == start
    assert [methods.carry_out(run) for run in runs] == outcomes


def test_a_killed_run_goes_on(planned, monkeypatch):
    whole, killed = (planned("similarity", changes=["checkpoint_every=2"], output=name)[0] for name in ("a", "b"))
    steps, take_step = [], Trainer._take_step

    def stop_at_fourth(trainer, batches):
        steps.append(trainer._step)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return take_step(trainer, batches)

    expected = methods.carry_out(whole)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_take_step", stop_at_fourth)
        with pytest.raises(KeyboardInterrupt):
            methods.carry_out(killed)
        assert not (killed.training.folder / "sts.json").exists()
        found = methods.carry_out(killed)
    assert steps == [0, 1, 2, 3, 2, 3, 4]
    assert {**found.figures, "seconds": 0} == {**expected.figures, "seconds": 0}
    states = [minilm.load(run.training.folder / "model", device="cpu").model.state_dict() for run in (whole, killed)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_run_killed_before_it_was_scored(planned, monkeypatch):
    (run,) = planned("similarity")
    with monkeypatch.context() as patch:
        patch.setattr(methods, "evaluate_sts", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            methods.carry_out(run)
    monkeypatch.setattr(Trainer, "_take_step", None)
    assert methods.carry_out(run).figures["steps"] == 5


def test_a_run_that_fails_is_told(planned, caplog):
    (run,) = planned("mse", changes=["learning_rate=1e30", "warmup=0"])
    outcome = methods.carry_out(run)
    assert outcome.failure.startswith("TrainingError: the loss is nan on batch ")
    assert outcome.figures == {}
    assert f"mse-seed-0 failed: {outcome.failure}" in caplog.text
    assert not (run.training.folder / "sts.json").exists()


def test_a_folder_of_other_settings_is_left_alone(planned):
    methods.carry_out(*planned("mse"))
    planned("mse")
    with pytest.raises(
        RecipeError, match=r"mse-seed-0 holds a run with other settings: training.epochs was 1 and is 2"
    ):
        planned("mse", changes=["epochs=2"])
    with pytest.raises(RecipeError, match=r"teacher.names was .*teacher'\] and is \['other'\]. Set them back"):
        planned("mse", changes=['teacher.names=["other"]'])


def test_the_start_is_scored_anew_where_it_is_another(planned, tmp_path):
    first = methods.score_start(*planned("mse"))
    other = methods.score_start(*planned("mse", changes=[f"model.name={tmp_path}/teacher"]))
    assert other["average"] != first["average"]
    assert methods.score_start(*planned("mse")) == first
    with pytest.raises(EvaluationDataError, match="nowhere"):
        methods.score_start(*planned("mse", changes=["evaluation.data=nowhere"]))
