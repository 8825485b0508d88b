"""The README tells the truth: its Python runs, its output is what comes out, and CI runs its test command."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from minilm.cli import main

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


def test_ci_runs_the_test_command_shown():
    assert ("sh", TEST_COMMAND + "\n") in BLOCKS
    assert TEST_COMMAND in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("folder", ["minilm", "kernels", "weights"])
def test_the_map_names_every_module(folder):
    tree = next(code for language, code in BLOCKS if not language and "torch_backend" in code)
    named = set(re.findall(r"\w+", tree))
    modules = {
        path.stem for path in (ROOT / folder).iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    missing = modules - named - {"__init__", "__pycache__"}
    assert not missing, f"the README's map does not mention {sorted(missing)}"
