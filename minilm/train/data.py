"""Sources of rows to train on, read into columns, every row checked.

A `Source` says how a file is read and how a run uses it; `read_table` reads it. A row that can't be used (a column
missing, an empty text, no negatives, a score that is no number) is named by file and line: it is an error, or skipped
and counted, as the source says.
"""

from __future__ import annotations

import logging
import math
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from minilm.train.rows import COLUMNS, BadRow, DataError, Record, Records, read_records

logger = logging.getLogger(__name__)

ON_BAD_ROW = ("error", "skip")

Row = dict[str, Any]


@dataclass(frozen=True)
class Draw:
    """Texts drawn from a row's list anew each time the row is used.

    Attributes:
        column: the column of kind `texts` to draw from.
        into: the batch's columns that get one text each, no text twice; by default `column` itself.
        count: instead, how many texts the one column of `into` gets as a list; with repeats where there are fewer.
    """

    column: str
    into: tuple[str, ...] = ()
    count: int | None = None

    def __post_init__(self) -> None:
        """Check the fields, and turn a single name or a list into a tuple."""
        into = (self.into,) if isinstance(self.into, str) else tuple(self.into) or (self.column,)
        object.__setattr__(self, "into", into)
        if self.count is not None and (self.count < 1 or len(into) > 1):
            raise DataError(f"draw from {self.column!r}: a count must be at least 1 and go into one column, got {self}")


@dataclass(frozen=True)
class Source:
    """How to read one file, and how a run uses its rows: what a `[[data]]` table of a recipe says.

    Attributes:
        path: the file, relative to the folder given when it is read.
        columns: what to read: the kind of each column, `text`, `texts` (a list; a single text is a list of one),
            `number` (finite) or `label` (any string, not to be encoded). A text may be an object, as a passage is.
        fields: the names of a TSV or CSV file's fields in order, where it has no header; the name of a line of text.
        rename: other names for fields, `{field: column}`.
        text_fields: of an object in place of a text, the fields to join by a space; those it lacks are left out.
        keep: `{field: values}`: rows with another value are passed over.
        origins: a TSV file beside it with the columns source, first_line and last_line; it gives each line within one
            of the ranges a field `source`, and the others are passed over.
        group_by: a label; all rows with one value of it become one row, whose texts are lists.
        draw: texts to be drawn from lists; see `Draw`.
        distinct: columns of kind `text` or `label`: rows that share a value there never meet in a batch, where each
            would pass for a negative of the other.
        weight: how large a part of a run's rows comes from here, relative to the other sources; None, with all others
            None: every row once an epoch. Or a weight for each value of `weigh_by`, other values being passed over.
        weigh_by: a label.
        on_bad_row: `error`, or `skip`.

    Raises:
        DataError: a field is wrong.
    """

    path: str
    columns: Mapping[str, str]
    fields: tuple[str, ...] = ()
    rename: Mapping[str, str] = field(default_factory=dict)
    text_fields: tuple[str, ...] = ("title", "text")
    keep: Mapping[str, Sequence[str]] = field(default_factory=dict)
    origins: str | None = None
    group_by: str | None = None
    draw: tuple[Draw, ...] = ()
    distinct: tuple[str, ...] = ()
    weight: float | Mapping[str, float] | None = None
    weigh_by: str | None = None
    on_bad_row: str = "error"

    def __post_init__(self) -> None:
        """Check what can be checked without the file, and turn lists into tuples."""
        for name in ("fields", "text_fields", "distinct"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "draw", tuple(d if isinstance(d, Draw) else Draw(**d) for d in self.draw))
        for rule, holds in self._rules().items():
            if not holds:
                raise DataError(f"{self.path}: {rule}; got {self}")

    def _rules(self) -> dict[str, bool]:
        """Say what must hold, and whether it does."""
        kinds, group = self.kinds, self.group_by
        weights = self.weight.values() if isinstance(self.weight, Mapping) else [self.weight]
        weighed = kinds.get(self.weigh_by or "") == "label" if isinstance(self.weight, Mapping) else not self.weigh_by
        others = {kind for column, kind in self.columns.items() if column != group}
        return {
            f"each column has a kind, one of {', '.join(COLUMNS)}": bool(kinds) and set(kinds.values()) <= set(COLUMNS),
            "group_by is a label, beside columns of kind text": not group
            or (kinds.get(group) == "label" and others == {"text"}),
            "draw takes from columns of kind texts": {kinds.get(draw.column) for draw in self.draw} <= {"texts"},
            "distinct columns are of kind text or label": {kinds.get(c) for c in self.distinct} <= {"text", "label"},
            "weights are positive": bool(weights) and all(weight is None or weight > 0 for weight in weights),
            "weigh_by is the label that weight has values of": weighed,
            f"on_bad_row is one of {', '.join(ON_BAD_ROW)}": self.on_bad_row in ON_BAD_ROW,
        }

    @property
    def kinds(self) -> dict[str, str]:
        """The kind of each column once rows are grouped."""
        grouped = self.group_by is not None
        return {c: "texts" if grouped and kind == "text" else kind for c, kind in self.columns.items()}

    @property
    def kept(self) -> dict[str, Sequence[str]]:
        """The values that each field of a row to be kept may have."""
        weighed = {self.weigh_by: tuple(self.weight)} if isinstance(self.weight, Mapping) and self.weigh_by else {}
        return {**self.keep, **weighed}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Source:
        """Make one from a recipe's table.

        Raises:
            DataError: an unknown or missing setting, or a wrong one.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(settings) - known):
            raise DataError(f"unknown data setting {', '.join(unknown)}; there are {', '.join(sorted(known))}")
        try:
            return cls(**settings)
        except (AttributeError, TypeError) as error:
            raise DataError(f"data settings {dict(settings)} are no source: {error}") from None


class BadRows:
    """What becomes of rows that can't be used: an error, or a count.

    Attributes:
        name: of the file.
        on_bad_row: `error` or `skip`.
        counts: rows skipped, by reason.
    """

    def __init__(self, name: str, on_bad_row: str) -> None:
        self.name, self.on_bad_row = name, on_bad_row
        self.counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, where: str, reason: str, detail: str = "", remedy: str = "correct it") -> None:
        """Raise, or count a row.

        Args:
            where: the row, by file and line.
            reason: what is wrong, in words that many rows may share.
            detail: what is wrong in this row.
            remedy: what to do about it.

        Raises:
            DataError: rows are not to be skipped.
        """
        if self.on_bad_row == "error":
            raise DataError(f'{where}: {reason}{detail}; {remedy}, or set on_bad_row = "skip"') from None
        self.counts[reason] += 1
        self._first.setdefault(reason, where)

    def report(self) -> None:
        """Warn, once, of what was skipped."""
        if self.counts:
            reasons = (f"{count} x {reason} (first: {self._first[reason]})" for reason, count in self.counts.items())
            logger.warning("%s: skipped %d bad rows: %s", self.name, self.counts.total(), "; ".join(reasons))


@dataclass(frozen=True)
class Table:
    """The rows of a source, by column.

    Attributes:
        source: what was read.
        name: of the file.
        columns: by name, a sequence of one value a row: strings, lists of strings, numbers or labels.
        lines: the line of each row in the file, the first is 1; of a list in JSON, its element.
        skipped: bad rows that were skipped, by reason.
    """

    source: Source
    name: str
    columns: Mapping[str, Sequence[Any]]
    lines: Sequence[int]
    skipped: Mapping[str, int]

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.lines)

    def where(self, row: int) -> str:
        """Name a row by file and line."""
        return f"{self.name}, line {self.lines[row]}"

    def texts(self, row: int) -> list[str]:
        """Return all that may be encoded of a row."""
        found: list[str] = []
        for column, kind in self.source.kinds.items():
            if kind in ("text", "texts"):
                value = self.columns[column][row]
                found += [value] if kind == "text" else value
        return found


def read_table(source: Source, folder: str | os.PathLike[str] = ".") -> Table:
    """Read a source's file.

    Raises:
        DataError: the file is damaged or holds no row, or a row can't be used and is not to be skipped.
        OSError: it can't be opened.
    """
    path = Path(folder) / source.path
    records = read_records(path, source.fields)
    if source.origins:
        records = _with_origin(records, path.parent / source.origins)
    return _make(records, source, str(path))


def make_table(rows: Iterable[Record], source: Source) -> Table:
    """Take rows from memory as `read_table` takes them from a file; `source.path` is their name, line 1 the first.

    Raises:
        DataError: there is no row, or one can't be used and is not to be skipped.
    """
    return _make(iter(enumerate(rows, start=1)), source, source.path)


def _make(records: Records, source: Source, name: str) -> Table:
    """Check records, group them if so asked, and put them into columns."""
    bad = BadRows(name, source.on_bad_row)
    rows = _checked(records, source, bad)
    if source.group_by:
        rows = _grouped(rows, source.group_by)
    if source.draw:
        rows = _drawable(rows, source, bad)
    columns = {column: COLUMNS[kind]() for column, kind in source.kinds.items()}
    lines = array("q")
    for line, row in rows:
        for column, values in columns.items():
            values.append(row[column])
        lines.append(line)
    bad.report()
    if not lines:
        raise DataError(f"{name} holds no row to train on ({bad.counts.total()} bad ones); {source}")
    return Table(source, name, columns, lines, dict(bad.counts))


def _with_origin(records: Records, path: Path) -> Records:
    """Give each record, by its line, the field `source`; pass over lines that no range of the file `path` names."""
    try:
        ranges = sorted((int(r["first_line"]), int(r["last_line"]), r["source"]) for _, r in read_records(path))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} must be a table with a header: source, first_line, last_line; got {error!r}") from None
    index = 0
    for line, record in records:
        while index < len(ranges) and line > ranges[index][1]:
            index += 1
        if index < len(ranges) and line >= ranges[index][0]:
            yield line, record if isinstance(record, BadRow) else {**record, "source": ranges[index][2]}


def _checked(records: Records, source: Source, bad: BadRows) -> Iterator[tuple[int, Row]]:
    """Give the rows that can be used, with the source's columns."""
    names = {column: name for name, column in source.rename.items()}
    for line, record in records:
        try:
            if isinstance(record, BadRow):
                raise record
            if not isinstance(record, Mapping):
                raise BadRow("not an object with fields", f": {_shown(record)}")
            if not all(_value(record, name) in values for name, values in source.kept.items()):
                continue
            row = {
                column: _CONVERT[kind](_value(record, names.get(column, column)), column, source.text_fields)
                for column, kind in source.columns.items()
            }
        except BadRow as problem:
            bad.add(f"{bad.name}, line {line}", problem.reason, problem.detail)
        else:
            yield line, row


def _grouped(rows: Iterator[tuple[int, Row]], by: str) -> Iterator[tuple[int, Row]]:
    """Merge the rows of each group into one, at the line of its first: lists of its different texts."""
    groups: dict[str, tuple[int, Row]] = {}
    for line, row in rows:
        _, merged = groups.setdefault(row[by], (line, {column: {} for column in row if column != by}))
        for column, texts in merged.items():
            texts[row[column]] = None
    for name, (line, merged) in groups.items():
        yield line, {by: name, **{column: list(texts) for column, texts in merged.items()}}


def _drawable(rows: Iterator[tuple[int, Row]], source: Source, bad: BadRows) -> Iterator[tuple[int, Row]]:
    """Pass over rows that have too few texts to draw different ones from."""
    needed = {draw.column: len(draw.into) for draw in source.draw}
    for line, row in rows:
        short = [column for column, count in needed.items() if len(row[column]) < count]
        if short:
            lacking = f"{short[0]!r} holds fewer than {needed[short[0]]} texts"
            bad.add(f"{bad.name}, line {line}", lacking, f": {_shown(row[short[0]])}")
        else:
            yield line, row


def _value(record: Record, name: str) -> Any:
    """Return a field of a record."""
    if (value := record.get(name)) is None:
        raise BadRow(f"no {name!r}", f"; it has {', '.join(map(repr, record)) or 'nothing'}")
    return value


def _text(value: Any, column: str, text_fields: Sequence[str]) -> str:
    """Check a text, or join the fields of one."""
    if isinstance(value, Mapping):
        value = " ".join(str(value[name]) for name in text_fields if value.get(name))
    if not isinstance(value, str):
        raise BadRow(f"{column!r} is no text", f": {_shown(value)}")
    if not value.strip():
        raise BadRow(f"{column!r} is empty")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadRow(f"{column!r} is not UTF-8", f" at character {error.start}") from None
    return value


def _texts(value: Any, column: str, text_fields: Sequence[str]) -> list[str]:
    """Check a list of texts; a text is a list of one."""
    values = value if isinstance(value, list | tuple) else [value]
    if not values:
        raise BadRow(f"{column!r} holds no text")
    return [_text(item, column, text_fields) for item in values]


def _number(value: Any, column: str, _: Sequence[str]) -> float:
    """Check a number."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise BadRow(f"{column!r} is no finite number", f": {_shown(value)}")
    return number


def _label(value: Any, column: str, _: Sequence[str]) -> str:
    """Check a label."""
    return _text(str(value), column, ())


_CONVERT: dict[str, Callable[[Any, str, Sequence[str]], Any]] = {
    "text": _text,
    "texts": _texts,
    "number": _number,
    "label": _label,
}


def _shown(value: Any) -> str:
    """Return a value, shortened."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
