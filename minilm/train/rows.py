"""Files of rows, read one row at a time, and columns that hold many texts in little more memory than the texts.

The format goes by the suffix, before a final `.xz` or `.gz`: `.tsv` (quotes are literal), `.csv`, `.jsonl`, `.json`
(one list of objects); any other is lines of text. All are UTF-8.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import lzma
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

Record = Mapping[str, Any]

_COMPRESSED: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open}
_DAMAGED = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error)


class DataError(ValueError):
    """Training data can't be used; the message names the file and, where there is one, the line."""


class BadRow(Exception):  # noqa: N818 - whether it is an error is not known here
    """Why a row can't be used.

    Attributes:
        reason: in words that many rows may share.
        detail: what it is in this one.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason + detail)
        self.reason, self.detail = reason, detail


Records = Iterator[tuple[int, Any]]
"""Line numbers, from 1, and what stands there: a `Record` if the file is right; a `BadRow` if it can't be parsed."""


def read_records(path: Path, names: Sequence[str] = ()) -> Records:
    """Read a file's rows as they are asked for.

    Args:
        path: the file.
        names: the fields of a TSV or CSV file without a header, in order; the name of a line of text (`text`).

    Raises:
        DataError: the file is damaged, or not what its suffix says.
        OSError: it can't be opened.
    """
    stem = path.with_suffix("") if path.suffix in _COMPRESSED else path
    try:
        with _COMPRESSED.get(path.suffix, open)(path, "rb") as file:
            yield from _FORMATS.get(stem.suffix, _lines)(_decoded(file), names)
    except _DAMAGED as error:
        raise DataError(f"{path} is damaged or cut short ({error}); fetch or write it again") from error
    except (csv.Error, json.JSONDecodeError, TypeError) as error:
        raise DataError(f"{path} is not what its suffix says: {error}") from error


def _decoded(file: IO[bytes]) -> Iterator[str]:
    """Give lines with their ends; bytes that are not UTF-8 become lone surrogates, which no text may hold."""
    for index, line in enumerate(file):
        yield line.decode("utf-8" if index else "utf-8-sig", "surrogateescape")


def _lines(lines: Iterator[str], names: Sequence[str]) -> Records:
    name = names[0] if names else "text"
    return ((number, {name: line.rstrip("\r\n")}) for number, line in enumerate(lines, start=1))


def _tsv(lines: Iterator[str], names: Sequence[str]) -> Records:
    return _named(((number, line.rstrip("\r\n").split("\t")) for number, line in enumerate(lines, start=1)), names)


def _csv(lines: Iterator[str], names: Sequence[str]) -> Records:
    def rows() -> Iterator[tuple[int, list[str]]]:
        reader, start = csv.reader(lines, strict=True), 1
        for row in reader:  # a row may span lines
            yield start, row
            start = reader.line_num + 1

    return _named(rows(), names)


def _named(rows: Iterator[tuple[int, list[str]]], names: Sequence[str]) -> Records:
    """Name the fields, as given or by the first row."""
    names = names or next(rows, (0, []))[1]
    for number, values in rows:
        if len(values) == len(names):
            yield number, dict(zip(names, values, strict=True))
        else:
            expected = f": expected {len(names)} ({', '.join(names)}), got {len(values)}"
            yield number, BadRow("a wrong number of fields", expected)


def _jsonl(lines: Iterator[str], _names: Sequence[str]) -> Records:
    for number, line in enumerate(lines, start=1):
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            yield number, BadRow("not JSON", f" ({error.msg})")


def _json(lines: Iterator[str], _names: Sequence[str]) -> Records:
    rows = json.loads("".join(lines))
    if not isinstance(rows, list):
        raise TypeError(f"expected a list of objects, got {type(rows).__name__}")
    return iter(enumerate(rows, start=1))


_FORMATS: dict[str, Callable[[Iterator[str], Sequence[str]], Records]] = {
    ".tsv": _tsv,
    ".csv": _csv,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
}


class Strings(Sequence[str]):
    """A growing list of strings in one UTF-8 buffer: 8 bytes a string beyond its text."""

    def __init__(self) -> None:
        self._buffer, self._ends = bytearray(), array("q", [0])

    def append(self, text: str) -> None:
        """Add one. Raises UnicodeEncodeError for a lone surrogate."""
        self._buffer += text.encode()
        self._ends.append(len(self._buffer))

    def __len__(self) -> int:
        """Count the strings."""
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        """Return one string."""
        index = range(len(self))[index]
        return self._buffer[self._ends[index] : self._ends[index + 1]].decode()


class Lists(Sequence[list[str]]):
    """A growing list of lists of strings, kept like `Strings`."""

    def __init__(self) -> None:
        self._strings, self._ends = Strings(), array("q", [0])

    def append(self, texts: Iterable[str]) -> None:
        """Add one list. Raises UnicodeEncodeError for a lone surrogate."""
        for text in texts:
            self._strings.append(text)
        self._ends.append(len(self._strings))

    def __len__(self) -> int:
        """Count the lists."""
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        """Return one list."""
        index = range(len(self))[index]
        return [self._strings[i] for i in range(self._ends[index], self._ends[index + 1])]

    def lengths(self) -> set[int]:
        """Return the lengths that occur."""
        return {self._ends[i + 1] - self._ends[i] for i in range(len(self))}


class Labels(list[str]):
    """A list of strings of which few differ: equal ones are one object."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[str, str] = {}

    def append(self, label: str) -> None:
        """Add one."""
        super().append(self._known.setdefault(label, label))


def text_key(text: str) -> int:
    """Return 64 bits that tell texts apart: of two million, two would share theirs once in ten million times."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


COLUMNS: dict[str, Callable[[], Any]] = {
    "text": Strings,
    "texts": Lists,
    "number": lambda: array("d"),
    "label": Labels,
}
"""What holds a column of each kind; each can be appended to."""
