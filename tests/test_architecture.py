"""The shape of the repository: which way imports point, how long files are, what stands at the top."""

import ast
import re
import subprocess
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {".ci", "kernels", "minilm", "tests", "weights"}
FILES = {".gitignore", "LICENSE", "README.md", "constraints.txt", "pyproject.toml"}

LAYERS = [  # imports point up this list; a module belongs to the first pattern that matches its name
    r"minilm(\.config)?",
    r"minilm\.(kernels|weights)(\..*)?",
    r"minilm\.(?!bench|cli|evaluate|internals|parity|pipelines|train|verify)\w+",  # the encoder and what it is made of
    r"minilm\..*",
]


def module_name(path: Path) -> str:
    """Return the name a file is imported by: `kernels/x.py` is `minilm.kernels.x`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "minilm" else ("minilm", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer(module: str) -> int:
    return next(index for index, pattern in enumerate(LAYERS) if re.fullmatch(pattern, module))


def imported(tree: ast.AST, *, deferred: bool) -> set[str]:
    """Return the project's modules that a syntax tree imports; `deferred`: within functions too."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: import modules by their full name"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in TREES else node.module for name in names}
        elif deferred or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found |= imported(node, deferred=deferred)
    return {name for name in found if name.split(".")[0] == "minilm"}


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


PATHS = {module_name(path): path for path in python_files("minilm", "kernels", "weights")}
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in PATHS.items()}
IMPORTERS = sorted(set(TREES) - {"minilm"})  # minilm itself names everything, and imports it on first use


@pytest.mark.parametrize("module", IMPORTERS)
def test_imports_point_one_way(module):
    for target in imported(TREES[module], deferred=True):
        assert target in TREES, f"{module} imports {target}, which is no file"
        assert layer(target) <= layer(module), f"{module} must not import {target}"


@pytest.mark.parametrize("package", ["minilm.kernels", "minilm.weights"])
def test_kernels_and_weights_know_only_the_configuration(package):
    modules = [module for module in IMPORTERS if module.startswith(package)]
    targets = set().union(*(imported(TREES[module], deferred=True) for module in modules))
    assert modules
    assert {target for target in targets if not target.startswith(package)} <= {"minilm.config"}


def test_no_import_cycles():
    graph = {module: imported(TREES[module], deferred=False) - {"minilm"} for module in IMPORTERS}
    assert list(TopologicalSorter(graph).static_order())  # a cycle raises, naming its modules


@pytest.mark.parametrize("module", [module for module in TREES if not module.startswith("minilm.cli")])
def test_only_the_command_line_prints(module):
    calls = [node for node in ast.walk(TREES[module]) if isinstance(node, ast.Call)]
    lines = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
    assert not lines, f"{PATHS[module]} prints on lines {lines}"


def test_no_file_is_longer_than_400_lines():
    files = python_files("minilm", "kernels", "weights", "tests")
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert not {name: length for name, length in lengths.items() if length > 400}


def test_top_level():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so what belongs to the repository is not known")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [Path(line) for line in listed.splitlines()]
    assert {path.parts[0] for path in paths if len(path.parts) > 1} == FOLDERS
    assert {path.name for path in paths if len(path.parts) == 1} == FILES
