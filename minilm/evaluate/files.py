"""Files of evaluation data: UTF-8 lines of tab-separated columns or JSON, plain, `.gz` or `.xz`; errors name lines."""

from __future__ import annotations

import gzip
import json
import lzma
import math
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_OPEN: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}


class EvaluationDataError(OSError):
    """The evaluation data is missing, unreadable, malformed or out of reach."""


def read_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, str]]:
    r"""Yield a file's lines without their ends (`\n` or `\r\n`), numbered from 1.

    Raises:
        EvaluationDataError: the file can't be opened, is damaged or is empty, or a line is not UTF-8.
    """
    path, number = Path(path), 0
    try:
        with _OPEN.get(path.suffix, open)(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                yield number, text.removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise EvaluationDataError(f"{path}, line {number} is not UTF-8: {error}") from error
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise EvaluationDataError(f"{path} is damaged after line {number}: {error}") from error
    except EvaluationDataError:
        raise
    except OSError as error:
        raise EvaluationDataError(f"cannot read {path}: {error.strerror or error}") from error
    if number == 0:
        raise EvaluationDataError(f"{path} is empty")


def read_columns(path: str | os.PathLike[str], *forms: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the tab-separated columns of each line, numbered from 1; nothing is unquoted or stripped.

    Args:
        path: the file.
        forms: what a line may look like, such as `label<TAB>text`; the number of columns tells which.

    Raises:
        EvaluationDataError: as `read_lines`, or a line has another number of columns.
    """
    widths = {form.count("<TAB>") + 1 for form in forms}
    for number, line in read_lines(path):
        columns = line.split("\t")
        if len(columns) not in widths:
            raise line_error(path, number, " or ".join(forms), f"{len(columns)} column{'s' * (len(columns) != 1)}")
        yield number, columns


def read_records(path: str | os.PathLike[str], *keys: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the object of each line of a JSONL file, numbered from 1; the values under `keys` must be strings.

    Raises:
        EvaluationDataError: as `read_lines`, or a line is no such object.
    """
    expected = f"a JSON object with the strings {', '.join(keys)}"
    for number, line in read_lines(path):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise line_error(path, number, expected, f"no JSON ({error})") from None
        if not isinstance(record, dict):
            raise line_error(path, number, expected, type(record).__name__)
        if missing := [key for key in keys if not isinstance(record.get(key), str)]:
            raise line_error(path, number, expected, f"no string {missing[0]!r}")
        yield number, record


def as_number(value: Any, path: str | os.PathLike[str], number: int) -> float:
    """Return the score of a line as a finite number.

    Raises:
        EvaluationDataError: it is none.
    """
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise line_error(path, number, "a number as score", repr(value))
    return score


def line_error(path: str | os.PathLike[str], number: int, expected: str, got: str) -> EvaluationDataError:
    """Make the error of a malformed line: where, what was expected, what came."""
    return EvaluationDataError(f"{path}, line {number}: expected {expected}, got {got}")
