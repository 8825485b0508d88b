"""`minilm eval`: figures as a table and as JSON, of one model and of several."""

import json

import pytest

from minilm.cli import main

STS = "5\ta cat\ta cat\n3\ta cat\ta dog\n0\ta cat\tprime numbers\n4\tit rains\train falls\n"


@pytest.fixture
def sts(tmp_path):
    """A folder with a few pairs of the STS benchmark."""
    (tmp_path / "stsb").mkdir()
    (tmp_path / "stsb" / "test.tsv").write_text(STS)
    return tmp_path


def test_eval_sts(sts, capsys, model):
    arguments = ["eval", "sts", "--data", str(sts), "--tasks", "stsb", *model]
    assert main([*arguments, "--json", str(sts / "figures.json")]) == 0
    table = capsys.readouterr().out
    assert table.splitlines()[1].split()[:2] == ["stsb", "4"]
    assert main([*arguments, "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((sts / "figures.json").read_text())
    assert report["tasks"]["stsb"]["spearman"] == pytest.approx(100)
    assert list(report["intervals"]) == ["stsb", "average"]
    assert report["model"]["max_seq_length"] == 128
    assert main([*arguments[:4], *model]) == 2
    assert "lacks sts12/*.tsv, sts13/*.tsv" in capsys.readouterr().err


def test_bootstrap_is_as_asked_for(sts, capsys, model):
    intervals = []
    for options in (["--samples", "0"], ["--samples", "30"], ["--samples", "30", "--seed", "1"]):
        assert main(["eval", "sts", "--data", str(sts), "--tasks", "stsb", *model, *options, "--json", "-"]) == 0
        intervals.append(json.loads(capsys.readouterr().out)["intervals"])
    assert intervals[0] == {}
    assert intervals[1].keys() == intervals[2].keys() == {"stsb", "average"}


FILES = {
    "pairs": "1\ta cat sleeps\ta sleeping cat\n0\ta cat sleeps\tprime numbers\n1\tit rains\train falls\n",
    "triplets": "a cat sleeps\ta sleeping cat\tprime numbers\nit rains\train falls\ta dog\n",
    "clustering": "a\ta cat sleeps\na\ta sleeping cat\nb\tprime numbers\nb\todd numbers\n",
    "uniformity": "a cat sleeps\ta sleeping cat\nit rains\train falls\n",
}
FIGURES = {"pairs": "average precision", "triplets": "accuracy", "clustering": "V-measure", "uniformity": "uniformity"}


@pytest.mark.parametrize("measure", FILES)
def test_measures_of_a_file(measure, tmp_path, capsys, model):
    if measure == "clustering":
        pytest.importorskip("sklearn", reason="needs scikit-learn, which the extra test brings")
    path = tmp_path / "data.tsv"
    path.write_text(FILES[measure])
    assert main(["eval", measure, "--data", str(path), *model]) == 0
    assert FIGURES[measure] in capsys.readouterr().out
    assert main(["eval", measure, "--data", str(path), *model, "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["measure"] == measure
    figure = report["figures"][FIGURES[measure]]
    assert -4 < figure < -1 if measure == "uniformity" else figure == pytest.approx(1)
    assert bool(report["intervals"]) == (measure in ("pairs", "triplets"))


@pytest.fixture
def retrieval(tmp_path):
    """A folder with two queries and three documents."""
    (tmp_path / "qrels").mkdir()
    (tmp_path / "corpus.jsonl").write_text(
        "".join(
            json.dumps({"_id": name, "title": "", "text": text}) + "\n"
            for name, text in (("cat", "a sleeping cat"), ("rain", "rain falls"), ("sum", "prime numbers"))
        )
    )
    (tmp_path / "queries.tsv").write_text("q1\tthe cat sleeps\nrain\tit rains\n")
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\tcat\t1\nrain\tsum\t1\n")
    return tmp_path


def test_eval_retrieval(retrieval, capsys, model):
    arguments = ["eval", "retrieval", "--data", str(retrieval), *model, "--recall-at", "1", "2"]
    assert main(arguments) == 0
    assert "Recall@2" in capsys.readouterr().out
    assert main([*arguments, "--ignore-identical-ids", "--json", "-"]) == 0
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert list(figures) == ["nDCG@10", "MRR@10", "Recall@1", "Recall@2", "MAP"]
    assert figures["Recall@1"] in (0.5, 1)
    assert figures["Recall@2"] == 1
    assert main([*arguments, "--split", "dev"]) == 2
    assert "has no qrels/dev.tsv" in capsys.readouterr().err


@pytest.fixture
def folders(canonical_folder, tmp_path):
    """The same model in two folders."""
    for name in ("first", "second"):
        (tmp_path / "models" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "models" / name).symlink_to(canonical_folder)
    return [str(tmp_path / "models" / name) for name in ("first", "second")]


def test_compare(sts, folders, capsys):
    arguments = ["eval", "compare", *folders, "--data", str(sts), "--tasks", "stsb", "--samples", "20"]
    assert main([*arguments, "--plot", str(sts / "picture.png"), "--json", str(sts / "figures.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["model", "first", "second"]
    assert (sts / "picture.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((sts / "figures.json").read_text())
    assert report["models"]["second"]["model"]["name"] == folders[1]
    assert report["models"]["first"]["figures"] == report["models"]["second"]["figures"]
    assert report["differences"]["second"]["average"]["value"] == 0


def test_compare_by_another_measure(retrieval, folders, capsys):
    arguments = ["eval", "compare", *folders, "--measure", "retrieval", "--data", str(retrieval)]
    assert main([*arguments, "--recall-at", "1", "--samples", "20", "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report["models"]["first"]["figures"]) == ["nDCG@10", "MRR@10", "Recall@1", "MAP"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["a", "b", "--model", "c"], "unrecognized arguments: --model c"),
        (["a", "b", "a"], "each model is compared once, got a b a"),
        (["a", "b", "--measure", "pairs"], "--measure pairs needs --data FILE"),
        (["a", "b", "--measure", "pairs", "--data", "x", "--recall-at", "5"], "--recall-at is not for --measure pairs"),
    ],
    ids=["model", "twice", "data", "option"],
)
def test_compare_refuses(options, message, the_error):
    assert main(["eval", "compare", *options]) == 2
    assert message in the_error()


@pytest.mark.parametrize("measure", ["sts", "retrieval", "compare", *FILES])
def test_help_shows_the_data_and_examples(measure, capsys):
    with pytest.raises(SystemExit):
        main(["eval", measure, "--help"])
    text = capsys.readouterr().out
    assert f"  minilm eval {measure} " in text
    assert "examples:" in text
    assert "<TAB>" in text or measure == "compare"
