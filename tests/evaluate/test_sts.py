"""STS figures against figures by hand, by scipy, by sentence-transformers and as published."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import minilm
from minilm.evaluate import evaluate_sts, with_intervals
from minilm.evaluate.sts_data import TASKS, YEARS


def pairs(*angles_and_scores):
    """Return TSV lines whose pairs are apart by the given angles."""
    return "".join(f"{score}\t0 a\t{angle} b\n" for angle, score in angles_and_scores)


@pytest.fixture
def folder(tmp_path):
    """Make a small data folder: two subsets a year, and test and dev sets."""
    for year in YEARS:
        (tmp_path / year).mkdir()
        (tmp_path / year / "news.tsv").write_text(pairs((0, 5), (30, 4), (60, 3), (90, 2)))
        (tmp_path / year / "forum.tsv").write_text(pairs((10, 1), (50, 3), (80, 0)))
    for name in ("stsb", "sickr"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.tsv").write_text(pairs((0, 1), (40, 1), (80, 2)))
        (tmp_path / name / "dev.tsv").write_text(pairs((0, 3), (40, 2), (80, 1)))
    return tmp_path


def test_figures(folder, angle_encoder):
    result = evaluate_sts(angle_encoder, folder)
    assert [task.name for task in result.tasks] == list(TASKS)
    sts12, *_, sickr = result.tasks
    cosines = np.cos(np.radians([10, 50, 80, 0, 30, 60, 90]))
    scores = [1, 3, 0, 5, 4, 3, 2]
    assert sts12.num_pairs == 7
    assert sts12.spearman == pytest.approx(100 * stats.spearmanr(cosines, scores).statistic, abs=1e-5)
    assert sts12.pearson == pytest.approx(100 * stats.pearsonr(cosines, scores).statistic, abs=1e-5)
    assert [(subset.name, subset.num_pairs) for subset in sts12.subsets] == [("forum", 3), ("news", 4)]
    assert [subset.spearman for subset in sts12.subsets] == pytest.approx([50, 100])
    assert sickr.subsets == ()
    assert result.average == pytest.approx(np.mean([task.spearman for task in result.tasks]))


def test_result_as_json_and_table(folder, angle_encoder):
    result = evaluate_sts(angle_encoder, folder)
    report = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert report["split"] == "test"
    assert report["average_spearman"] == result.average
    linear = 100 * stats.pearsonr(np.cos(np.radians([0, 30, 60, 90])), [5, 4, 3, 2]).statistic
    news = {"num_pairs": 4, "spearman": pytest.approx(100), "pearson": pytest.approx(linear, abs=1e-5)}
    assert report["tasks"]["sts14"]["subsets"]["news"] == news
    assert "subsets" not in report["tasks"]["stsb"]
    lines = result.table().splitlines()
    assert lines[0].split() == ["task", "pairs", "Spearman", "Pearson"]
    assert lines[3].split()[:3] == ["news", "4", "100.00"]
    assert lines[-1].split() == ["average", "of", "7", f"{result.average:.2f}"]


def test_intervals(folder, angle_encoder):
    result = with_intervals(evaluate_sts(angle_encoder, folder, tasks=["sts12", "sts13"]), samples=20)
    assert list(result.figures) == list(result.intervals) == ["sts12", "sts13", "average"]
    assert result.figures == result.recount([np.ones(7, dtype=int)] * 2)
    report = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert report["measure"] == "sts"
    assert report["pairs"] == 14
    assert report["figures"]["sts12"] == report["tasks"]["sts12"]["spearman"]
    assert report["figures"]["average"] == report["average_spearman"]
    assert report["intervals"]["average"]["low"] <= report["intervals"]["average"]["high"]
    lines = result.table().splitlines()
    assert lines[0].endswith("  95% interval")
    assert [line.endswith("]") for line in lines[1:]] == [True, False, False, True, False, False, True]


def test_each_sentence_is_encoded_once(folder, angle_encoder):
    evaluate_sts(angle_encoder, folder)
    assert sorted(angle_encoder.seen) == sorted(set(angle_encoder.seen))
    assert len(angle_encoder.seen) == 1 + 8  # "0 a", and "N b" for N in 0 10 30 40 50 60 80 90


def test_dev_split_of_some_tasks(folder, angle_encoder):
    result = evaluate_sts(angle_encoder, folder, tasks=["sickr", "stsb"], split="dev")
    assert [(task.name, task.spearman) for task in result.tasks] == [
        ("sickr", pytest.approx(100)),
        ("stsb", pytest.approx(100)),
    ]
    assert result.table().splitlines()[-1].startswith("average of 2")


def test_undefined_correlation_is_shown(folder, caplog, angle_encoder):
    (folder / "stsb" / "test.tsv").write_text(pairs((0, 3), (40, 3)))
    result = evaluate_sts(angle_encoder, folder, tasks=["stsb"])
    assert math.isnan(result.tasks[0].spearman)
    assert math.isnan(result.average)
    assert "no correlation for stsb" in caplog.text
    assert "nan" in result.table()
    assert result.to_dict()["average_spearman"] is None
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["figures"] == {"stsb": None, "average": None}


def test_pairs_of_equal_sentences_tie(folder, angle_encoder):
    """Their cosines are 1 give or take a rounding error, which must not be ranked as if it meant something."""
    scores = np.random.default_rng(0).permutation(30)
    same = "".join(f"{score}\t{angle} a\t{angle} a\n" for angle, score in enumerate(scores))
    (folder / "stsb" / "test.tsv").write_text(same + pairs((10, -1)))
    expected = stats.spearmanr([1] * 30 + [0], [*scores, -1]).statistic
    assert evaluate_sts(angle_encoder, folder, tasks=["stsb"]).average == pytest.approx(100 * expected)


@pytest.mark.parametrize("dtype", [np.float16, np.float64], ids=str)
def test_any_dtype_of_vectors(folder, dtype, angle_encoder):
    class Encoder:
        def encode(self, sentences):
            return angle_encoder.encode(sentences).astype(dtype)

    expected = evaluate_sts(angle_encoder, folder).average
    assert evaluate_sts(Encoder(), folder).average == pytest.approx(expected, abs=1e-6)


def test_sentence_transformers_gets_the_same_figures(folder, encoder, weights_folder):
    from sentence_transformers import SentenceTransformer

    theirs = evaluate_sts(SentenceTransformer(str(weights_folder), device="cpu"), folder)
    ours = evaluate_sts(encoder, folder)
    assert [task.spearman for task in ours.tasks] == pytest.approx([task.spearman for task in theirs.tasks])
    assert [task.pearson for task in ours.tasks] == pytest.approx([task.pearson for task in theirs.tasks], abs=1e-3)


@pytest.mark.parametrize(
    "vectors", [np.zeros((2, 3)), np.full((3, 2), np.nan), np.zeros(3)], ids=["rows", "nan", "flat"]
)
def test_unusable_vectors(folder, vectors):
    class Encoder:
        def encode(self, _sentences):
            return vectors

    with pytest.raises(ValueError, match="expected finite vectors"):
        evaluate_sts(Encoder(), folder, tasks=["sts12"])


PUBLISHED = {
    "sts12": 72.37,
    "sts13": 80.60,
    "sts14": 75.60,
    "sts15": 85.39,
    "sts16": 78.99,
    "stsb": 82.03,
    "sickr": 77.15,
}


def test_published_figures(encoder, sts_folder):
    result = evaluate_sts(encoder, sts_folder)
    assert {task.name: task.spearman for task in result.tasks} == pytest.approx(PUBLISHED, abs=0.02)
    assert result.average == pytest.approx(78.87, abs=0.02)
    assert [task.num_pairs for task in result.tasks] == [3108, 1500, 3750, 3000, 1186, 1379, 4927]


def test_a_shipped_model_scores_what_its_card_says(sts_folder):
    """On two tasks; another processor may round its 8-bit products differently."""
    recorded = json.loads((Path(__file__).parents[2] / "weights/results/minilm-sts.json").read_text())
    result = evaluate_sts(minilm.load("minilm-sts", device="cpu"), sts_folder, tasks=["sts16", "stsb"])
    for task in result.tasks:
        assert task.spearman == pytest.approx(recorded["figures"][task.name], abs=0.1), task.name
        assert task.spearman > PUBLISHED[task.name] + 1  # that of its start
