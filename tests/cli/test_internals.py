"""`minilm explain`, `minilm internals` and `minilm study`: what they print and write, exit codes, messages."""

import json
import sys
from contextlib import contextmanager
from dataclasses import replace

import pytest

from minilm.cli import internals, main
from minilm.internals import check as checks
from minilm.internals import points_of
from minilm.internals.studies import heads, negation, word_order

A, B = "A man is eating.", "Someone eats."
FAST = ["--point", "layers.4.output"]


@pytest.fixture
def sts_data(tmp_path):
    """Eight pairs in the layout of the STS data."""
    pairs = [
        ("A man eats.", "Someone eats.", 4),
        ("It rains.", "The sun shines.", 1),
        ("A cat.", "A dog.", 2),
        ("Go!", "No.", 0),
    ]
    rows = [f"{score + k / 10}\t{first}\t{second}" for k in (0, 1) for first, second, score in pairs]
    (tmp_path / "stsb").mkdir()
    (tmp_path / "stsb" / "dev.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return tmp_path


def test_explain_prints_what_pushed_the_score(encoder, model, capsys):
    assert main(["explain", A, B, *FAST, *model]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    heading, _, tokens, *_ = out.splitlines()
    assert heading == f"cosine {float(encoder.similarity(*encoder.encode([A, B]))):.4f}"
    assert tokens.startswith(f"pairs of tokens (sum {heading.split()[1]}, residual ")
    assert "components of the model (sum " in out
    assert out.splitlines()[-1].endswith("layer 5")


def test_explain_json(model, capsys):
    assert main(["explain", A, B, *FAST, "--json", "--metric", "dot", *model]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["metric"], found["pair"]["point"]) == ("dot", "layers.4.output")
    assert sum(found["components"]["values"].values()) == pytest.approx(found["score"], abs=1e-6)
    assert sum(map(sum, found["pair"]["values"])) == pytest.approx(found["score"], abs=1e-4)


def test_explain_writes_page_and_pictures(model, tmp_path, capsys):
    page, folder = tmp_path / "report.html", tmp_path / "new" / "pictures"
    assert main(["explain", A, B, *FAST, "-o", str(page), "--pictures", str(folder), *model]) == 0
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    names = ["attention-first", "attention-second", "components", "layers", "tokens"]
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}.png" for name in names]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.iterdir())
    assert capsys.readouterr().out.startswith("cosine ")


def test_the_page_goes_to_stdout_alone(model, capsys):
    assert main(["explain", A, B, *FAST, "-o", "-", *model]) == 0
    out = capsys.readouterr().out
    assert out.startswith("<!doctype html>")
    assert out.endswith("</html>\n")


def test_an_earlier_page_stays_until_the_new_one_is_whole(model, tmp_path, monkeypatch, the_error):
    """And nothing half written is left beside it."""
    from minilm.internals.report import Explanation

    (page := tmp_path / "report.html").write_text("the one before")
    monkeypatch.setattr(Explanation, "page", lambda _: (_ for _ in ()).throw(OSError("no space left")))
    assert main(["explain", A, B, *FAST, "-o", str(page), *model]) == 2
    assert "no space left" in the_error()
    assert page.read_text() == "the one before"
    assert list(tmp_path.iterdir()) == [page]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([A], "the following arguments are required: B"),
        (
            [A, B, "-o", "report.png"],
            "-o writes a page, so its name must end in .html; --pictures writes PNG; got report.png",
        ),
        ([A, B, "-o", "report"], "its name must end in .html; got report"),
        ([A, B, "-o", "-", "--json"], "one of them"),
        ([A, B, "--metric", "euclidean"], "invalid choice: 'euclidean'"),
        (
            [A, B, "--point", "layers.7.output"],
            "no point of this model is called 'layers.7.output'; did you mean layers.",
        ),
        ([A, B, "--point", "pooled"], "attribution starts at a hidden state, one of embeddings, layers.0.output"),
        ([A, "word " * 200], "tokens"),
        ([A, B, *FAST, "-o", "nowhere/report.html"], "there is no folder"),
    ],
)
def test_explain_wrong_usage(model, tmp_path, monkeypatch, the_error, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["explain", *arguments, *model]) == 2
    assert message in the_error()
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_the_folder(model, tmp_path, the_error):
    (tmp_path / "taken").touch()
    assert main(["explain", A, B, "--pictures", str(tmp_path / "taken"), *model]) == 2
    assert "--pictures takes a folder" in the_error()


def test_pictures_without_matplotlib_fail_before_the_computing(tmp_path, monkeypatch, the_error):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["explain", A, B, "--pictures", str(tmp_path / "new"), "--model", "/nowhere"]) == 2
    assert 'pip install "minilm[plots]"' in the_error()
    assert not (tmp_path / "new").exists()


def test_points_are_listed_without_a_model(encoder, capsys, monkeypatch):
    monkeypatch.setattr("minilm.encoder.load", None)  # can't be called
    assert main(["internals", "points"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(points_of(encoder.config))
    assert len({line.index("[") for line in lines}) == 1


def test_points_by_name(model, capsys):
    names = ["blocks.3.attn.hook_q", "layers.[0-5].output"]
    assert main(["internals", "points", *names, "--json", *model]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found[3] == {"name": "layers.3.attention.query", "shape": ["L", "H", "D"], "what": "W_q·x + b_q"}
    assert {point["name"] for point in found} == {"layers.3.attention.query", *(f"layers.{k}.output" for k in range(6))}


def test_unknown_point(the_error):
    assert main(["internals", "points", "layers.3.atention.query"]) == 2
    assert "did you mean layers.3.attention.query" in the_error()


def test_check(model, capsys):
    pytest.importorskip("transformers")
    assert main(["internals", "check", *model]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    heading, *rows, summary = out.splitlines()
    assert heading.split() == ["error", "limit"]
    assert [row.rsplit(maxsplit=1)[-1] for row in rows] == ["ok"] * 9
    assert summary == "9 of 9 within their limits"


@pytest.fixture
def measured(monkeypatch):
    """Figures as they might be."""
    rows = [checks.Row("good", 1e-8, 1e-6), checks.Row("absent", None, 1e-6, "pip install transformers")]
    monkeypatch.setattr(checks, "check", lambda *_, **__: rows)
    return rows


def test_what_could_not_be_checked_is_said(measured, model, capsys):  # noqa: ARG001
    assert main(["internals", "check", *model]) == 0
    _, good, absent, summary = capsys.readouterr().out.splitlines()
    assert good.split() == ["good", "1.0e-08", "1.0e-06", "ok"]
    assert absent.endswith("not checked: pip install transformers")
    assert summary == "2 of 2 within their limits"


@pytest.mark.parametrize("error", [2e-6, float("nan")])
def test_exit_code_1_where_an_error_is_too_large(measured, model, capsys, error):
    measured.append(checks.Row("bad", error, 1e-6))
    assert main(["internals", "check", *model]) == 1
    *_, bad, summary = capsys.readouterr().out.splitlines()
    assert bad.endswith("FAILED")
    assert summary == "2 of 3 within their limits"
    assert main(["internals", "check", "--json", *model]) == 1
    assert [row["ok"] for row in json.loads(capsys.readouterr().out)] == [True, True, False]


def test_check_notices_what_is_wrong(encoder, own_encoder, monkeypatch):
    """Each figure is of the thing it is named after."""
    from minilm.internals import ablate

    with ablate(encoder, "layers.3.output", "zero", position=1):  # a sum is replaced: parts no longer make it up
        broken = {row.what: row.ok for row in checks._decomposition(encoder, ["A man eats.", "Someone eats."])}
        compared = list(checks._against_encode(encoder, ["A man eats."]))
    assert not any(broken.values())
    assert compared[0].ok  # encode was patched as well
    with ablate(encoder, "layers.2.feed_forward.output"):
        compared = list(checks._against_transformers(encoder, ["A man eats."]))
    assert not any(row.ok for row in compared)

    @contextmanager
    def leaking(encoder, *_):
        encoder.encoding = replace(encoder.encoding, pooling="cls")
        yield

    monkeypatch.setattr(checks, "patch", leaking)
    assert not any(row.ok for row in checks._restored(own_encoder, ["A man eats."]))


def test_check_without_transformers(encoder, monkeypatch):
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda _: None)
    rows = list(checks._against_transformers(encoder, ["A man eats."]))
    assert [(row.error, row.ok, row.reason) for row in rows] == [(None, True, "pip install transformers")] * 2


def test_study(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(negation, "SENTENCES", negation.SENTENCES[:3])
    assert main(["study", "negation", "--pictures", str(tmp_path / "pictures"), *model]) == 0
    out = capsys.readouterr().out
    assert out.startswith('What happens to "not"?\n')
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [
        "negation-components.png",
        "negation-layers.png",
    ]


def test_study_of_data(sts_data, model, capsys):
    assert main(["study", "heads", "--data", str(sts_data), *model]) == 0
    assert "Spearman x 100 of 8 pairs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nagation"], "invalid choice: 'nagation' (choose from "),
        (["negation", "--data", "sts/"], "the study negation has sentences of its own and takes no --data"),
        (["heads", "--data", "nowhere/"], "nowhere"),
    ],
)
def test_study_wrong_usage(model, the_error, arguments, message):
    assert main(["study", *arguments, *model]) == 2
    assert message in the_error()


def test_every_study_is_a_file():
    """The parser can't look, as it would import torch."""
    found = {module.__name__.rpartition(".")[2].replace("_", "-") for module in (negation, word_order, heads)}
    assert set(internals.STUDIES) == found


@pytest.mark.parametrize("command", ["explain", "internals", "internals points", "internals check", "study"])
def test_help(capsys, command):
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: minilm {command} ")
