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

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Row = tuple[str, NDArray[Any]]  # a text and its vector

INPUT_FORMATS = ("lines", "jsonl", "csv")
OUTPUT_FORMATS = ("npy", "jsonl", "parquet")
_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".npy": "npy", ".parquet": "parquet"}
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
    found = "jsonl" if path == "-" else _SUFFIXES.get(Path(path).suffix.lower())
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
        ValueError: it is not UTF-8, or a line (its number is given) has no such text.
    """
    read = {"lines": _read_lines, "jsonl": _read_jsonl, "csv": _read_csv}[form]
    name = "stdin" if path == "-" else path
    try:
        with _open_text(path, newline="" if form == "csv" else "\n") as file:
            yield from read(file, key, name)
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8: {error}") from error


@contextmanager
def _open_text(path: str, newline: str) -> Iterator[IO[str]]:
    """Open a file, or stdin, as UTF-8 with an optional byte order mark."""
    if path != "-":
        with Path(path).open(encoding="utf-8-sig", newline=newline) as file:
            yield file
        return
    wrapper = io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig", newline=newline)
    try:
        yield wrapper
    finally:
        wrapper.detach()  # or its end would close stdin


def _read_lines(file: IO[str], _key: str, _name: str) -> Iterator[str]:
    for line in file:
        yield line.removesuffix("\n").removesuffix("\r")


def _read_jsonl(file: IO[str], key: str, name: str) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}, line {number} is not JSON: {error.msg}") from None
        if not isinstance(record, dict) or not isinstance(record.get(key), str):
            raise ValueError(f"{name}, line {number}: expected an object with a string {key!r}; --field names another")
        yield record[key]


def _read_csv(file: IO[str], key: str, name: str) -> Iterator[str]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(file, strict=True)
    try:
        columns = reader.fieldnames or ()
        if key not in columns:
            raise ValueError(f"{name} has no column {key!r}; --column names one of: {', '.join(columns)}")
        for row in reader:
            if row[key] is None:
                raise ValueError(f"{name}, line {reader.line_num}: the row ends before column {key!r}")
            yield row[key]
    except csv.Error as error:
        raise ValueError(f"{name}, line {reader.line_num + 1} is not CSV: {error}") from error


@contextmanager
def open_output(path: str, *, seekable: bool = False) -> Iterator[BinaryIO]:
    """Open a file to write that appears, complete, only when the block ends without an error; `-` is stdout.

    Args:
        path: the file.
        seekable: whether the block needs to seek; stdout then receives everything at the end.

    Raises:
        OSError: the folder does not exist, or something other than a file has the name.
    """
    if path != "-":
        with _replacing(Path(path).resolve()) as file:
            yield file
    elif seekable:
        with tempfile.TemporaryFile() as spool:
            yield spool
            spool.seek(0)
            shutil.copyfileobj(spool, sys.stdout.buffer)
    else:
        yield sys.stdout.buffer


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary sibling of `path` that takes its place at the end."""
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a file that could be replaced; use - for stdout")
    if not path.parent.is_dir():
        raise OSError(f"there is no folder {path.parent} to write {path.name} in")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_jsonl(file: BinaryIO, rows: Iterable[Row], _width: int) -> None:
    """Write a line `{"text": ..., "embedding": [...]}` a row, with as few digits as give the same numbers back."""
    for text, vector in rows:
        numbers = ", ".join(map(str, vector))  # not vector.astype(str), in which numpy loses a KeyboardInterrupt
        file.write(f'{{"text": {json.dumps(text)}, "embedding": [{numbers}]}}\n'.encode())


def write_npy(file: BinaryIO, rows: Iterable[Row], width: int) -> None:
    """Write an array `[n, C]` in numpy's format, whose header is put in front once n is known."""
    count, descr = 0, "<f4"
    file.seek(_NPY_HEADER_SIZE)
    for _, vector in rows:
        file.write(vector.tobytes())
        count, width, descr = count + 1, len(vector), vector.dtype.str
    description = repr({"descr": descr, "fortran_order": False, "shape": (count, width)})
    file.seek(0)
    magic = b"\x93NUMPY\x01\x00" + (_NPY_HEADER_SIZE - 10).to_bytes(2, "little")
    file.write(magic + description.encode().ljust(_NPY_HEADER_SIZE - 11) + b"\n")


def write_parquet(file: BinaryIO, rows: Iterable[Row], width: int) -> None:
    """Write a table of `text` and `embedding`, a list of C numbers, in row groups.

    Raises:
        ImportError: pyarrow is not installed.
    """
    import numpy as np

    pa, pq = import_pyarrow()
    iterator = iter(rows)
    group = list(islice(iterator, _ROW_GROUP))
    number = pa.float32()
    if group:
        number, width = pa.from_numpy_dtype(group[0][1].dtype), len(group[0][1])
    kind = pa.list_(number, width)
    schema = pa.schema([("text", pa.string()), ("embedding", kind)])
    with pq.ParquetWriter(file, schema) as writer:
        while group:
            values = pa.array(np.concatenate([vector for _, vector in group]))
            columns = [
                pa.array([text for text, _ in group]),
                pa.FixedSizeListArray.from_arrays(values, width),
            ]
            writer.write_table(pa.table(columns, schema=schema))
            group = list(islice(iterator, _ROW_GROUP))


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


WRITERS: dict[str, Callable[[BinaryIO, Iterable[Row], int], None]] = {
    "npy": write_npy,
    "jsonl": write_jsonl,
    "parquet": write_parquet,
}
