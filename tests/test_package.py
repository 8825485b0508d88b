"""The sdist builds the wheel, and the wheel alone, in a new environment, imports and encodes."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import BertProcessing

import minilm
from minilm.weights.checkpoint import Checkpoint, fingerprint

ROOT = Path(__file__).parents[1]
BUILD_SDIST = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command without PYTHON* variables, which could bring the repository in, and return its output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


@pytest.fixture(scope="module")
def tiny_model() -> Checkpoint:
    """Make a small random model that is to come with the package."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat"]
    tokenizer = Tokenizer(WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    config = minilm.MiniLMConfig(len(words), 16, 1, 2, 8)
    return Checkpoint(config, minilm.EncodingConfig(), minilm.MiniLM(config).state_dict(), tokenizer.to_str())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory, tiny_model) -> Path:
    """Build the sdist from a copy of the sources (a build leaves files behind), and the wheel from the sdist."""
    folder = tmp_path_factory.mktemp("build")
    for name in ("minilm", "kernels", "weights"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    tiny_model.save(folder / "source" / "weights" / "models" / "tiny")
    run(sys.executable, "-c", BUILD_SDIST, folder, cwd=folder / "source")
    (sdist,) = folder.glob("minilm-*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert any(name.endswith("/LICENSE") for name in archive.getnames())
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, sdist]
    run(*build, cwd=folder)
    (built,) = folder.glob("minilm-*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """Make an environment with the wheel in it, and behind it the packages that these tests run with.

    A folder named in a .pth file joins the search path after the environment's own, and .pth files inside it are not
    read: an editable install of minilm there does not reach the new environment.
    """
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel, cwd=folder)
    packages = site_packages(folder)
    assert {path.name.split("-")[0] for path in packages.iterdir()} == {"minilm"}  # no module `kernels` or `weights`
    dependencies = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "dependencies.pth").write_text("\n".join(dependencies), encoding="utf-8")
    return folder


def site_packages(environment: Path) -> Path:
    (folder,) = environment.glob("lib/python*/site-packages")
    return folder


@pytest.mark.parametrize("module", ["minilm", "minilm.evaluate", "minilm.kernels.backend", "minilm.weights.load"])
def test_import_is_of_the_wheel(environment, module):
    code = f"import {module}; print({module}.__file__)"
    file = Path(run(environment / "bin" / "python", "-c", code, cwd=environment))
    assert file.is_relative_to(site_packages(environment))


def test_every_source_file_is_installed(environment):
    installed = site_packages(environment) / "minilm"
    for folder, home in (("minilm", installed), ("kernels", installed / "kernels"), ("weights", installed / "weights")):
        files = [path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*") if path.is_file()]
        others = {"__pycache__", "results"}  # what measurements were is no part of the package
        missing = [path for path in files if path.parent.name not in others and not (home / path).exists()]
        assert not missing, f"{folder}: {missing}"


def test_the_wheel_encodes(environment):
    code = "import minilm; print(minilm.load().encode('The cat sits outside.').shape)"
    assert run(environment / "bin" / "python", "-c", code, cwd=environment).splitlines()[-1] == "(384,)"


def test_the_wheel_brings_models(environment, tiny_model):
    code = "import minilm; print(minilm.load('tiny').fingerprint(), minilm.load('tiny').encode('the cat').shape)"
    printed = run(environment / "bin" / "python", "-c", code, cwd=environment).splitlines()[-1]
    assert printed == f"{fingerprint(tiny_model)} (16,)"


def test_console_script(environment):
    assert "usage: minilm" in run(environment / "bin" / "minilm", "--help", cwd=environment)
