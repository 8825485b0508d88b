"""Caches in their clients' real layouts, and downloads through the real huggingface_hub from an imitated hub."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from huggingface_hub import constants

from minilm.weights import hubs
from minilm.weights.download import SourceError
from minilm.weights.known import REFERENCE_MODEL

NAME = "someone/tiny.v2"
FILES = {
    "model.safetensors": b"weights",
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "sentence_bert_config.json": b'{"max_seq_length": 256}',
    "modules.json": json.dumps(
        [{"path": "", "type": "models.Transformer"}, {"path": "1_Pooling", "type": "models.Pooling"}]
    ).encode(),
    "1_Pooling/config.json": b"{}",
}
MODULES = json.loads(FILES["modules.json"])
DENSE = {
    **FILES,
    "modules.json": json.dumps([*MODULES, {"path": "2_Dense", "type": "models.Dense"}]).encode(),
    "2_Dense/config.json": b"{}",
    "2_Dense/model.safetensors": b"weights",
}
PICKLE = {"pytorch_model.bin": b"weights", "config.json": b"{}", "vocab.txt": b"[PAD]"}
PLAIN = {file: FILES[file] for file in ("model.safetensors", "config.json", "tokenizer.json")}


def write(folder, files):
    for file, content in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("files", "absent"),
    [
        pytest.param(FILES, (), id="sentence-transformers"),
        pytest.param(DENSE, (), id="with Dense"),
        pytest.param({**DENSE, "2_Dense/pytorch_model.bin": b"w"}, ("2_Dense/model.safetensors",), id="old Dense"),
        pytest.param({**FILES, "vocab.txt": b"a"}, ("tokenizer.json",), id="vocabulary instead of tokenizer"),
        pytest.param(PLAIN, ("modules.json",), id="known not to be sentence-transformers"),
        pytest.param(
            {**PLAIN, "pytorch_model.bin": b"w"}, ("modules.json", "model.safetensors"), id="pytorch_model.bin"
        ),
    ],
)
def test_a_complete_snapshot_is_found(sources, tmp_path, files, absent):
    files = {file: content for file, content in files.items() if file not in absent}
    snapshot = sources.cache_snapshot(write(tmp_path / "made", files), NAME, absent)
    assert hubs.find_in_hugging_face_cache(NAME) == snapshot


@pytest.mark.parametrize(
    ("files", "lacks"),
    [
        (FILES, "model.safetensors"),
        (FILES, "modules.json"),
        (FILES, "1_Pooling/config.json"),
        (FILES, "sentence_bert_config.json"),
        (FILES, "tokenizer.json"),
        (DENSE, "2_Dense/config.json"),
        (DENSE, "2_Dense/model.safetensors"),
        (PLAIN, "modules.json"),
    ],
    ids=[
        "weights",
        "modules",
        "pooling",
        "length limit",
        "tokenizer",
        "Dense",
        "its weights",
        "plain, modules unknown",
    ],
)
def test_an_incomplete_snapshot_is_not_taken(sources, tmp_path, files, lacks):
    files = {file: content for file, content in files.items() if file != lacks}
    sources.cache_snapshot(write(tmp_path / "made", files), NAME)
    reason = "not there" if lacks == "model.safetensors" else f"is incomplete: {lacks}"
    with pytest.raises(SourceError, match=reason):
        hubs.find_in_hugging_face_cache(NAME)


@pytest.mark.parametrize("modules", [b"{", b"[1]", b'[{"path": ""}]'], ids=["cut short", "numbers", "no type"])
def test_a_snapshot_with_a_damaged_module_list_is_not_taken(sources, tmp_path, modules):
    sources.cache_snapshot(write(tmp_path / "made", {**FILES, "modules.json": modules}), NAME)
    with pytest.raises((SourceError, ValueError), match=r"modules\.json is not"):
        hubs.find_in_hugging_face_cache(NAME)


@pytest.mark.parametrize("files", [FILES, DENSE, PLAIN], ids=["sentence-transformers", "with Dense", "plain"])
def test_a_download_brings_what_is_needed_and_is_found_offline(hub, monkeypatch, files):
    unneeded = {"pytorch_model.bin": b"the same weights", "onnx/model.onnx": b"again", "tf_model.h5": b"again"}
    hub.repositories[NAME] = {**files, **unneeded}
    folder = hubs.download_from_hugging_face(NAME)
    held = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert held == files
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert hubs.find_in_hugging_face_cache(NAME) == folder


def test_a_repository_with_pytorch_model_bin_only(hub):
    hub.repositories[NAME] = PICKLE
    assert (hubs.download_from_hugging_face(NAME) / "pytorch_model.bin").read_bytes() == b"weights"


def test_a_repository_that_is_not_there(hub):
    with pytest.raises(SourceError, match=r"(?i)repository ?not ?found"):
        hubs.download_from_hugging_face(NAME)
    assert hub.requests


def test_no_request_where_the_hub_is_offline(hub, monkeypatch):
    hub.repositories[NAME] = FILES
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match="HF_HUB_OFFLINE is set"):
        hubs.download_from_hugging_face(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # after huggingface_hub was imported: its child honours it still
    with pytest.raises(SourceError, match="HF_HUB_OFFLINE"):
        hubs.download_from_hugging_face(NAME)
    assert not hub.requests


def test_ctrl_c_ends_the_download_and_the_next_one_works(hub):
    weights = bytes(range(256)) * 4_000
    hub.repositories[NAME] = {**FILES, "model.safetensors": weights}
    hub.stalls_at = "model.safetensors"
    code = f"from minilm.weights import hubs; hubs.download_from_hugging_face({NAME!r})"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert hub.stalled.wait(30)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert error.rstrip().endswith("KeyboardInterrupt")
    assert hub.left.wait(10)  # the child that downloaded has ended too
    with pytest.raises(SourceError, match="not there"):
        hubs.find_in_hugging_face_cache(NAME)
    hub.stalls_at = ""
    assert (hubs.download_from_hugging_face(NAME) / "model.safetensors").read_bytes() == weights


@pytest.mark.usefixtures("sources")
def test_a_hub_that_refuses_is_given_up_at_once():
    start = time.monotonic()
    with pytest.raises(SourceError, match="LocalEntryNotFoundError"):
        hubs.download_from_hugging_face(NAME)
    assert time.monotonic() - start < 5


@pytest.mark.usefixtures("sources")
def test_a_hub_that_never_answers_is_given_up_within_seconds(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(SourceError, match="nothing arrived for 8 seconds"):
            hubs.download_from_hugging_face(NAME)
    assert time.monotonic() - start < 10


MODELSCOPE_FILES = {"pytorch_model.bin": b"w", "vocab.txt": b"a", "config.json": b"{}", "configuration.json": b"{}"}


@pytest.mark.parametrize(
    "layout",
    [
        "models/iic--tiny.v2/snapshots/master",
        "models/iic/tiny___v2",
        "models/iic/tiny.v2",
        "hub/models/iic/tiny___v2",
        "hub/iic/tiny.v2",
        "iic/tiny.v2",
    ],
)
def test_every_layout_of_modelscopes_cache(sources, layout):
    folder = write(sources.modelscope / layout, MODELSCOPE_FILES)
    assert hubs.find_in_modelscope_cache("iic/tiny.v2") == folder
    (sources.modelscope / "models" / "iic--tiny.v2" / "snapshots" / "broken-off").mkdir(parents=True)
    assert hubs.find_in_modelscope_cache("iic/tiny.v2") == folder


def test_modelscopes_cache_is_in_the_home_folder_by_default(tmp_path, monkeypatch):
    monkeypatch.delenv("MODELSCOPE_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = write(tmp_path / ".cache" / "modelscope" / "hub" / "models" / REFERENCE_MODEL, MODELSCOPE_FILES)
    assert hubs.find_in_modelscope_cache(REFERENCE_MODEL) == folder


@pytest.mark.parametrize("lacks", MODELSCOPE_FILES)
def test_an_incomplete_modelscope_folder_is_not_taken(sources, lacks):
    write(sources.modelscope / "hub" / REFERENCE_MODEL, {f: c for f, c in MODELSCOPE_FILES.items() if f != lacks})
    with pytest.raises(SourceError, match=f"is incomplete: no .*{lacks}"):
        hubs.find_in_modelscope_cache(REFERENCE_MODEL)


@pytest.mark.usefixtures("sources")
def test_without_the_modelscope_package():
    with pytest.raises(SourceError, match="pip install modelscope"):
        hubs.download_from_modelscope(REFERENCE_MODEL)


@pytest.fixture
def modelscope_package(sources, tmp_path, monkeypatch):
    """A package with the function of modelscope's that is used, in the place that all its versions have it."""
    code = f"""
import os, pathlib
def snapshot_download(model_id):
    print("chatter")
    if model_id != {REFERENCE_MODEL!r}:
        raise ValueError("no such model")
    folder = pathlib.Path(os.environ["MODELSCOPE_CACHE"], "models", model_id)
    folder.mkdir(parents=True)
    for name, content in {MODELSCOPE_FILES!r}.items():
        (folder / name).write_bytes(content)
"""
    empty = {"modelscope/__init__.py": b"", "modelscope/hub/__init__.py": b""}
    package = write(tmp_path / "installed", {**empty, "modelscope/hub/snapshot_download.py": code.encode()})
    monkeypatch.delitem(sys.modules, "modelscope")
    monkeypatch.syspath_prepend(package)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")]))
    return sources.modelscope


def test_a_download_with_the_modelscope_package(modelscope_package, capfd):
    assert hubs.download_from_modelscope(REFERENCE_MODEL) == modelscope_package / "models" / REFERENCE_MODEL
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("modelscope_package")
def test_modelscopes_own_reason_is_told():
    with pytest.raises(SourceError, match="ValueError: no such model"):
        hubs.download_from_modelscope("iic/other")
