"""`minilm info`, with a model and without."""

import json
from dataclasses import replace

import torch

import minilm
from minilm.cli import main
from minilm.weights.load import read_checkpoint


def test_info(capsys, model, encoder):
    assert main(["info", "--json", *model, "--pooling", "cls", "--max-seq-length", "64", "--device", "cpu"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["minilm"] == minilm.__version__
    assert (report["pooling"], report["max_seq_length"], report["device"]) == ("cls", 64, "cpu")
    assert report["config"]["hidden_size"] == 384
    assert main(["info", *model]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["fingerprint", encoder.fingerprint()] in [line.split() for line in lines]


def test_info_tells_where_a_model_came_from(capsys, sources, canonical_folder):
    shipped = sources.models / "own"
    checkpoint = read_checkpoint(canonical_folder)
    provenance = {"source": "trained from a start", "licence": "Apache-2.0", "training": {"step": 750}}
    tensors = {**checkpoint.tensors, "output_layer.weight": torch.eye(384)[:100]}
    replace(checkpoint, tensors=tensors, provenance=provenance, calibration=None, golden=None).save(shipped)
    assert main(["info", "--model", "own", "--json", "--device", "cpu"]) == 0
    report = json.loads(capsys.readouterr().out)
    found = (report["model"], report["folder"], report["source"], report["training"], report["dimensions"])
    assert found == ("own", str(shipped), "trained from a start", {"step": 750}, 100)
    assert report["shipped models"] == ["own"]
    assert main(["weights", "inspect", "own", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["folder"], report["dimensions"]) == (str(shipped), 100)
    assert main(["weights", "verify", "own", "--device", "cpu"]) == 0
    assert "ok   fingerprint" in capsys.readouterr().out
    assert main(["similarity", "a cat", "a dog", "--model", "own"]) == 0
    assert main(["weights", "fetch", "own"]) == 0
    assert capsys.readouterr().out.endswith(f"{shipped}\n")


def test_info_without_a_model(capsys):
    assert main(["info", "--model", "./nowhere", "--json"]) == 2
    output = capsys.readouterr()
    assert "torch" in json.loads(output.out)
    assert "'./nowhere' is neither" in output.err
