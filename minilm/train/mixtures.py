"""Several sources as one sequence of rows, each with its weight."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from minilm.train.data import Source, Table, read_table
from minilm.train.rows import DataError

Rows = NDArray[np.int64]


class Part(NamedTuple):
    """Some rows of a table, with the weight they have together; None: as many as there are."""

    table: Table
    rows: Rows
    weight: float | None


class Mixture:
    """Rows of one or several sources, as one sequence.

    Args:
        parts: tables, which rows of them, and their weights.

    Raises:
        DataError: only some parts have a weight, or there is no row.
    """

    def __init__(self, parts: Iterable[Part]) -> None:
        self.parts = [part for part in parts if len(part.rows)]
        if not self.parts or len({part.weight is None for part in self.parts}) > 1:
            names = ", ".join(f"{part.table.name} {part.weight}" for part in self.parts)
            raise DataError(f"expected sources with rows, and a weight for all of them or none; got {names or 'none'}")
        self._starts = np.cumsum([0, *(len(part.rows) for part in self.parts)])

    @classmethod
    def of(cls, tables: Iterable[Table]) -> Mixture:
        """Mix whole tables as their sources say; raises as the class does."""
        return cls(part for table in tables for part in _parts(table))

    @classmethod
    def read(cls, sources: Iterable[Source], folder: str | os.PathLike[str] = ".") -> Mixture:
        """Read sources from a folder and mix them as they say; raises as the class and `read_table` do."""
        return cls.of([read_table(source, folder) for source in sources])

    def __len__(self) -> int:
        """Count the rows."""
        return int(self._starts[-1])

    def find(self, row: int) -> tuple[int, int]:
        """Return which part a row is of, and which row of that part's table it is."""
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        return part, int(self.parts[part].rows[row - self._starts[part]])

    def where(self, row: int) -> str:
        """Name a row by file and line."""
        part, table_row = self.find(row)
        return self.parts[part].table.where(table_row)

    def texts(self) -> Iterator[tuple[int, str]]:
        """Give each row's place and each text of it, those to be drawn from too."""
        for start, part in zip(self._starts, self.parts, strict=False):
            for row, table_row in enumerate(part.rows, int(start)):
                for text in part.table.texts(table_row):
                    yield row, text

    def without(self, rows: Rows) -> Mixture:
        """Leave out some rows."""
        keep = np.ones(len(self), dtype=bool)
        keep[rows] = False
        kept = np.split(keep, self._starts[1:-1])
        return Mixture(p._replace(rows=p.rows[mask]) for p, mask in zip(self.parts, kept, strict=True))

    def sample(self, count: int, seed: int = 0) -> Mixture:
        """Choose `count` different rows by weight, once and for all, as a teacher's vectors are dear.

        A larger sample of the same seed holds (but for a few rows) the smaller ones. A source with fewer rows than its
        share gives them all, and the others no more for it.
        """
        drawn = np.concatenate(list(self.draw(count, seed)))
        return self.without(np.setdiff1d(np.arange(len(self)), drawn)).unweighted()

    def unweighted(self) -> Mixture:
        """Drop the weights: every row once an epoch."""
        return Mixture(part._replace(weight=None) for part in self.parts)

    def draw(self, count: int, seed: int, turn: int = 0) -> Iterator[Rows]:
        """Give each part's share of `count` rows, as places in the mixture.

        A part's rows come shuffled in an endless stream, all of them before any again; each turn gets the next of it.
        """
        for index, share in enumerate(self._shares(count)):
            start, size = self._starts[index], len(self.parts[index].rows)
            first = turn * share
            rounds = range(first // size, -(-(first + share) // size))
            shuffled = [np.random.default_rng([seed, 0, index, n]).permutation(size) for n in rounds]
            stream = np.concatenate([np.empty(0, np.int64), *shuffled])
            yield start + stream[first % size : first % size + share]

    def _shares(self, count: int) -> list[int]:
        """Split a number of rows by weight, to the nearest whole numbers of that sum."""
        weights = np.array([len(part.rows) if part.weight is None else part.weight for part in self.parts])
        exact = count * weights / weights.sum()
        shares = np.floor(exact).astype(np.int64)
        shares[np.argsort(shares - exact, kind="stable")[: count - shares.sum()]] += 1
        return [int(share) for share in shares]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the sources, their sizes and a thousand rows, to tell one mixture from another."""
        digest = hashlib.sha256(
            repr([(part.table.source, len(part.rows), part.weight) for part in self.parts]).encode()
        )
        for row in np.linspace(0, len(self) - 1, 1_000).astype(int):
            part, table_row = self.find(row)
            digest.update(repr(self.parts[part].table.texts(table_row)).encode())
        return digest.hexdigest()


def _parts(table: Table) -> Iterator[Part]:
    """Split a table by the labels that its source weighs, if it does."""
    weight = table.source.weight
    if not isinstance(weight, Mapping):
        yield Part(table, np.arange(len(table)), weight)
        return
    rows = {label: array("q") for label in weight}
    for row, label in enumerate(table.columns[table.source.weigh_by or ""]):
        rows[label].append(row)
    if empty := [label for label in weight if not rows[label]]:
        raise DataError(f"{table.name} has no row with {table.source.weigh_by} {', '.join(empty)}, given a weight")
    for label, its_weight in weight.items():
        yield Part(table, np.array(rows[label]), its_weight)
