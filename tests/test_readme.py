"""The README tells the truth: its Python runs, its output is what comes out, and CI runs its test command."""

import contextlib
import io
import itertools
import re
import shlex
from pathlib import Path

import pytest

from minilm.cli import main
from minilm.weights.export import export_modelscope
from minilm.weights.known import REFERENCE_MODEL
from minilm.weights.load import read_checkpoint

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
TEST_COMMAND = 'pip install -c constraints.txt -e ".[test]" && pytest'
INSTALL = "pip install -c constraints.txt . && "


def test_python_blocks_print_what_follows_them(canonical_folder):  # noqa: ARG001 - fetched before the blocks load it
    namespace: dict[str, object] = {}
    ran = 0
    for (language, code), (next_language, expected) in zip(BLOCKS, [*BLOCKS[1:], ("", "")], strict=True):
        if language != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "README.md", "exec"), namespace)
        assert next_language == "text", f"no output shown for:\n{code}"
        assert printed.getvalue() == expected
        ran += 1
    assert ran >= 4


def test_first_command_prints_the_table_shown(canonical_folder, capsys):  # noqa: ARG001
    (language, command), (_, expected) = BLOCKS[:2]
    assert language == "sh"
    assert command.startswith(INSTALL)
    program, *arguments = shlex.split(command.removeprefix(INSTALL).replace("\\\n", ""))
    assert program == "minilm"
    assert main(arguments) == 0
    assert capsys.readouterr().out == expected


@pytest.fixture(scope="module")
def modelscope_cache(weights_folder, tmp_path_factory):
    """A ModelScope cache that holds a folder in the layout, and under the name, of the reference model."""
    cache = tmp_path_factory.mktemp("modelscope")
    checkpoint = read_checkpoint(weights_folder).with_encoding(pooling="mean", normalize=False)
    export_modelscope(checkpoint, cache / "models" / REFERENCE_MODEL)
    return cache


def test_ci_runs_the_test_command_shown():
    assert ("sh", TEST_COMMAND + "\n") in BLOCKS
    assert TEST_COMMAND in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("folder", ["minilm", "kernels", "weights"])
def test_the_map_names_every_module_and_no_other(folder):
    tree = next(code for language, code in BLOCKS if not language and "torch_backend" in code)
    rows = tree[tree.index(f"{folder}/") :].split("\n", 1)
    rows = [rows[0], *itertools.takewhile(lambda row: row.startswith(" "), rows[1].split("\n"))]
    named = {name.rstrip("/") for row in rows for name in row[12:48].split()}
    modules = {
        path.stem for path in (ROOT / folder).iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert named == modules - {"__init__"}


def test_the_reference_models_example_runs(modelscope_cache, monkeypatch):
    """The block that needs the reference model's folder, on a folder in its place with weights we have."""
    monkeypatch.setenv("MODELSCOPE_CACHE", str(modelscope_cache))
    code = next(code for language, code in BLOCKS if language == "py" and "pipeline(" in code)
    namespace: dict[str, object] = {}
    statements, end, call = code.partition('-sts")\n')
    exec(compile(statements + end, "README.md", "exec"), namespace)
    result = eval(compile(call.strip(), "README.md", "eval"), namespace)
    assert result["text_embedding"].shape == (5, 384)
    assert result["scores"] == pytest.approx([25.30560, 4.58426, 13.40046, 16.68110], abs=1e-4)  # ModelScope's own
    assert namespace["embed"].encoder.encoding.pooling == "mean"


@pytest.fixture
def own_attention(tmp_path, monkeypatch, canonical_folder):  # noqa: ARG001 - fetched before the commands load it
    """The worked example's file, in the current folder."""
    code = next(code for language, code in BLOCKS if language == "py" and "OwnAttention" in code)
    (tmp_path / "own_attention.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    return code


def commands(program):
    """Each shown command line of a program's subcommand, as its arguments."""
    lines = (code.replace("\\\n", "").strip() for language, code in BLOCKS if language == "sh")
    return [shlex.split(line)[1:] for line in lines if line.startswith(f"minilm {program}")]


def test_the_worked_example_proves_itself(own_attention, capsys):
    assert len(own_attention.splitlines()) <= 30
    (command,) = commands("parity")
    assert main([*command, "--device", "cpu", "--dtype", "float32", "--quick"]) == 0
    assert "within their limits" in capsys.readouterr().out


def test_the_worked_example_is_measured(own_attention, capsys):  # noqa: ARG001
    command = next(command for command in commands("bench") if "own_attention.py:OwnAttention" in " ".join(command))
    shorter = {"--seconds": "2", "--workloads": "text-short-1"}
    arguments = [shorter.get(previous, word) for previous, word in zip(["", *command[:-1]], command, strict=True)]
    assert main([*arguments, "--device", "cpu"]) == 0
    assert "own" in capsys.readouterr().out
