"""A run that is killed, again and again, ends as one that is not."""

import os
import random
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch

from minilm.train.checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from minilm.train.distillation import CRD
from minilm.train.log import read_log
from minilm.train.settings import TrainingSettings
from minilm.train.trainer import Trainer
from minilm.weights.files import read_safetensors

SCENARIO = "import sys; sys.path.insert(0, sys.argv[1]); import test_checkpoints as t; t.scenario(sys.argv[2])"


def train(folder, seconds):
    """Train with all that has a state, waiting before each batch."""
    from conftest import TEXTS, Rows, tiny_encoder

    class Slow(Rows):
        def __iter__(self):
            for batch in super().__iter__():
                time.sleep(seconds)
                yield batch

    torch.manual_seed(0)
    objective = CRD(32, 8, 16, bank_size=9)
    settings = TrainingSettings(
        str(folder),
        max_steps=40,
        learning_rate=1e-3,
        schedule="cosine",
        ema=0.9,
        accumulation=2,
        piece_tokens=40,
        evaluate_every=7,
        checkpoint_every=5,
        log_every=1,
        plot=False,
    )
    Trainer(tiny_encoder(), objective, Slow(), settings, lambda e: float(e.encode(TEXTS[:9])[:, 3].sum())).run()


def start(folder, seconds):
    """Train in a process of its own, and return its number."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            train(folder, seconds)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return process


def scenario(parent):
    """Train once without interruption, and once killed three times; in a process that has computed nothing itself."""
    whole, killed = Path(parent) / "whole", Path(parent) / "killed"
    assert os.waitpid(start(whole, 0), 0)[1] == 0
    for step in sorted(random.sample(range(6, 32), 3)):
        process, delay = start(killed, 0.01), random.uniform(0, 0.3)
        while not (killed / "log.csv").exists() or all(row["step"] < step for row in read_log(killed / "log.csv")):
            assert os.waitpid(process, os.WNOHANG) == (0, 0), "it ended before it could be killed"
            time.sleep(0.005)
        time.sleep(delay)
        os.kill(process, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL
        resumed_from = torch.load(killed / "checkpoint.pt")["progress"][0]
        print(f"killed {delay:.3f} s after step {step}, to go on from step {resumed_from}", flush=True)
        assert 0 < resumed_from < 40
    assert os.waitpid(start(killed, 0), 0)[1] == 0


def figures(folder):
    """Return what the log says, but for times."""
    lines = [line.split(",") for line in (folder / "log.csv").read_text().splitlines()]
    return [(*line[:5], line[6]) for line in lines]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_killed_and_resumed_it_ends_bit_identical(tmp_path):
    command = [sys.executable, "-c", SCENARIO, str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    moments = done.stdout
    print(moments)
    assert done.returncode == 0, moments + done.stderr
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    (tensors, said), (others, theirs) = (read_safetensors(f / "model" / "model.safetensors") for f in (whole, killed))
    assert said == theirs, moments
    assert not [name for name, tensor in tensors.items() if not torch.equal(tensor, others[name])], moments
    assert figures(whole) == figures(killed), moments
    states = [torch.load(folder / "checkpoint.pt") for folder in (whole, killed)]
    for part in ("encoder", "objective"):
        assert all(torch.equal(states[0][part][name], tensor) for name, tensor in states[1][part].items()), moments
    moments_of = [state["optimizer"]["state"] for state in states]
    assert all(torch.equal(moments_of[0][i][k], v) for i, entry in moments_of[1].items() for k, v in entry.items())
    assert sorted(path.name for path in killed.iterdir()) == ["checkpoint.pt", "log.csv", "model"]


def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"settings": {}, "step": 1})
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(path, {"settings": {}, "step": 2})
    assert load_checkpoint(path, {})["step"] == 1


def test_other_settings_are_named(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"settings": {"seed": 1, "epochs": 2.0}})
    with pytest.raises(CheckpointError, match=r"seed was 1 and is 2\. Set them back"):
        load_checkpoint(path, {"seed": 2, "epochs": 2.0})


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", None])
def test_what_is_no_checkpoint(content, tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content) if content is not None else torch.save({"format": 0}, path)
    with pytest.raises(CheckpointError, match="delete it to begin anew"):
        load_checkpoint(path, {})


def test_no_code_of_a_checkpoint_is_run(tmp_path):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({"format": 1, "settings": Harmful()}, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="can't be read"):
        load_checkpoint(tmp_path / "checkpoint.pt", {})
    assert not (tmp_path / "made").exists()


def test_none_there(tmp_path):
    assert load_checkpoint(tmp_path / "checkpoint.pt", {}) is None
