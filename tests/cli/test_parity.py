"""`minilm parity`."""

import json

import pytest

from minilm.cli import main

OWN = """
import torch

from minilm.kernels.torch_backend import TorchBackend


class Right(TorchBackend):
    name = "right"

    def gelu(self, x):
        return x * 0.5 * (1 + (x / 2**0.5).erf())


class Wrong(TorchBackend):
    name = "wrong"

    def gelu(self, x):
        return x * torch.sigmoid(1.702 * x)
"""


@pytest.fixture
def own(tmp_path, canonical_folder):  # noqa: ARG001 - fetched before the command loads it
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


def test_a_right_backend(own, capsys):
    assert main(["parity", "--backend", f"{own}:Right", "--device", "cpu", "--dtype", "float32", "--quick"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["operation", "dtype", "worst", "case", "error", "plain", "torch", "limit"]
    assert any(line.startswith("attention, gradients") and line.endswith("ok") for line in lines)
    assert lines[-1].endswith("within their limits")


def test_a_wrong_backend(own, capsys):
    options = ["--device", "cpu", "--dtype", "float32", "--quick", "--json"]
    assert main(["parity", "--backend", f"{own}:Wrong", *options]) == 1
    rows = {row["operation"]: row for row in json.loads(capsys.readouterr().out)}
    assert not rows["gelu"]["ok"]
    assert rows["gelu"]["error"] > rows["gelu"]["limit"]
    assert rows["attention"]["ok"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backend", "nope"], "unknown backend 'nope'"),
        (["--dtype", "int3"], "dtype must be a floating point type such as 'float32' or 'bfloat16', got 'int3'"),
    ],
)
def test_wrong_usage(options, message, own, capsys):  # noqa: ARG001
    assert main(["parity", "--device", "cpu", *options]) == 2
    assert message in capsys.readouterr().err
