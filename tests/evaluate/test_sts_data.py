"""The STS data's two layouts, a folder and the hub, and what is said when data is missing or malformed."""

import gzip
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from minilm.evaluate import EvaluationDataError, sts_data
from minilm.evaluate.sts_data import HUB_DATASETS, TASKS, Pairs, read_sts, read_tsv


@pytest.fixture
def folder(tmp_path):
    """Make a data folder with one pair a file."""
    for task in TASKS:
        (tmp_path / task).mkdir()
        for name in ("test", "dev") if task in ("stsb", "sickr") else ("news", "forum"):
            (tmp_path / task / f"{name}.tsv").write_text(f"1\t{task}\t{name}\n")
    return tmp_path


def test_folder(folder):
    tasks = read_sts(folder, TASKS, "test")
    assert list(tasks) == list(TASKS)
    assert tasks["sts12"] == {"forum": Pairs([1.0], ["sts12"], ["forum"]), "news": Pairs([1.0], ["sts12"], ["news"])}
    assert tasks["stsb"] == {"test": Pairs([1.0], ["stsb"], ["test"])}
    assert read_sts(folder, ["sickr"], "dev") == {"sickr": {"dev": Pairs([1.0], ["sickr"], ["dev"])}}


def test_files_are_read_to_the_letter(tmp_path):
    path = tmp_path / "quotes.tsv"
    path.write_bytes('4.5\t"It\'s" a ""quote"\t NBSP\u00a0and\u2028separator \r\n0\t\tempty first\n'.encode())
    read = read_tsv(path)
    assert read.scores == [4.5, 0.0]
    assert read.first == ['"It\'s" a ""quote"', ""]
    assert read.second == [" NBSP\u00a0and\u2028separator ", "empty first"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"5\ta\tb\n4\tonly one\n", "line 2: expected score<TAB>sentence1<TAB>sentence2, got 2 columns"),
        (b"5\ta\tb\nhigh\ta\tb\n", "line 2: expected a number as score, got 'high'"),
        (b"5\ta\tb\tc\n", "line 1: expected score"),
        (b"5\tcaf\xe9\tb\n", "line 1 is not UTF-8"),
        (b"nan\ta\tb\n", "line 1: expected a number as score, got 'nan'"),
        (b"", "is empty"),
    ],
    ids=["two_columns", "score", "four_columns", "latin1", "nan", "empty"],
)
def test_malformed_file(tmp_path, content, message):
    path = tmp_path / "x.tsv"
    path.write_bytes(content)
    with pytest.raises(EvaluationDataError, match=message):
        read_tsv(path)


def test_missing_tasks_are_listed(folder):
    (folder / "stsb" / "test.tsv").unlink()
    for path in (folder / "sts15").iterdir():
        path.unlink()
    with pytest.raises(
        EvaluationDataError, match=r"lacks sts15/\*.tsv, stsb/test.tsv; choose other tasks, or complete it"
    ):
        read_sts(folder, TASKS, "test")
    assert list(read_sts(folder, ["sts12", "sickr"], "test")) == ["sts12", "sickr"]


def test_missing_folder(tmp_path):
    with pytest.raises(
        EvaluationDataError, match=r"no folder .*nowhere; the STS data is expected as DIR/sts12/SUBSET.tsv"
    ):
        read_sts(tmp_path / "nowhere", TASKS, "test")


@pytest.mark.parametrize(
    ("tasks", "split", "message"),
    [
        (["sts17", "stsb"], "test", "unknown STS task sts17; choose from sts12"),
        ([], "test", "choose from sts12"),
        (["stsb"], "train", "split is 'test', or 'dev'"),
        (["stsb", "sts12"], "dev", "split is 'test', or 'dev' for the tasks stsb and sickr"),
    ],
    ids=["task", "no_task", "split", "dev_of_a_year"],
)
def test_unknown_names(folder, tasks, split, message):
    with pytest.raises(ValueError, match=message):
        read_sts(folder, tasks, split)


RECORDS = [
    {"score": 4.5, "sentence1": "a", "sentence2": "\u00e9", "genre": "extra"},
    {"score": 1, "sentence1": "a", "sentence2": "b"},
]
READ = Pairs([4.5, 1.0], ["a", "a"], ["\u00e9", "b"])
PINNED = {
    f"/datasets/{name}/resolve/{revision}/{split}.jsonl.gz": revision
    for name, revision in HUB_DATASETS.values()
    for split in ("test", "validation")
}


class DatasetHub(BaseHTTPRequestHandler):
    """Answers as the hub does: the same records for every pinned dataset file, and 404 for the rest."""

    def do_GET(self):
        revision = PINNED.get(self.path)
        body = gzip.compress("".join(json.dumps(record) + "\n" for record in RECORDS).encode(), mtime=0)
        self.send_response(200 if revision else 404)
        self.send_header("X-Repo-Commit", revision or "")
        self.send_header("ETag", '"0123456789abcdef"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def log_message(self, *_):
        """Keep the tests' output clean."""


@pytest.fixture
def dataset_hub(sources, monkeypatch):
    assert not sources.hugging_face.exists()  # nothing is cached
    with ThreadingHTTPServer(("127.0.0.1", 0), DatasetHub) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield
        server.shutdown()


@pytest.mark.usefixtures("dataset_hub")
def test_hub_is_read_then_its_cache(monkeypatch, caplog):
    assert read_sts(None, ["sts12", "sickr"], "test") == {"sts12": {"test": READ}, "sickr": {"test": READ}}
    assert "the hub's SICK-R is the whole set of 9,927 pairs" in caplog.text
    assert read_sts(None, ["stsb"], "dev") == {"stsb": {"dev": READ}}
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert read_sts(None, ["sts12"], "test") == {"sts12": {"test": READ}}


def test_hub_has_no_dev_split_of_sickr():
    with pytest.raises(EvaluationDataError, match="no dev split of SICK-R; give a folder that has it"):
        read_sts(None, ["sickr"], "dev")


@pytest.mark.usefixtures("sources")
def test_unreachable_hub_is_told_within_seconds():
    start = time.monotonic()
    with pytest.raises(EvaluationDataError, match=r"cannot fetch test.jsonl.gz of the dataset mteb/sts12-sts") as error:
        read_sts(None, ["sts12"], "test")
    assert time.monotonic() - start < 15
    assert "give the data as a folder instead: DIR/sts12/SUBSET.tsv" in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not gzip", "is damaged"),
        (
            gzip.compress(b'{"score": 1}\n'),
            "line 1: expected a JSON object with the strings sentence1, sentence2, got no",
        ),
        (gzip.compress(b"[1, 2]\n"), "line 1: expected a JSON object with .* got list"),
        (gzip.compress(b'{"sentence1": "a", "sentence2": "b"}\n'), "line 1: expected a number as score, got None"),
        (gzip.compress(json.dumps(RECORDS[0]).encode())[:-9], "is damaged"),
    ],
    ids=["plain", "fields", "list", "score", "cut"],
)
def test_damaged_hub_file(tmp_path, monkeypatch, content, message):
    path = tmp_path / "test.jsonl.gz"
    path.write_bytes(content)
    monkeypatch.setattr(sts_data, "dataset_file", lambda *_: path)
    with pytest.raises(EvaluationDataError, match=message):
        read_sts(None, ["sts12"], "test")
