"""The command as a whole: help, exit codes, one-line errors, and how it ends when it is interrupted."""

import json
import signal
import subprocess
import sysconfig
import time
from pathlib import Path

import pytest
import torch

import minilm
from minilm.cli import main

MINILM = Path(sysconfig.get_path("scripts")) / "minilm"


@pytest.mark.parametrize(
    "command",
    ["", "encode", "similarity", "search", "eval", "eval sts", "info", "weights"]
    + [f"weights {action}" for action in ("fetch", "convert", "export", "inspect", "verify")],
)
def test_help(capsys, command):
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: minilm {command}".rstrip())


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"minilm {minilm.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND (see minilm --help)"),
        (["bogus"], "invalid choice: 'bogus'"),
        (["similarity", "only one"], "the following arguments are required: B (see minilm similarity --help)"),
        (["search", "query"], "--corpus"),
        (["encode", "no-such-file.txt", "--model", "{}"], "No such file or directory: 'no-such-file.txt'"),
        (["encode", "--pooling", "median"], "invalid choice: 'median'"),
        (["info", "--device", "foo", "--model", "{}"], "device 'foo' can't be used here"),
        (["info", "--device", f"cuda:{torch.cuda.device_count()}", "--model", "{}"], "can't be used here"),
        (["encode", "--model", "./nowhere"], "'./nowhere' is neither an existing folder nor a model's name"),
        (["info", "--max-seq-length", "9999", "--model", "{}"], "max_seq_length must be at most 512"),
        (["eval", "sts", "--data", "nowhere", "--model", "{}"], "there is no folder nowhere"),
        (["eval", "sts", "--tasks", "sts99", "--model", "{}"], "unknown STS task sts99"),
        (["weights", "inspect", "./nowhere"], "'./nowhere' is neither"),
        (["weights", "export", "{}", "x", "--to", "onnx"], "invalid choice: 'onnx'"),
    ],
    ids=lambda value: "-".join(value).replace("/", "") if isinstance(value, list) else "",
)
def test_wrong_usage(the_error, canonical_folder, arguments, message):
    assert main([argument.format(canonical_folder) for argument in arguments]) == 2
    assert message in the_error()


def test_debug_shows_the_traceback(capsys):
    assert main(["weights", "inspect", "./nowhere", "--debug"]) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_interrupt_is_exit_code_130(capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("minilm.weights.sources.locate", interrupt)
    assert main(["weights", "fetch"]) == 130
    assert capsys.readouterr().err == ""


def start_encode(*arguments, model):
    """Start `minilm encode` as a process that can be interrupted, and feed it more than one block of lines."""
    process = subprocess.Popen(
        [MINILM, "encode", *arguments, *model],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    process.stdin.write(b"hello\n" * 1_100)
    process.stdin.flush()
    return process


def test_interrupted_process_leaves_no_output(tmp_path, model):
    with start_encode("-o", str(tmp_path / "out.jsonl"), model=model) as process:
        deadline = time.monotonic() + 60
        while not any(path.stat().st_size for path in tmp_path.iterdir()):  # rows are being written
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr.read() == b""
    assert list(tmp_path.iterdir()) == []


def test_reader_that_goes_away_ends_it_quietly(model):
    with start_encode(model=model) as process:
        assert json.loads(process.stdout.readline())["text"] == "hello"  # before the input has ended
        process.stdout.close()
        process.stdin.close()
        assert process.wait(30) == 141
        assert process.stderr.read() == b""
