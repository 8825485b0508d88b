"""What a run tells: log, progress bar, picture."""

import sys

import pytest

from minilm.train.log import RunLog, plot_log, read_log
from minilm.train.objectives import Contrastive
from minilm.train.settings import TrainingSettings
from minilm.train.trainer import Trainer


def test_progress_bar_shows_loss_and_throughput(tiny_encoder, make_rows, tmp_path, capsys):
    settings = TrainingSettings(str(tmp_path / "bar"), epochs=2, log_every=1, plot=False)
    Trainer(tiny_encoder(), Contrastive(0.1, hard_negatives=False), make_rows(), settings).run(show_progress_bar=True)
    shown = capsys.readouterr().err
    assert "10/10" in shown
    assert "loss " in shown
    assert "texts/s" in shown


def test_a_resumed_log_drops_what_comes_after(tmp_path):
    log = RunLog(tmp_path)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": step / 7, "seconds": step})
        log.write({"step": step, "score": 80})
    with log.path.open("a") as file:
        file.write("4,0,0.")  # cut short
    resumed = RunLog(tmp_path, step=2)
    assert resumed.seconds == 2
    resumed.write({"step": 3, "loss": 0.25})
    losses = [(row["step"], row["loss"]) for row in read_log(log.path) if row["score"] != 80]
    assert losses == [(1, 1 / 7), (2, 2 / 7), (3, 0.25)]


def test_the_picture(train):
    scores = iter([10.0, 20.0, 40.0, 30.0])
    _, result = train(epochs=3, evaluate_every=5, evaluate=lambda _: next(scores), plot=True)
    picture = result.model.parent / "log.png"
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize(("module", "extra"), [("matplotlib", "plots"), ("torch.utils.tensorboard", "train")])
def test_extras_are_named(module, extra, tmp_path, monkeypatch):
    log = RunLog(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"minilm\[{extra}\]"):
        plot_log(log.path, tmp_path / "x.png") if extra == "plots" else RunLog(tmp_path, tensorboard=True)


def test_a_run_ends_well_without_matplotlib(train, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    _, result = train(epochs=1, plot=True)
    assert result.steps == 5
    assert "there is no picture of the log" in caplog.text


def test_tensorboard_gets_the_same_figures(train, monkeypatch, tmp_path):
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    fake = type(sys)("torch.utils.tensorboard")
    fake.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    train(epochs=1, tensorboard=True)
    log = read_log(tmp_path / "run" / "log.csv")
    assert written[0] == (str(tmp_path / "run" / "tensorboard"), 0)
    assert [entry[1] for entry in written if entry[0] == "loss"] == [row["loss"] for row in log]
    assert written[-1] == "closed"
