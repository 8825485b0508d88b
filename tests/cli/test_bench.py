"""`minilm bench`: one small run, shown in every way; wrong usage; Ctrl-C."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minilm.bench.peers import PEERS
from minilm.bench.report import table
from minilm.cli import main
from minilm.kernels.backend import BACKENDS

SMALL = ["bench", "--device", "cpu", "--backend", "torch", "--peers", "none", "--seconds", "1", "--threads", "1"]


@pytest.fixture(scope="module")
def written(canonical_folder, tmp_path_factory):
    """Return the folder in which a run has left its report and picture."""
    folder = tmp_path_factory.mktemp("bench")
    files = ["--json", str(folder / "report.json"), "--plot", str(folder / "plot.png")]
    assert main([*SMALL, "--workloads", "tokens-16-64", "--model", str(canonical_folder), "--quiet", *files]) == 0
    return folder


@pytest.fixture
def report(written):
    return json.loads((written / "report.json").read_text(encoding="utf-8"))


def test_report_and_picture_are_written(written, report):
    assert sorted(path.name for path in written.iterdir()) == ["plot.png", "report.json"]
    assert (written / "plot.png").read_bytes().startswith(b"\x89PNG")
    (engine,) = report["engines"]
    assert (engine["name"], engine["status"], engine["threads"]) == ("torch", "ok", 1)
    assert [result["workload"] for result in report["results"]] == ["tokens-16-64"]


def test_an_earlier_run_is_shown_again(capsys, written, report, tmp_path):
    shown = ["bench", "--show", str(written / "report.json")]
    assert main([*shown, "--plot", str(tmp_path / "again.png")]) == 0
    assert capsys.readouterr().out == table(report) + "\n"
    assert (tmp_path / "again.png").exists()
    assert main([*shown, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == report


@pytest.mark.parametrize(
    ("role", "status", "code"), [("backend", "wrong", 1), ("backend", "failed", 1), ("peer", "failed", 0)]
)
def test_a_backend_that_fails_is_an_exit_code(report, tmp_path, role, status, code):
    report["engines"].append({**report["engines"][0], "name": "other", "role": role, "status": status, "error": "why"})
    (tmp_path / "changed.json").write_text(json.dumps(report), encoding="utf-8")
    assert main(["bench", "--show", str(tmp_path / "changed.json")]) == code


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threads", "1,two"], "--threads takes whole numbers joined by commas, got '1,two'"),
        (["--threads", "0"], "must be positive"),
        (["--peers", "onyx"], "unknown peer onyx; known: sentence-transformers"),
        (["--workloads", "texts,image-1"], "unknown workload 'image-1'"),
        (["--dtype", "int3"], "DTYPE one of float32"),
        (["--sts"], "sts needs data"),
        (["--show", "nowhere.json"], "nowhere.json"),
        (["--profile", "--plot", "x.png"], "--profile goes with neither --plot nor --show"),
    ],
)
def test_wrong_usage_is_told_at_once(options, message, the_error):
    assert main(["bench", "--quiet", "--device", "cpu", *options]) == 2
    assert message in the_error()


@pytest.mark.parametrize("content", ["{", "[]", '{"engines": []}'], ids=["no-json", "no-object", "no-report"])
def test_what_is_no_report_is_not_shown(tmp_path, content, the_error):
    (tmp_path / "x.json").write_text(content)
    assert main(["bench", "--show", str(tmp_path / "x.json")]) == 2
    assert "x.json is no" in the_error()


def test_without_matplotlib_nothing_is_measured_in_vain(monkeypatch, the_error):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*SMALL, "--plot", "x.png"]) == 2
    assert 'pip install "minilm[plots]"' in the_error()


def test_help_names_every_engine_and_every_kind_of_workload(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    text = capsys.readouterr().out
    named = re.search(r"backends \(--backend\): auto, (.*), package\.module", text)
    assert set(named[1].split(", ")) == set(BACKENDS)
    for word in (*PEERS, "text-mixed-192", "path/to/file.py:Class", "examples:"):
        assert word in text


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(not Path(f"/proc/self/task/{os.getpid()}/children").exists(), reason="no /proc to see processes in")
def test_ctrl_c_leaves_nothing_behind(tmp_path):
    code = f"import sys; from minilm.cli import main; sys.exit(main({SMALL!r}))"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    run = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, env=environment, text=True)
    try:
        while not (workers := children(run.pid)):
            assert run.poll() is None
            time.sleep(0.01)
        run.send_signal(signal.SIGINT)
        assert run.wait(20) == 130
        end = time.monotonic() + 10  # one that was being started sees by itself that nobody is there any more
        while any(map(is_running, workers)):
            assert time.monotonic() < end
            time.sleep(0.02)
        assert "Traceback" not in run.stderr.read()
        assert list(tmp_path.iterdir()) == []
    finally:
        run.kill()
        run.wait()
        run.stderr.close()
