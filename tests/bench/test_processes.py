"""Workers answer, and end: when asked to, when they hang, and when the one who started them is gone."""

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from minilm.bench.processes import Worker, WorkerError

STARTER = """
import sys, time
from pathlib import Path
from minilm.bench.processes import Worker
worker = Worker("w", Path(sys.argv[1]))
if sys.argv[2] == "at work":
    worker.send("describe", device="cpu")
"""


@pytest.fixture
def worker(tmp_path):
    with closing(Worker("w", tmp_path / "log", threads=1)) as made:
        yield made


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def ends(pid: int, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while is_running(pid):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc to see processes in")


def test_a_worker_answers_until_it_is_closed(worker):
    machine = worker.ask("describe", 60, device="cpu")
    assert (machine["device"], machine["threads"]) == ("cpu", 1)
    assert machine["machine"]["cpus"] >= 1
    with pytest.raises(WorkerError, match="KeyError: 'dance'"):
        worker.ask("dance", 60)
    assert worker.ask("describe", 60, device="cpu")["device"] == "cpu"
    worker.close()
    worker.close()
    with pytest.raises(WorkerError, match="the process was ended"):
        worker.send("describe", device="cpu")


def test_an_error_keeps_its_whole_message(worker):
    with pytest.raises(WorkerError) as caught:
        worker.ask("describe", 60, device="cuda:99")
    assert str(caught.value).startswith("ValueError: device 'cuda:99' can't be used")
    assert caught.value.message.startswith("device 'cuda:99'")


@needs_proc
def test_a_worker_that_gives_no_answer_is_ended(worker):
    os.kill(worker.pid, signal.SIGSTOP)
    worker.send("describe", device="cpu")
    with pytest.raises(WorkerError, match="no answer in 0 s"):
        worker.receive(0.1)
    assert not is_running(worker.pid)


def test_a_worker_that_dies_says_how(worker):
    with pytest.raises(WorkerError, match="KeyError"):
        worker.ask("dance", 60)
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match="killed by SIGKILL: KeyError: 'dance'"):
        worker.receive(60)


@needs_proc
@pytest.mark.parametrize(
    ("doing", "how"),
    [("idle", signal.SIGINT), ("idle", signal.SIGTERM), ("at work", signal.SIGKILL)],
    ids=["idle-SIGINT", "idle-SIGTERM", "at-work-SIGKILL"],
)
def test_no_worker_outlives_the_one_who_started_it(tmp_path, doing, how):
    code = STARTER + "print(worker.pid, flush=True)\ntime.sleep(60)"
    starter = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "log"), doing],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        pid = int(starter.stdout.readline())
        time.sleep(0.5 if doing == "at work" else 0)
        assert is_running(pid)
        starter.send_signal(how)
        starter.wait(10)
        assert ends(pid)
    finally:
        starter.kill()
        starter.wait()
        starter.stdout.close()


@needs_proc
def test_what_a_worker_started_ends_with_it(worker, tmp_path):
    """Compilers start processes of their own."""
    (tmp_path / "starts.py").write_text(
        "import subprocess, sys\n"
        "from minilm.kernels.torch_backend import TorchBackend\n"
        "class Starts(TorchBackend):\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "    def describe(self): return {'child': self.child.pid}\n"
    )
    choice = {"label": "x", "role": "backend", "name": f"{tmp_path}/starts.py:Starts", "dtype": "float32"}
    (tmp_path / "plan.json").write_text('{"model": null}')
    (tmp_path / "workloads.json").write_text("[]")
    child = worker.ask("load", 60, **choice, device="cpu", scratch=str(tmp_path))["facts"]["child"]
    assert is_running(child)
    worker.close(grace=0)
    assert ends(child)
