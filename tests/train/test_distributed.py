"""Two processes, each with half of every batch, against one process with all of it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minilm.train import distributed
from minilm.train.log import read_log

HERE = Path(__file__).parent
SCRIPT = """
import os, sys, warnings
warnings.simplefilter("error")
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from conftest import Rows, tiny_encoder
from minilm.train import distributed
from minilm.train.distillation import IBKD
from minilm.train.gradients import Gradients
from minilm.train.objectives import Contrastive
from minilm.train.settings import TrainingSettings
from minilm.train.trainer import Trainer

def train(name, objective, piece_tokens):
    output = f"{sys.argv[2]}/{name}"
    settings = TrainingSettings(
        output, max_steps=4, learning_rate=1e-3, piece_tokens=piece_tokens, evaluate_every=2, log_every=1, plot=False
    )
    data = Rows(batch_size=7, negatives=2)  # shares of 3 and 4 rows
    encoder = tiny_encoder(dropout=0.0)
    gradients = Gradients(encoder, objective.eval(), settings)
    loss = gradients.add(next(iter(data)), 0)
    modules = encoder.model, objective
    distributed.reduce_gradients(*(list(module.parameters()) for module in modules))
    found = {f"{type(m).__name__}.{name}": p.grad.clone() for m in modules for name, p in m.named_parameters()}
    data.load_state_dict({"position": 0})
    Trainer(encoder, objective, data, settings, evaluate=lambda encoder: float(data.position)).run()
    state = {**encoder.model.state_dict(), **{f"objective.{k}": v for k, v in objective.state_dict().items()}}
    torch.save({"gradients": found, "loss": loss, "state": state}, f"{output}/rank{distributed.rank()}.pt")

torch.manual_seed(0)
with distributed.process_group("cpu"):
    train("contrastive", Contrastive(0.1), 0)
    train("pieces", Contrastive(0.1), 12)
    train("ibkd", IBKD(32, 8, bank_size=4, early_state="layer.1"), 0)
"""


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def train(folder, processes):
    """Train in so many processes, as torchrun would start them."""
    folder.mkdir()
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1"}
    running = []
    for rank in range(processes):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)} if processes > 1 else {}
        arguments = [sys.executable, "-c", SCRIPT, str(HERE), str(folder)]
        running.append(subprocess.Popen(arguments, env={**os.environ, **shared, **own}))
    assert [process.wait(120) for process in running] == [0] * processes


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return a function that gives what a run ended with, in one process and in each of two, and both logs."""
    folders = [tmp_path_factory.mktemp("runs") / name for name in ("one", "two")]
    for processes, folder in enumerate(folders, start=1):
        train(folder, processes)

    def read(name):
        one, *two = (
            torch.load(f / name / f"rank{r}.pt")
            for f, r in zip((folders[0], folders[1], folders[1]), (0, 0, 1), strict=True)
        )
        return one, two, [read_log(folder / name / "log.csv") for folder in folders]

    return read


@pytest.mark.parametrize("name", ["contrastive", "pieces", "ibkd"])
def test_two_processes_equal_one(name, runs):
    """Adam makes much of rounding where a gradient is 0 but for it: so it is gradients and losses that are compared."""
    one, both, logs = runs(name)
    assert {k for k, tensor in both[0]["state"].items() if not torch.equal(tensor, both[1]["state"][k])} == set()
    assert float(both[0]["loss"]) == pytest.approx(float(one["loss"]), rel=1e-6)
    for owner in ("MiniLM", "IBKD"):
        truth = {name: gradient for name, gradient in one["gradients"].items() if name.startswith(owner)}
        scale = max((float(gradient.abs().max()) for gradient in truth.values()), default=1.0)
        worst = max((float((both[0]["gradients"][k] - v).abs().max()) / scale for k, v in truth.items()), default=0.0)
        print(f"gradients of {owner}, two processes against one: {worst:.1e} (limit 2e-6)")
        assert worst <= 2e-6
    assert [row["step"] for row in logs[0]] == [row["step"] for row in logs[1]] == [0, 1, 2, 2, 3, 4, 4]
    for figure in ("loss", "gradient_norm", "learning_rate"):
        values = [[row[figure] for row in rows] for rows in logs]
        assert values[1] == pytest.approx(values[0], rel=1e-4, nan_ok=True)


def test_shares_cover_a_batch(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    for rows in (3, 4, 5, 7, 12):
        parts = [distributed.share(rows, process) for process in range(3)]
        assert [row for part in parts for row in range(rows)[part]] == list(range(rows))
        assert max(p.stop - p.start for p in parts) - min(p.stop - p.start for p in parts) <= 1


def test_alone_there_is_nothing_to_do():
    own = torch.ones(3, 2, requires_grad=True)
    assert distributed.gather(own, 3) is own
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
