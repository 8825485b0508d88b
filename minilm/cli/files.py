"""Texts in, vectors out: the file formats of the command line, read and written as streams."""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

from minilm.cli.common import Parser, UsageError
from minilm.texts import check_text

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Row = tuple[str, NDArray[Any]]  # a text and its vector

INPUT_FORMATS = ("lines", "jsonl", "csv")
OUTPUT_FORMATS = ("npy", "jsonl", "parquet")
_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".npy": "npy", ".parquet": "parquet"}
_STDOUT = ("-", "/dev/stdout")
_NPY_HEADER_SIZE = 128
_ROW_GROUP = 4_096


def add_input_options(parser: Parser) -> None:
    """Add the options that say how to read a file of texts."""
    parser.add_argument("--input-format", choices=INPUT_FORMATS, help="default: by suffix; else lines of text")
    parser.add_argument("--field", metavar="NAME", help='the field of JSON lines that holds the text (default: "text")')
    parser.add_argument(
        "--column", metavar="NAME", help='the column of a CSV file that holds the text (default: "text")'
    )


def read_input(arguments: argparse.Namespace, path: str) -> Iterator[str]:
    """Return the texts of a file, as the input options say, read as they are asked for.

    Raises:
        UsageError: `--field` or `--column` is given for a format that has none.
    """
    form = arguments.input_format or input_format(path)
    for option, its_format in (("field", "jsonl"), ("column", "csv")):
        if getattr(arguments, option) is not None and form != its_format:
            raise UsageError(f"--{option} is for {its_format} input; {path} is read as {form} (see --input-format)")
    return read_texts(path, form, arguments.field or arguments.column or "text")


def input_format(path: str) -> str:
    """Tell a file's format from its suffix: jsonl, csv, else lines of text."""
    found = _SUFFIXES.get(Path(path).suffix.lower(), "lines")
    return found if found in INPUT_FORMATS else "lines"


def output_format(path: str) -> str:
    """Tell a file's format from its suffix; jsonl for stdout.

    Raises:
        ValueError: the suffix is none that can be written.
    """
    found = "jsonl" if path in _STDOUT else _SUFFIXES.get(Path(path).suffix.lower())
    if found not in OUTPUT_FORMATS:
        raise ValueError(
            f"cannot tell the format of {path}: end it in .npy, .jsonl or .parquet, or use --output-format"
        )
    return found


def read_texts(path: str, form: str, key: str) -> Iterator[str]:
    """Yield the texts of a UTF-8 file, one a line (blank ones too) or record; `-` is stdin.

    Args:
        path: the file.
        form: `lines`; `jsonl`, objects with the text under `key`; or `csv`, with a header that has a column `key`.
        key: the field or column.

    Raises:
        OSError: the file can't be read.
        ValueError: a line (its number is given) is not UTF-8, or has no such text.
    """
    read = {"lines": _read_lines, "jsonl": _read_jsonl, "csv": _read_csv}[form]
    name = "stdin" if path == "-" else path
    with _open_text(path, newline="" if form == "csv" else "\n") as file:
        yield from read(_checked_lines(file, name), key, name)


@contextmanager
def _open_text(path: str, newline: str) -> Iterator[IO[str]]:
    """Open a file, or stdin, as UTF-8 with an optional byte order mark; bytes that are not UTF-8 become surrogates."""
    if path != "-":
        with Path(path).open(encoding="utf-8-sig", errors="surrogateescape", newline=newline) as file:
            yield file
        return
    wrapper = io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig", errors="surrogateescape", newline=newline)
    try:
        yield wrapper
    finally:
        wrapper.detach()  # or its end would close stdin


def _checked_lines(file: IO[str], name: str) -> Iterator[str]:
    """Yield the lines of a file opened by `_open_text`, up to one that is not UTF-8."""
    for number, line in enumerate(file, start=1):
        if not line.isascii():
            try:
                line.encode()
            except UnicodeEncodeError as error:
                byte = line[error.start].encode(errors="surrogateescape")[0]
                where = f"byte 0x{byte:02x} after {error.start} characters"
                raise ValueError(f"{name}, line {number} is not UTF-8: {where}") from None
        yield line


def _read_lines(lines: Iterable[str], _key: str, _name: str) -> Iterator[str]:
    for line in lines:
        yield line.removesuffix("\n").removesuffix("\r")


def _read_jsonl(lines: Iterable[str], key: str, name: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}, line {number} is not JSON: {error.msg}") from None
        if not isinstance(record, dict) or not isinstance(record.get(key), str):
            raise ValueError(f"{name}, line {number}: expected an object with a string {key!r}; --field names another")
        yield check_text(record[key], f"{name}, line {number}")  # an escape can make a lone surrogate


def _read_csv(lines: Iterable[str], key: str, name: str) -> Iterator[str]:
    csv.field_size_limit(2**31 - 1)
    reader, start = csv.reader(lines, strict=True), 1
    try:
        column = _find_column(next(reader, []), key, name)
        start = reader.line_num + 1  # the line where the next row starts; it may be several lines long
        for row in reader:
            fields = row or [""]  # a blank line: one field, and it is empty
            if column >= len(fields):
                raise ValueError(f"{name}, line {start}: the row ends before column {key!r}")
            yield fields[column]
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{name}, line {start} is not CSV: {error}") from error


def _find_column(columns: list[str], key: str, name: str) -> int:
    """Return the position of the one column that is called `key`."""
    if key not in columns:
        raise ValueError(f"{name} has no column {key!r}; --column names one of: {', '.join(columns)}")
    if (count := columns.count(key)) > 1:
        raise ValueError(f"{name} has {count} columns {key!r}; rename them, or choose another with --column")
    return columns.index(key)


@contextmanager
def open_output(path: str, *, seekable: bool = False) -> Iterator[BinaryIO]:
    """Open a file to write that appears, complete, only when the block ends without an error; `-` is stdout.

    Stdout, and what exists and is no regular file (a device, a named pipe), is written to directly.

    Args:
        path: the file.
        seekable: whether the block needs to seek; what is written to directly then receives everything at the end.

    Raises:
        OSError: the folder does not exist, or `path` is itself a folder or can't be written.
    """
    if path in _STDOUT:
        with _spooled(sys.stdout.buffer, seekable) as file:
            yield file
    elif Path(path).exists() and not Path(path).is_file():  # before any link is resolved: a pipe's leads nowhere
        with Path(path).open("wb") as sink, _spooled(sink, seekable) as file:
            yield file
    else:
        with _replacing(Path(path).resolve()) as file:
            yield file


@contextmanager
def _spooled(sink: BinaryIO, seekable: bool) -> Iterator[BinaryIO]:
    """Give `sink` itself, or a seekable file that is copied into it at the end."""
    if not seekable:
        yield sink
        return
    with tempfile.TemporaryFile() as spool:
        yield spool
        spool.seek(0)
        shutil.copyfileobj(spool, sink)


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary sibling of `path` that takes its place at the end."""
    if not path.parent.is_dir():
        raise OSError(f"there is no folder {path.parent} to write {path.name} in")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_jsonl(file: BinaryIO, rows: Iterable[Row], _empty: NDArray[Any]) -> None:
    """Write a line `{"text": ..., "embedding": [...]}` a row, with as few digits as give the same numbers back."""
    for text, vector in rows:
        numbers = ", ".join(map(str, vector))  # not vector.astype(str), in which numpy loses a KeyboardInterrupt
        file.write(f'{{"text": {json.dumps(text)}, "embedding": [{numbers}]}}\n'.encode())


def write_npy(file: BinaryIO, rows: Iterable[Row], empty: NDArray[Any]) -> None:
    """Write an array `[n, C]` in numpy's format, whose header is put in front once n is known.

    Args:
        file: where to.
        rows: texts and vectors; only the vectors are written.
        empty: no vectors, `[0, C]`, of the width and dtype of those in `rows`.
    """
    count = 0
    file.seek(_NPY_HEADER_SIZE)
    for _, vector in rows:
        file.write(vector.tobytes())
        count += 1
    description = repr({"descr": empty.dtype.str, "fortran_order": False, "shape": (count, empty.shape[1])})
    file.seek(0)
    magic = b"\x93NUMPY\x01\x00" + (_NPY_HEADER_SIZE - 10).to_bytes(2, "little")
    file.write(magic + description.encode().ljust(_NPY_HEADER_SIZE - 11) + b"\n")


def write_parquet(file: BinaryIO, rows: Iterable[Row], empty: NDArray[Any]) -> None:
    """Write a table of `text` and `embedding`, a list of C numbers, in row groups.

    Args:
        file: where to.
        rows: texts and vectors.
        empty: no vectors, `[0, C]`, of the width and dtype of those in `rows`.

    Raises:
        ImportError: pyarrow is not installed.
    """
    import numpy as np

    pa, pq = import_pyarrow()
    iterator, width = iter(rows), empty.shape[1]
    kind = pa.list_(pa.from_numpy_dtype(empty.dtype), width)
    schema = pa.schema([("text", pa.string()), ("embedding", kind)])
    with pq.ParquetWriter(file, schema) as writer:
        while group := list(islice(iterator, _ROW_GROUP)):
            values = pa.array(np.concatenate([vector for _, vector in group]))
            columns = [
                pa.array([text for text, _ in group]),
                pa.FixedSizeListArray.from_arrays(values, width),
            ]
            writer.write_table(pa.table(columns, schema=schema))


def import_pyarrow() -> tuple[Any, Any]:
    """Return the modules pyarrow and pyarrow.parquet.

    Raises:
        ImportError: they are not installed; the message says how to get them.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError('Parquet needs pyarrow: pip install "minilm[parquet]"') from error
    return pa, pq


WRITERS: dict[str, Callable[[BinaryIO, Iterable[Row], NDArray[Any]], None]] = {
    "npy": write_npy,
    "jsonl": write_jsonl,
    "parquet": write_parquet,
}
