"""`minilm similarity` and `minilm search`: the scores are the library's, as a table and as JSON."""

import json

import numpy as np
import pytest

from minilm.cli import main


@pytest.mark.parametrize("metric", [None, "dot", "euclidean", "manhattan"])
def test_similarity(capsys, model, encoder, metric):
    texts = ["a cat", "two\ncats", "a plane"]
    options = model if metric is None else [*model, "--metric", metric]
    expected = encoder.similarity(encoder.encode(texts), encoder.encode(texts), metric)
    assert main(["similarity", *texts, *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split(maxsplit=1) == [metric or "cosine", "a cat"]
    assert [line.split(maxsplit=1) for line in lines[1:]] == [
        [f"{expected[0, 1]:.4f}", "two cats"],
        [f"{expected[0, 2]:.4f}", "a plane"],
    ]
    assert main(["similarity", *texts, *options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["text"] == "a cat"
    assert [other["text"] for other in report["others"]] == texts[1:]
    assert [other["score"] for other in report["others"]] == pytest.approx(expected[0, 1:].tolist(), abs=1e-6)


def test_similarity_of_all(capsys, model, encoder):
    texts = ["a cat", "two cats", "a plane"]
    vectors = encoder.encode(texts)
    assert main(["similarity", "--all", *texts, *model]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["cosine", "1", "2", "3"]
    assert [line.split()[1:4] for line in lines] == [[f"{x:.4f}" for x in row] for row in vectors @ vectors.T]
    assert [line.split(maxsplit=4)[4] for line in lines] == texts
    assert main(["similarity", "--all", "--json", *texts, *model]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["texts"] == texts
    assert np.allclose(report["scores"], vectors @ vectors.T, atol=1e-6)


def test_search(tmp_path, capsys, model):
    (tmp_path / "corpus.txt").write_text("Boil the egg.\n\nA plane lands.\nEggs in boiling water.\n")
    arguments = ["search", "how to boil eggs", "--corpus", str(tmp_path / "corpus.txt"), "--top-k", "2", *model]
    assert main(arguments) == 0
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split(maxsplit=2) == ["cosine", "row", "how to boil eggs"]
    assert {tuple(line.split(maxsplit=2)[1:]) for line in (first, second)} == {
        ("1", "Boil the egg."),
        ("4", "Eggs in boiling water."),
    }
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {hit["corpus_id"] for hit in report["hits"]} == {0, 3}
    assert report["hits"][0]["score"] >= report["hits"][1]["score"]


def test_search_counts_blank_rows_of_csv(tmp_path, capsys, model):
    (tmp_path / "corpus.csv").write_text("text\nA plane lands.\n\nBoil the egg.\n")
    arguments = ["search", "how to boil eggs", "--corpus", str(tmp_path / "corpus.csv"), "--top-k", "1", *model]
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[1].split(maxsplit=2)[1:] == ["3", "Boil the egg."]


def test_search_in_nothing(tmp_path, the_error, model):
    (tmp_path / "corpus.csv").write_text("text\n")
    assert main(["search", "x", "--corpus", str(tmp_path / "corpus.csv"), *model]) == 2
    assert "corpus.csv has no text" in the_error()
