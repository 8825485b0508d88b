"""The table of several methods tells what its runs found; that the picture is legible was looked at by eye."""

import io
import json
import math
import statistics
import sys

import pytest

from minilm.train.methods import Outcome, plan
from minilm.train.methods_plot import plot
from minilm.train.methods_table import MethodTable

TASKS = ("sts12", "sts13", "sts14", "sts15", "sts16", "stsb", "sickr")
START = {"dimensions": 384, "stsb dev": 86.7, **dict.fromkeys(TASKS, 78.0), "average": 78.0}


def figures(average):
    """Return a run's figures: the tasks lie around the average."""
    tasks = {task: average + place - 3 for place, task in enumerate(TASKS)}
    return {**START, **tasks, "average": average, "steps": 94, "seconds": 61.7}


@pytest.fixture
def table(tmp_path):
    """Three recipes with three seeds: mse lost one of them, crd all."""
    runs = plan(["mse", "crd", "similarity"], tmp_path, seeds=[0, 1, 2], changes=["epochs=2"])
    averages = {"mse": iter([77.25, 77.5]), "similarity": iter([79.0, 79.25, 80.1])}
    outcomes = []
    for run in runs:
        if run.name == "crd" or (run.name, run.training.seed) == ("mse", 1):
            outcomes.append(Outcome(run, {}, "TrainingError: the loss is nan"))
        else:
            outcomes.append(Outcome(run, figures(next(averages[run.name]))))
    return MethodTable(START, outcomes)


def test_numbers(table):
    report = json.loads(json.dumps(table.to_dict(), allow_nan=False))
    similarity = report["recipes"]["similarity"]
    assert similarity["seeds"] == [0, 1, 2]
    for figure, shift in (("average", 0), ("sts12", -3), ("sickr", 3)):
        values = [value + shift for value in (79.0, 79.25, 80.1)]
        assert similarity["mean"][figure] == pytest.approx(statistics.mean(values))
        assert similarity["deviation"][figure] == pytest.approx(statistics.stdev(values))
    assert (report["recipes"]["mse"]["seeds"], report["recipes"]["mse"]["mean"]["average"]) == ([0, 2], 77.375)
    assert report["recipes"]["crd"]["mean"]["average"] is None
    assert report["runs"]["mse-seed-2"]["average"] == 77.5
    assert report["failures"] == dict.fromkeys(
        ["crd-seed-0", "mse-seed-1", "crd-seed-1", "crd-seed-2"], "TrainingError: the loss is nan"
    )
    assert report["start"] == START


def test_text(table):
    lines = [line.split() for line in table.text().splitlines()]
    assert lines[0] == ["recipe", "objective", "dims", "seeds", "stsb", "dev", *TASKS, "average", "steps", "seconds"]
    assert lines[1] == ["start", "384", "86.70", *["78.00"] * 8]
    assert lines[2][:6] == ["mse", "mse", "384", "2,", "1", "failed"]
    assert lines[3] == ["crd", "crd", "0,", "3", "failed", *["failed"] * 9]
    assert lines[4][-5:] == ["79.45", "±", "0.58", "94", "62"]
    below = table.text().split("\n\n")[1].splitlines()
    assert below[0] == "mean ± standard deviation over seeds"
    assert "data.batch_size is 256 in mse, crd; 128 in similarity" in below
    assert "mse-seed-1 failed: TrainingError: the loss is nan" in below
    assert not any("epochs" in line or "objective." in line or "training.seed" in line for line in below)


def test_markdown(table):
    rows, notes = table.markdown().split("\n\n")
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows.splitlines()]
    assert {len(row) for row in cells} == {15}
    assert cells[1][:3] == ["---", "---", "---:"]
    assert cells[-1][0] == "similarity"
    assert cells[-1][-3] == "79.45 ± 0.58"
    assert notes.startswith("- mean ± standard")
    assert notes.endswith("the loss is nan\n")


def test_one_seed_has_no_deviation(table):
    alone = MethodTable(START, [table.outcomes[2]])
    assert alone.text().splitlines()[2].split()[-3:] == ["79.00", "94", "62"]
    assert alone.text().count("\n") == 2
    assert alone.markdown().count("\n") == 4
    assert alone.to_dict()["recipes"]["similarity"]["deviation"]["average"] is None


def test_figures_without_value(table):
    run = table.outcomes[2].recipe
    table = MethodTable({**START, "average": math.nan}, [Outcome(run, figures(math.nan))])
    found = table.to_dict()
    assert found["start"]["average"] is found["runs"]["similarity-seed-0"]["average"] is None
    assert found["recipes"]["similarity"]["mean"]["sts12"] is None
    plot(table, io.BytesIO())


def test_picture(table, saved_figures):
    file = io.BytesIO()
    plot(table, file)
    assert file.getvalue().startswith(b"\x89PNG")
    (axes,) = saved_figures[-1].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["similarity", "mse"]  # the best on top
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    dots = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines if line.get_marker() == "o"]
    assert dots == [([79.0, 79.25, 80.1], [0, 0, 0]), ([77.25, 77.5], [1, 1])]
    (start,) = (line for line in axes.lines if line.get_linestyle() == "--")
    assert set(start.get_xdata()) == {78.0}
    assert {"79.45 ± 0.58", "start 78.00"} <= {text.get_text() for text in axes.texts}


def test_picture_of_nothing(table, saved_figures):
    plot(MethodTable(START, [outcome for outcome in table.outcomes if outcome.failure]), io.BytesIO())
    assert [label.get_text() for label in saved_figures[-1].axes[0].get_yticklabels()] == []


def test_without_matplotlib(table, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"minilm\[plots\]"):
        plot(table, io.BytesIO())
