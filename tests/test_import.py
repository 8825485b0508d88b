"""`import minilm` is quick, leaves torch alone, and its lazy public names cannot be shadowed."""

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import minilm
import minilm.kernels
import minilm.weights


def run(code: str) -> str:
    """Run `code` in a new interpreter and return what it printed."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


HELP = "import minilm.cli, contextlib\nwith contextlib.suppress(SystemExit): minilm.cli.main(['--help'])\n"


@pytest.mark.parametrize("code", ["import minilm\n", HELP], ids=["import", "help"])
def test_torch_is_not_imported(code):
    heavy = run(code + "import sys; print('\\n', {'torch', 'numpy', 'tokenizers', 'safetensors'} & set(sys.modules))")
    assert heavy.splitlines()[-1].strip() == "set()"


def test_loading_imports_no_compiler(canonical_folder):
    """torch._dynamo alone takes longer to import than the weights take to load."""
    code = f"import sys, minilm\nminilm.load({str(canonical_folder)!r}, device='cpu').encode('a')\n"
    assert run(code + "print('torch._dynamo' in sys.modules)") == "False"


def test_import_takes_under_a_tenth_of_a_second():
    code = "import time; start = time.perf_counter(); import minilm; print(time.perf_counter() - start)"
    assert min(float(run(code)) for _ in range(3)) < 0.1


@pytest.mark.parametrize("name", minilm.__all__)
def test_public_name(name):
    assert run(f"import minilm; assert {name!r} in dir(minilm); print(minilm.{name} is minilm.{name})") == "True"


def test_lazy_names_are_the_public_names():
    assert {*minilm._HOME, "__version__"} == set(minilm.__all__)


def test_no_submodule_shadows_a_public_name():
    submodules = {module.name for module in pkgutil.iter_modules(minilm.__path__)}
    assert "config" in submodules
    assert not submodules & set(minilm.__all__)


@pytest.mark.parametrize("name", ["pipeline", "similarity"])
def test_function_stays_a_function_in_either_import_order(name):
    home = minilm._HOME[name]
    assert run(f"import {home}, minilm; print(callable(minilm.{name}))") == "True"
    assert run(f"from minilm import {name}; import {home}; print(minilm.{name} is {name})") == "True"


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="module 'minilm' has no attribute 'encoed'"):
        _ = minilm.encoed


@pytest.mark.parametrize("package", [minilm.kernels, minilm.weights], ids=["kernels", "weights"])
def test_package_file_holds_only_a_docstring(package):
    """Other libraries may import the folder `kernels` from the repository root; nothing must happen then."""
    (statement,) = ast.parse(Path(package.__file__).read_text(encoding="utf-8")).body
    assert isinstance(statement, ast.Expr)
    assert isinstance(statement.value, ast.Constant)
