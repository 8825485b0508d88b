"""`minilm kernels report`: its table and exit codes, and what it says where nothing can be compiled."""

import os
import subprocess
import sys

import pytest

from minilm.cli import kernels, main

KERNELS = """
import torch
import triton
import triton.language as tl

from minilm.kernels.launch import Launch


@triton.jit
def copy(x, out, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), tl.load(x + tl.arange(0, BLOCK)))


def examples(dtype, hardware):
    x = torch.empty(16, dtype=dtype)
    sizes = {"a small copy": 64, "a copy of 100": 100}
    return {name: Launch(copy, (1,), {"x": x, "out": x, "BLOCK": size}) for name, size in sizes.items()}
"""

pytest.importorskip("triton", reason="Triton has no release for this system")


@pytest.fixture(autouse=True)
def own_kernels(tmp_path, monkeypatch):
    """A file of someone's own, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "copies.py").write_text(KERNELS, encoding="utf-8")


def run(*arguments, before="", **environment):
    """Run `minilm` in a process of its own, where `before` has been run."""
    code = f"{before}\nimport sys, minilm.cli\nif __name__ == '__main__': sys.exit(minilm.cli.main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_table():
    done = run("kernels", "report", "--kernel", "copies.py", "--hardware", "sm_90", "sm_80", "--dtype", "float16")
    assert done.stderr == ""
    assert done.returncode == 1  # one of them can't be compiled
    heading, small, *rows, large, failed, failed_too, summary = done.stdout.splitlines()
    assert heading.split()[:3] == ["hardware", "dtype", "tile"]
    assert (small, large) == ("copies.py: a small copy", "copies.py: a copy of 100")
    assert [row.split()[:2] for row in rows] == [["sm_90", "float16"], ["sm_80", "float16"]]
    assert all(row.endswith(" ok") for row in rows)
    for row in (failed, failed_too):
        assert "FAILED: CompilationError: " in row
        assert row.endswith("arange's range must be a power of 2")
    assert summary.startswith("2 of 4 compile without spills, within the shared memory (triton 3.")


def test_exit_code_0_where_all_compile():
    done = run("kernels", "report", "--kernel", "layer_norm", "--hardware", "sm_80", "--dtype", "float16", "--quiet")
    assert (done.returncode, done.stderr) == (0, "")
    assert "layer_norm: residual + LayerNorm, backward" in done.stdout.splitlines()


def test_interpreted_kernels_are_not_compiled():
    done = run("kernels", "report", TRITON_INTERPRET="1")
    expected = "minilm: error: kernels are interpreted, not compiled, under TRITON_INTERPRET=1: unset it\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)


def test_without_triton():
    done = run("kernels", "report", before="import sys; sys.modules['triton'] = None")
    expected = 'minilm: error: kernels are compiled by Triton: pip install "minilm[triton]"\n'
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)


def test_choices_are_those_of_the_report():
    """Which the parser can't import, as it would import torch."""
    from minilm.kernels import report

    assert (tuple(report.HARDWARE), tuple(report.DTYPES)) == (kernels.HARDWARE, kernels.DTYPES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hardware", "sm_75"], "invalid choice: 'sm_75' (choose from "),
        (["--dtype", "int8"], "invalid choice: 'int8' (choose from "),
        (["--kernel"], "--kernel: expected at least one argument"),
    ],
    ids=["hardware", "dtype", "kernel"],
)
def test_wrong_usage(the_error, options, message):
    assert main(["kernels", "report", *options]) == 2
    assert message in the_error()


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("softmax", "unknown kernel 'softmax': expected "),
        ("nowhere.py", "No such file or directory"),
        ("empty.py", "empty.py has no function examples(dtype, hardware)"),
    ],
)
def test_kernels_that_are_none(tmp_path, kernel, message):
    (tmp_path / "empty.py").touch()
    done = run("kernels", "report", "--kernel", kernel)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("minilm: error: ")
    assert message in done.stderr


@pytest.mark.parametrize("command", ["kernels", "kernels report"])
def test_help(capsys, command):
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: minilm {command} ")
