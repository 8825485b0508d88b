"""`minilm train` and `minilm distill`."""

import json

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

    def write(objective):
        path = tmp_path / "own.toml"
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


def test_list(capsys):
    assert main(["train", "--list"]) == 0
    every = capsys.readouterr().out.split()
    assert main(["distill", "--list"]) == 0
    with_teacher = capsys.readouterr().out.split()
    assert {"simcse", "similarity"} <= set(every)
    assert set(with_teacher) == {"mse", "hpd", "crd", "ibkd", "similarity"} < set(every)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "a recipe is missing"),
        (["train", "simsce"], "there is no recipe 'simsce'; did you mean simcse"),
        (["train", "simcse", "--set", "epoch=1"], "no entry 'epoch'; did you mean training.epochs"),
        (["train", "none.toml"], "none.toml can't be read"),
        (["distill", "simcse"], "'simcse' has no teacher to learn from; use minilm train"),
        (["train", "simcse", "--set", "folder=nowhere", "--set", "on_leak=ignore"], "nowhere/sentences"),
    ],
)
def test_errors(arguments, message, the_error):
    assert main(arguments) == 2
    assert message in the_error()
