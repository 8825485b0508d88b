"""`minilm eval`: figures as a table and as JSON."""

import json

import pytest

from minilm.cli import main


def test_eval_sts(tmp_path, capsys, model):
    (tmp_path / "stsb").mkdir()
    (tmp_path / "stsb" / "test.tsv").write_text("5\ta cat\ta cat\n3\ta cat\ta dog\n0\ta cat\tprime numbers\n")
    arguments = ["eval", "sts", "--data", str(tmp_path), "--tasks", "stsb", *model]
    assert main([*arguments, "--json", str(tmp_path / "figures.json")]) == 0
    table = capsys.readouterr().out
    assert table.splitlines()[1].split()[:3] == ["stsb", "3", "100.00"]
    assert main([*arguments, "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "figures.json").read_text())
    assert report["tasks"]["stsb"]["spearman"] == pytest.approx(100)
    assert report["model"]["max_seq_length"] == 128
    assert main([*arguments[:4], *model]) == 2
    assert "lacks sts12/*.tsv, sts13/*.tsv" in capsys.readouterr().err
