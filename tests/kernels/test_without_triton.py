"""Triton is optional: without it all else works, and with it nothing imports it that doesn't use it."""

import subprocess
import sys

import pytest

from minilm.kernels.report import KERNELS

WITHOUT = "import sys; sys.modules['triton'] = None\n"  # importing it then fails, as if it weren't installed
LOADED = "print(sorted(name for name in sys.modules if name.split('.')[0] == 'triton' or name in kernels))\n"


def run(code, *arguments):
    """Run `code` in a new interpreter and return what it printed."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(("backend", "used"), [("auto", "packed"), ("torch", "torch"), ("int8", "int8")])
def test_encodes_without_triton(canonical_folder, backend, used):
    code = WITHOUT + (
        "import minilm\n"
        "encoder = minilm.load(sys.argv[1], device='cpu', backend=sys.argv[2])\n"
        "print(encoder.encode('a b').shape, encoder.model.backend.name)"
    )
    assert run(code, str(canonical_folder), backend) == f"(384,) {used}"


def test_info_without_triton(canonical_folder):
    code = WITHOUT + "import minilm.cli\nsys.exit(minilm.cli.main(['info', '--device', 'cpu', '--model', sys.argv[1]]))"
    assert "backend" in run(code, str(canonical_folder))


def test_asking_for_triton_without_it_tells_how_to_get_it(canonical_folder):
    code = WITHOUT + (
        "import minilm\n"
        "try:\n"
        "    minilm.load(sys.argv[1], device='cpu', backend='triton')\n"
        "except ValueError as error:\n"
        "    print(error)"
    )
    assert 'pip install "minilm[triton]"' in run(code, str(canonical_folder))


@pytest.mark.parametrize(
    "code",
    [
        "import minilm.encoder",
        "import minilm; minilm.load(sys.argv[1], device='cpu').encode('a b')",
        "import minilm.cli; minilm.cli.main(['info', '--device', 'cpu', '--model', sys.argv[1]])",
    ],
    ids=["import", "encode", "info"],
)
def test_triton_is_not_imported_unasked(canonical_folder, code):
    kernels = {f"minilm.kernels.{name}" for name in (*KERNELS, "launch", "report", "triton_backend")}
    code = f"import sys; kernels = {kernels!r}\n{code}\n{LOADED}"
    assert run(code, str(canonical_folder)).splitlines()[-1] == "[]"
