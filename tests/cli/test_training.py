"""`minilm train` and `minilm distill`."""

import json
import sys

import pytest

import minilm
from minilm.cli import main
from minilm.config import MiniLMConfig
from minilm.encoder import SentenceEncoder
from minilm.model import MiniLM
from minilm.weights.checkpoint import Checkpoint

TEXTS = "a cat sat\na dog ran home\nthe sun is up\nit rains today\nbread is good\nwe sing songs\n"


@pytest.fixture
def recipe(canonical_folder, tmp_path):
    """Write a recipe that trains two small layers for two steps, learning from such layers if it names a teacher."""
    real = minilm.load(canonical_folder, device="cpu").checkpoint
    config = MiniLMConfig(hidden_size=32, num_layers=2, num_heads=2, feed_forward_size=32, hidden_dropout=0.2)
    for name in ("start", "teacher"):
        tensors = dict(MiniLM(config, "torch").state_dict())
        SentenceEncoder(Checkpoint(config, real.encoding, tensors, real.tokenizer_json)).save(tmp_path / name)
    (tmp_path / "texts.txt").write_text(TEXTS)

    def write(objective, name="own"):
        path = tmp_path / f"{name}.toml"
        path.write_text(f"""
            [model]
            name = "{tmp_path}/start"
            [objective]
            name = "{objective}"
            [data]
            folder = "{tmp_path}"
            batch_size = 3
            on_leak = "ignore"
            [[data.sources]]
            path = "texts.txt"
            columns = {{ text = "text" }}
            [teacher]
            names = ["{tmp_path}/teacher"]
            cache = "{tmp_path}/vectors"
            [training]
            output = "{tmp_path}/run"
            plot = false
        """)
        return str(path)

    return write


def test_train(recipe, tmp_path, capsys):
    assert main(["train", recipe("simcse"), "--set", "epochs=2", "--set", "temperature=0.1"]) == 0
    said = capsys.readouterr().out.split()
    assert said[said.index("model") + 1] == str(tmp_path / "run" / "model")
    assert said[said.index("steps") + 1] == "4"
    assert minilm.load(tmp_path / "run" / "model", device="cpu").encode("a cat").shape == (32,)
    ran = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert (ran["training"]["epochs"], ran["objective"]["temperature"]) == (2, 0.1)


def test_distill(recipe, tmp_path, capsys):
    path = recipe("mse")
    assert main(["distill", path, "--embed-only"]) == 0
    assert capsys.readouterr().out.split() == ["vectors", "computed", "6", "kept", "in", f"{tmp_path}/vectors"]
    assert not (tmp_path / "run").exists()
    assert main(["distill", path, "--output", str(tmp_path / "elsewhere")]) == 0
    assert (tmp_path / "elsewhere" / "model" / "model.safetensors").exists()


@pytest.fixture
def make_table(recipe, write_sts, tmp_path, capsys):
    """Return a function that makes a table of objectives, and gives the exit code and what was printed."""
    write_sts(
        tmp_path / "sts", [f"{a} {b}" for a in TEXTS.splitlines() for b in ("now", "here", "again", "often", "so")]
    )

    def make(*objectives, command="distill", options=("--seeds", "0,1")):
        changes = ["--set", f"evaluation.data={tmp_path}/sts", "--output", str(tmp_path / "table")]
        code = main([command, *(recipe(objective, objective) for objective in objectives), *changes, *options])
        return code, capsys.readouterr()

    return make


def test_table(make_table, tmp_path, monkeypatch):
    code, said = make_table("mse", "similarity")
    assert code == 0
    runs = ["mse-seed-0", "similarity-seed-0", "mse-seed-1", "similarity-seed-1"]
    lines = said.out.splitlines()
    assert [line.split()[3].rstrip(",") for line in lines[:4]] == runs
    assert [line.split()[0] for line in lines[5:9]] == ["recipe", "start", "mse", "similarity"]
    report = json.loads((tmp_path / "table" / "table.json").read_text())
    averages = [json.loads((tmp_path / "table" / run / "sts.json").read_text())["figures"]["average"] for run in runs]
    assert report["recipes"]["mse"]["mean"]["average"] == pytest.approx((averages[0] + averages[2]) / 2)
    cell = f"{(averages[1] + averages[3]) / 2:.2f} ± {abs(averages[1] - averages[3]) / 2**0.5:.2f}"
    assert cell in lines[8]
    assert cell in (tmp_path / "table" / "table.md").read_text()
    assert (tmp_path / "table" / "table.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("minilm.train.methods.train", None)  # again, it is only read
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, again = make_table("mse", "similarity")
    assert (code, again.out) == (0, said.out)
    assert "there is no picture of the table: plots need matplotlib" in again.err
    assert make_table("mse", options=("--seeds", "1"))[1].out.splitlines()[0].startswith("1 of 1: mse-seed-1")


def test_a_failing_run_leaves_the_others(make_table, tmp_path):
    code, said = make_table("hpd", "mse", options=())  # hpd wants 128 texts
    assert code == 1
    lines = said.out.splitlines()
    assert lines[:2] == ["1 of 2: hpd-seed-0, failed", lines[1]]
    assert lines[1].startswith("2 of 2: mse-seed-0, average ")
    reason = "hpd-seed-0 failed: ValueError: expected at least 128 teacher vectors"
    assert reason in lines[-1]
    assert f"minilm: warning: {reason}" in said.err
    assert json.loads((tmp_path / "table" / "table.json").read_text())["failures"].keys() == {"hpd-seed-0"}


def test_table_of_training(make_table):
    code, said = make_table("simcse", command="train", options=("--seeds", "5"))
    assert (code, said.out.splitlines()[0][:21]) == (0, "1 of 1: simcse-seed-5")


def test_embedding_for_several(make_table, tmp_path):
    code, said = make_table("mse", "similarity", options=("--embed-only",))
    assert (code, said.out.split()) == (0, ["vectors", "computed", "6", "kept", "in", f"{tmp_path}/vectors"])


def test_a_table_is_not_for_torchrun(make_table, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, said = make_table("mse", "similarity")
    assert code == 2
    assert "torchrun is for one run at a time" in said.err


def test_list(capsys):
    assert main(["train", "--list"]) == 0
    every = capsys.readouterr().out.split()
    assert main(["distill", "--list"]) == 0
    with_teacher = capsys.readouterr().out.split()
    assert {"simcse", "similarity"} <= set(every)
    ours = {"minilm-sts-start", "minilm-sts"}
    assert set(with_teacher) == {"mse", "hpd", "crd", "ibkd", "similarity"} | ours < set(every)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "a recipe is missing"),
        (["train", "simsce"], "there is no recipe 'simsce'; did you mean simcse"),
        (["train", "simcse", "--set", "epoch=1"], "no entry 'epoch'; did you mean training.epochs"),
        (["train", "none.toml"], "none.toml can't be read"),
        (["distill", "mse", "hpd"], "several runs need a folder to put theirs in: give --output DIR"),
        (["distill", "mse", "--seeds", "0,x", "--output", "o"], "numbers with commas between them, such as 0,1,2; got"),
        (["distill", "mse", "--seeds", "", "--output", "o"], "numbers with commas between them"),
        (["distill", "mse", "simcse", "--output", "o"], "'simcse' has no teacher to learn from; use minilm train"),
        (["distill", "simcse"], "'simcse' has no teacher to learn from; use minilm train"),
        (["train", "simcse", "--set", "folder=nowhere", "--set", "on_leak=ignore"], "nowhere/sentences"),
    ],
)
def test_errors(arguments, message, the_error):
    assert main(arguments) == 2
    assert message in the_error()
