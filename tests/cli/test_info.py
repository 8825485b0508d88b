"""`minilm info`, with a model and without."""

import json

import minilm
from minilm.cli import main


def test_info(capsys, model, encoder):
    assert main(["info", "--json", *model, "--pooling", "cls", "--max-seq-length", "64", "--device", "cpu"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["minilm"] == minilm.__version__
    assert (report["pooling"], report["max_seq_length"], report["device"]) == ("cls", 64, "cpu")
    assert report["config"]["hidden_size"] == 384
    assert main(["info", *model]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["fingerprint", encoder.fingerprint()] in [line.split() for line in lines]


def test_info_without_a_model(capsys):
    assert main(["info", "--model", "./nowhere", "--json"]) == 2
    output = capsys.readouterr()
    assert "torch" in json.loads(output.out)
    assert "'./nowhere' is neither" in output.err
