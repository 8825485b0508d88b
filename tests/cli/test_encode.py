"""`minilm encode`: every format in and out, streaming, options, and what wrong input leads to."""

import io
import json
import os
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

import minilm
from minilm.cli import encode, main

MINILM = Path(sysconfig.get_path("scripts")) / "minilm"
TEXTS = ["A cat sits.", "", "  Ein Käfer: “so”\u2028 ", "A cat sits."]


@pytest.fixture
def vectors(encoder):
    return encoder.encode(TEXTS)


@pytest.fixture
def stdin(monkeypatch):
    """Return a function that puts bytes on stdin."""

    def put(content):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))

    return put


def write_input(folder, form, key="text"):
    """Write TEXTS as a file of some format; key is the field or column."""
    path = folder / f"in.{form}"
    if form == "jsonl":
        path.write_text("".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(TEXTS)))
    elif form == "csv":
        pd.DataFrame({"id": range(len(TEXTS)), key: TEXTS}).to_csv(path, index=False)
    else:
        path.write_bytes("\n".join(TEXTS).encode())
    return str(path)


def read_output(path):
    """Return the texts (if the format has them) and vectors of an output file."""
    if path.suffix == ".npy":
        return None, np.load(path)
    table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_json(path, lines=True, precise_float=True)
    return table["text"].tolist(), np.array(table["embedding"].tolist())


@pytest.mark.parametrize("output", ["npy", "jsonl", "parquet"])
@pytest.mark.parametrize("form", ["txt", "jsonl", "csv"])
def test_encode_files(tmp_path, model, vectors, form, output):
    path = tmp_path / f"out.{output}"
    assert main(["encode", write_input(tmp_path, form), "-o", str(path), *model]) == 0
    texts, rows = read_output(path)
    assert texts in (None, TEXTS)
    assert np.array_equal(rows.astype(np.float32), vectors)
    assert {file.name for file in tmp_path.iterdir()} == {f"in.{form}", f"out.{output}"}


def test_encode_stdin_to_stdout(capsys, stdin, model, vectors):
    stdin("\ufeff".encode() + "\r\n".join(TEXTS).encode() + b"\r\n")
    assert main(["encode", *model]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in rows] == TEXTS
    assert np.array_equal(np.float32([row["embedding"] for row in rows]), vectors)
    assert not sys.stdin.buffer.closed


@pytest.mark.parametrize(
    ("content", "options", "texts"),
    [
        (b"text\n\nb\n", [], ["", "b"]),
        (b"text\r\na\r\n\r\n", [], ["a", ""]),
        (b'id,text,id\n1,"a\nb",2\n', [], ["a\nb"]),
        (b"id\rx\ry\r", ["--column", "id"], ["x", "y"]),
    ],
    ids=["blank_row", "blank_last_row", "other_columns_share_a_name", "carriage_returns"],
)
def test_rows_of_csv(tmp_path, capsys, model, content, options, texts):
    (tmp_path / "in.csv").write_bytes(content)
    assert main(["encode", str(tmp_path / "in.csv"), *options, *model]) == 0
    assert [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()] == texts


@pytest.mark.parametrize("form", ["jsonl", "npy", "parquet"])
def test_output_into_a_named_pipe(tmp_path, model, vectors, form):
    os.mkfifo(tmp_path / "pipe")
    received = []
    reader = threading.Thread(target=lambda: received.append((tmp_path / "pipe").read_bytes()), daemon=True)
    reader.start()
    options = ["-o", str(tmp_path / "pipe"), "--output-format", form]
    assert main(["encode", write_input(tmp_path, "txt"), *options, *model]) == 0
    reader.join(30)
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / f"received.{form}").write_bytes(received[0])
    assert np.array_equal(read_output(tmp_path / f"received.{form}")[1].astype(np.float32), vectors)


def test_dev_stdout_is_stdout(tmp_path, model):
    """Also where stdout is a pipe, and where it is a file that something was written to before."""
    command = [MINILM, "encode", write_input(tmp_path, "txt"), "-o", "/dev/stdout", *model]
    piped = subprocess.run(command, capture_output=True, check=True)
    assert [json.loads(line)["text"] for line in piped.stdout.splitlines()] == TEXTS
    with (tmp_path / "log").open("wb") as log:
        log.write(b"earlier\n")
        log.flush()
        subprocess.run(command, stdout=log, check=True)
    assert (tmp_path / "log").read_bytes() == b"earlier\n" + piped.stdout


@pytest.mark.parametrize(("form", "loads"), [("npy", np.load), ("parquet", pd.read_parquet)], ids=["npy", "parquet"])
def test_binary_formats_to_stdout(capfdbinary, stdin, model, form, loads):
    stdin(b"one\ntwo\n")
    assert main(["encode", "-", "--output-format", form, *model]) == 0
    assert len(loads(io.BytesIO(capfdbinary.readouterr().out))) == 2


def test_named_field_and_column(tmp_path, capsys, model):
    assert main(["encode", write_input(tmp_path, "jsonl", "body"), "--field", "body", *model]) == 0
    assert main(["encode", write_input(tmp_path, "csv", "body"), "--column", "body", *model]) == 0
    first, second = np.array_split(capsys.readouterr().out.splitlines(), 2)
    assert first.tolist() == second.tolist()


@pytest.mark.parametrize("output", ["npy", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("options", "width", "dtype"),
    [
        ([], 384, "float32"),
        (["--truncate-dim", "10"], 10, "float32"),
        (["--precision", "int8"], 384, "int8"),
        (["--precision", "ubinary"], 48, "uint8"),
    ],
    ids=["float32", "truncated", "int8", "ubinary"],
)
def test_no_texts(tmp_path, model, output, options, width, dtype):
    (tmp_path / "in.txt").touch()
    path = tmp_path / f"out.{output}"
    assert main(["encode", str(tmp_path / "in.txt"), "-o", str(path), *options, *model]) == 0
    if output == "jsonl":
        assert path.read_bytes() == b""
    elif output == "npy":
        assert (np.load(path).shape, np.load(path).dtype) == ((0, width), dtype)
    else:
        table = pq.read_table(path)
        kind = table.schema.field("embedding").type
        assert (table.column_names, table.num_rows) == (["text", "embedding"], 0)
        assert (kind.list_size, kind.value_type.to_pandas_dtype()) == (width, np.dtype(dtype))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--precision", "int8"], {"precision": "int8"}),
        (["--precision", "ubinary"], {"precision": "ubinary"}),
        (["--truncate-dim", "64", "--normalize"], {"truncate_dim": 64, "normalize_embeddings": True}),
        (["--batch-size", "1"], {"batch_size": 1}),
        (["--max-seq-length", "4", "--on-truncate", "chunk"], None),
        (["--pooling", "cls"], None),
    ],
    ids=["int8", "ubinary", "truncated", "batch", "chunks", "cls"],
)
def test_encode_options(tmp_path, model, encoder, canonical_folder, options, expected):
    path = tmp_path / "out.npy"
    assert main(["encode", write_input(tmp_path, "txt"), "-o", str(path), *options, *model]) == 0
    if expected is not None:
        rows = encoder.encode(TEXTS, **expected)
    elif "cls" in options:
        rows = minilm.load(canonical_folder, pooling="cls").encode(TEXTS)
    else:
        rows = minilm.load(canonical_folder, max_seq_length=4).encode(TEXTS, on_truncate="chunk")
    assert np.load(path).dtype == rows.dtype
    assert np.allclose(np.load(path), rows, rtol=0, atol=1e-6)


def test_parquet_in_several_row_groups(tmp_path, model, monkeypatch, vectors):
    monkeypatch.setattr("minilm.cli.files._ROW_GROUP", 3)
    path = tmp_path / "out.parquet"
    assert main(["encode", write_input(tmp_path, "txt"), "-o", str(path), *model]) == 0
    assert np.array_equal(read_output(path)[1].astype(np.float32), vectors)


def test_encode_reads_and_writes_as_a_stream(tmp_path, model, monkeypatch):
    """With two texts read ahead, no more than that are ever waiting; the rows come out in order all the same."""
    monkeypatch.setattr("minilm.cli.encode.READ_AHEAD", 2)
    events = []

    def texts(*_):
        for index in range(6):
            events.append("read")
            yield str(index)

    def write(_file, rows, _empty):
        for text, _ in rows:
            events.append(text)

    monkeypatch.setattr("minilm.cli.encode.read_input", texts)
    monkeypatch.setitem(encode.WRITERS, "jsonl", write)
    assert main(["encode", "-o", str(tmp_path / "out.jsonl"), *model]) == 0
    assert events == ["read", "read", "0", "1", "read", "read", "2", "3", "read", "read", "4", "5"]


def test_failure_leaves_the_earlier_output(tmp_path, capsys, model):
    (tmp_path / "in.jsonl").write_text('{"text": "fine"}\n{"text": 7}\n')
    (tmp_path / "out.npy").write_text("earlier")
    assert main(["encode", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.npy"), *model]) == 2
    assert "in.jsonl, line 2: expected an object with a string 'text'" in capsys.readouterr().err
    assert {file.name for file in tmp_path.iterdir()} == {"in.jsonl", "out.npy"}
    assert (tmp_path / "out.npy").read_text() == "earlier"


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.txt", b"x\ncaf\xe9\n", [], "a.txt, line 2 is not UTF-8: byte 0xe9 after 3 characters"),
        ("a.txt", b"x\n\n\xed\xa0\x80\n", [], "a.txt, line 3 is not UTF-8: byte 0xed after 0 characters"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}\n', [], "a.jsonl, line 2 is not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "a\\ud800"}\n', [], "line 2 is not valid Unicode: lone surrogate U+D800"),
        ("a.csv", b'id,text\n1,"x\ny"\n\xe9,z\n', [], "a.csv, line 4 is not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n\n', [], "a.jsonl, line 2 is not JSON"),
        ("a.jsonl", b'"bare"\n', [], "line 1: expected an object with a string 'text'; --field names another"),
        ("a.csv", b"id,body\n1,x\n", [], "a.csv has no column 'text'; --column names one of: id, body"),
        ("a.csv", b"text,id,text\na,b,c\n", [], "a.csv has 2 columns 'text'; rename them, or choose another"),
        ("a.csv", b"id,text\n1,x\n2\n", [], "a.csv, line 3: the row ends before column 'text'"),
        ("a.csv", b"id,text\n1,x\n\n2,y\n", [], "a.csv, line 3: the row ends before column 'text'"),
        ("a.csv", b'text\n"x" y\n', [], "a.csv, line 2 is not CSV"),
        ("a.csv", b'text\nx\n"y\nz\n', [], "a.csv, line 3 is not CSV"),
        ("a.txt", b"x", ["--field", "body"], "--field is for jsonl input; "),
        ("a.jsonl", b"x", ["--column", "body"], "--column is for csv input; "),
        ("a.txt", b"x", ["-o", "{}/out.txt"], "cannot tell the format of"),
        ("a.txt", b"x", ["-o", "{}/nowhere/out.npy"], "there is no folder"),
        ("a.txt", b"x", ["-o", "{}", "--output-format", "npy"], "Is a directory: "),
        ("a.txt", b"x", ["--precision", "int7"], "invalid choice: 'int7'"),
        ("a.txt", b"x", ["--batch-size", "0"], "batch_size must be"),
        ("a.txt", b"x", ["--on-truncate", "cut"], "invalid choice: 'cut'"),
        ("a.txt", b"x " * 200, ["--on-truncate", "error"], "text 0 has 202 tokens, more than the limit of 128"),
        ("a.txt", b"x", ["--prompt-name", "poem"], "no prompt named 'poem'"),
    ],
    ids=[
        "latin1",
        "encoded_surrogate",
        "jsonl_latin1",
        "jsonl_surrogate",
        "csv_latin1",
        "blank_jsonl_line",
        "jsonl_string",
        "csv_column",
        "csv_columns_of_one_name",
        "csv_short_row",
        "csv_blank_row",
        "csv_quotes",
        "csv_open_quote",
        "field_of_lines",
        "column_of_jsonl",
        "output_suffix",
        "output_folder",
        "output_is_folder",
        "precision",
        "batch_size",
        "on_truncate",
        "too_long",
        "prompt",
    ],
)
def test_wrong_input(tmp_path, the_error, model, name, content, options, message):
    (tmp_path / name).write_bytes(content)
    options = [option.format(tmp_path) for option in options]
    assert main(["encode", str(tmp_path / name), *options, *model]) == 2
    assert message in the_error()
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("module", ["pyarrow", "pyarrow.parquet"])
@pytest.mark.parametrize("options", [["-o", "{}/o.parquet"], ["--output-format", "parquet"]], ids=["file", "stdout"])
def test_parquet_without_pyarrow(tmp_path, the_error, model, monkeypatch, module, options):
    monkeypatch.setitem(sys.modules, module, None)  # importing it now fails
    options = [option.format(tmp_path) for option in options]
    assert main(["encode", write_input(tmp_path, "txt"), *options, *model]) == 2
    assert 'Parquet needs pyarrow: pip install "minilm[parquet]"' in the_error()
    assert [file.name for file in tmp_path.iterdir()] == ["in.txt"]


def test_warnings_are_shown_unless_quiet(tmp_path, capsys, model):
    (tmp_path / "in.txt").write_text("x " * 200)
    arguments = ["encode", str(tmp_path / "in.txt"), "-o", str(tmp_path / "out.npy"), *model]
    assert main(arguments) == 0
    shown = capsys.readouterr().err
    assert shown.startswith("minilm: warning: 1 text was longer than 128 tokens")
    assert len(shown.splitlines()) == 1
    assert main([*arguments, "--quiet"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("options", "shown"), [([], True), (["--quiet"], False)], ids=["terminal", "quiet"])
def test_progress_bar_on_a_terminal(tmp_path, capsys, model, monkeypatch, options, shown):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    path = tmp_path / "out.npy"
    assert main(["encode", write_input(tmp_path, "txt"), "-o", str(path), *model, *options]) == 0
    assert ("4text" in capsys.readouterr().err.replace(" ", "")) is shown
