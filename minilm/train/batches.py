"""In which order a run sees the rows of a mixture: shuffled, in batches, resumable to the bit.

Which rows an epoch has, their order, what is drawn from their lists and how processes share a batch all follow from the
seed, the epoch and the batch's number alone. So a run that has these three goes on as if it had never stopped.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minilm.train import distributed
from minilm.train.data import BadRows, Table
from minilm.train.mixtures import Mixture, Rows
from minilm.train.rows import DataError, Lists, text_key

logger = logging.getLogger(__name__)

Vectors = Callable[[Sequence[str]], NDArray[np.float32]]
"""Gives texts their vectors `[n, D]`, such as a teacher's."""


class Batch(NamedTuple):
    """Rows of a batch, or one process's share of them.

    Attributes:
        texts: by column, a list of n texts, or of n lists of k texts.
        targets: by name, a float32 tensor: `[n]` for numbers, `[n, D]` for vectors.
        rows: the rows' places in the mixture, int64 `[n]`: `Mixture.where` names them.
        total: rows of the whole batch, over all processes.
    """

    texts: dict[str, list[Any]]
    targets: dict[str, Tensor]
    rows: Rows
    total: int


class Batches:
    """The batches of a run. Iterating gives the rest of the current epoch, and moves on to the next.

    A batch counts as done when it has been handed out: a state taken after its step leads to the next batch.

    Args:
        mixture: what to train on.
        batch_size: rows of a batch, over all processes (`distributed.share` says which are a process's own).
        columns: text columns of a batch.
        targets: what else a batch has: columns of numbers, and names in `vectors`.
        vectors: by name, the text column and what gives its texts their vectors.
        seed: of everything random here.
        rows_per_epoch: by default as many as the mixture has. Where sources have weights, each goes through its rows at
            its own pace, all of them before any again, whatever the epochs.
        by_source: make each batch of one source (or of one label that has a weight) alone.
        drop_last: leave out an epoch's last batch if it is not full.
        smallest: rows that a batch needs: 2 for contrastive losses, 1 for others, but as many as processes share it.
        on_bad_row: whether a batch with fewer rows is an error (`error`), or left out and counted (`skip`).

    Attributes:
        epoch: of the next batch, from 0.
        position: of the next batch in the epoch, from 0.

    Raises:
        DataError: a source lacks a column, lists to be batched differ in length, or there is no batch in an epoch.
        ValueError: a number out of range.
    """

    def __init__(
        self,
        mixture: Mixture,
        batch_size: int,
        *,
        columns: Sequence[str],
        targets: Sequence[str] = (),
        vectors: Mapping[str, tuple[str, Vectors]] | None = None,
        seed: int = 0,
        rows_per_epoch: int | None = None,
        by_source: bool = False,
        drop_last: bool = False,
        smallest: int = 2,
        on_bad_row: str = "error",
    ) -> None:
        if not 1 <= smallest <= batch_size or seed < 0 or (rows_per_epoch is not None and rows_per_epoch < 1):
            raise ValueError(
                "expected 1 <= smallest <= batch_size, seed >= 0 and rows_per_epoch >= 1, got "
                f"{smallest=}, {batch_size=}, {seed=}, {rows_per_epoch=}"
            )
        self.mixture, self.batch_size, self.seed = mixture, batch_size, seed
        self.rows_per_epoch = rows_per_epoch or len(mixture)
        self.by_source, self.drop_last, self.smallest = by_source, drop_last, smallest
        self._columns, self._vectors = tuple(columns), dict(vectors or {})
        self._numbers = tuple(name for name in targets if name not in self._vectors)
        for part in mixture.parts:
            _check_columns(part.table, (*columns, *(column for column, _ in self._vectors.values())), self._numbers)
        self._on_bad_row = on_bad_row
        self._keys = _keys(mixture)
        self._planned = lru_cache(maxsize=1)(self._plan)
        self.epoch = self.position = 0
        if not len(self):
            raise DataError(f"{len(mixture)} rows make no batch of {batch_size} with {drop_last=}; use a smaller one")

    def __len__(self) -> int:
        """Count the batches of the current epoch; all have as many, unless rows of one group had to be left out."""
        return len(self._planned(self.epoch))

    def __iter__(self) -> Iterator[Batch]:
        """Give the rest of the current epoch's batches."""
        epoch = self.epoch
        while self.epoch == epoch:
            batch = self.batch(epoch, self.position)
            self.position += 1
            if self.position == len(self):
                self.epoch, self.position = epoch + 1, 0
            yield batch

    def batch(self, epoch: int, position: int) -> Batch:
        """Return one batch (this process's share of it), whatever came before."""
        rows = self._planned(epoch)[position]
        seeds = np.random.default_rng([self.seed, 2, epoch, position]).integers(2**63, size=len(rows))
        share = distributed.share(len(rows))
        values = [self._row(int(row), int(seed)) for row, seed in zip(rows[share], seeds[share], strict=True)]
        texts = {column: [row[column] for row in values] for column in self._columns}
        targets = {name: torch.tensor([row[name] for row in values], dtype=torch.float32) for name in self._numbers}
        for name, (column, vectors) in self._vectors.items():
            targets[name] = torch.from_numpy(vectors([row[column] for row in values]))
        return Batch(texts, targets, rows[share], len(rows))

    def state_dict(self) -> dict[str, Any]:
        """Return what a run needs to go on from here: plain numbers and strings."""
        return {"epoch": self.epoch, "position": self.position, "order": self._order()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; the number of processes may be another.

        Raises:
            DataError: it is of other data, or of another seed, batch size or way of making batches.
        """
        here, there = self._order(), state["order"]
        if differing := [
            f"{name} {there.get(name)}, not {here[name]}" for name in here if there.get(name) != here[name]
        ]:
            raise DataError(f"this state is of another order of batches: {'; '.join(differing)}")
        self.epoch, self.position = int(state["epoch"]), int(state["position"])

    def _order(self) -> dict[str, Any]:
        """Return all that the order of rows depends on."""
        names = ("seed", "batch_size", "rows_per_epoch", "by_source", "drop_last", "smallest")
        return {"data": self.mixture.fingerprint, **{name: getattr(self, name) for name in names}}

    def _plan(self, epoch: int) -> list[Rows]:
        """Return the rows of each batch of an epoch."""
        random_numbers = np.random.default_rng([self.seed, 1, epoch])
        bad = BadRows(f"batches of epoch {epoch}", self._on_bad_row)
        pools = list(self.mixture.draw(self.rows_per_epoch, self.seed, turn=epoch))
        pools = pools if self.by_source else [np.concatenate(pools)]
        batches = [batch for pool in pools for batch in self._cut(pool, random_numbers, bad)]
        bad.report()
        return [batches[i] for i in random_numbers.permutation(len(batches))] if self.by_source else batches

    def _cut(self, rows: Rows, random_numbers: np.random.Generator, bad: BadRows) -> list[Rows]:
        """Cut shuffled rows into batches, in which no two rows have a key in common."""
        rows = random_numbers.permutation(rows)
        full, rest = divmod(len(rows), self.batch_size)
        if 0 < rest < self.smallest and not self.drop_last:
            for row in rows[-rest:]:
                reason = f"in a last batch of fewer rows than {self.smallest}"
                bad.add(self.mixture.where(row), reason, remedy="choose another batch_size")
        sizes = [self.batch_size] * full + [rest] * (rest >= self.smallest and not self.drop_last)
        if self._keys is None:
            return np.split(rows[: sum(sizes)], np.cumsum(sizes)[:-1]) if sizes else []
        rows = rows[: sum(sizes)]
        places = set_apart(self._keys[rows], sizes, random_numbers)
        if left_out := len(rows) - sum(map(len, places)):
            logger.warning(
                "%s: no place for %d of %d rows beside which they are distinct", bad.name, left_out, len(rows)
            )
        return [rows[batch] for batch in places if len(batch) >= self.smallest]

    def _row(self, row: int, seed: int) -> dict[str, Any]:
        """Return a row's values by column, those drawn from lists too."""
        part, table_row = self.mixture.find(row)
        table = self.mixture.parts[part].table
        values: dict[str, Any] = {name: column[table_row] for name, column in table.columns.items()}
        if not table.source.draw:
            return values
        drawn, random_numbers = dict[str, Any](), random.Random(seed)
        for draw in table.source.draw:
            texts = values[draw.column]
            if draw.count is None:
                drawn |= zip(draw.into, random_numbers.sample(texts, len(draw.into)), strict=True)
            elif len(texts) >= draw.count:
                drawn[draw.into[0]] = random_numbers.sample(texts, draw.count)
            else:
                drawn[draw.into[0]] = random_numbers.choices(texts, k=draw.count)
        return values | drawn


def set_apart(keys: NDArray[np.uint64], sizes: Sequence[int], random_numbers: np.random.Generator) -> list[list[int]]:
    """Put rows into batches at random, so that no two rows of a batch have a key in common.

    Rows whose keys are the most frequent come first, while there is most room; the others fill what is left.

    Args:
        keys: of each row, `[n, K]`; 0 is none.
        sizes: of the batches; n together.
        random_numbers: what to draw from.

    Returns:
        The rows of each batch in ascending order, but for those that fit nowhere.
    """
    _, values, counts = np.unique(keys, return_inverse=True, return_counts=True)
    crowding = np.where(keys == 0, 0, counts[values.reshape(keys.shape)]).max(axis=1)
    starts = random_numbers.random(len(keys)).tolist()
    batches: list[list[int]] = [[] for _ in sizes]
    used: list[set[int]] = [set() for _ in sizes]
    unfilled = list(range(len(sizes)))
    for row in np.argsort(-crowding, kind="stable").tolist():
        its_keys = {key for key in keys[row].tolist() if key}
        start = int(starts[row] * len(unfilled))
        for place in (*range(start, len(unfilled)), *range(start)):
            batch = unfilled[place]
            if used[batch].isdisjoint(its_keys):
                used[batch] |= its_keys
                batches[batch].append(row)
                if len(batches[batch]) == sizes[batch]:
                    del unfilled[place]
                break
    return [sorted(batch) for batch in batches]


def _check_columns(table: Table, columns: Sequence[str], numbers: Sequence[str]) -> None:
    """Raise `DataError` if a table can't give these columns of texts and of numbers."""
    source = table.source
    offered = dict(source.kinds)
    for draw in source.draw:
        offered |= dict.fromkeys(draw.into, "text" if draw.count is None else "drawn texts")
    wrong = [c for c in columns if offered.get(c, "none") not in ("text", "texts", "drawn texts")]
    if wrong := wrong + [c for c in numbers if offered.get(c) != "number"]:
        has = ", ".join(f"{column} ({kind})" for column, kind in offered.items())
        raise DataError(f"{table.name} gives no {', '.join(wrong)}; it has {has}")
    for column in columns:
        values = table.columns.get(column)
        if offered[column] == "texts" and isinstance(values, Lists) and len(values.lengths()) > 1:
            raise DataError(
                f"{table.name}: rows have different numbers of {column}; draw a count of them: "
                f'draw = [{{column = "{column}", count = 4}}]'
            )


def _keys(mixture: Mixture) -> NDArray[np.uint64] | None:
    """Return hashes of what rows must be distinct in, `[rows, most such columns]`, 0 where there is none; or None."""
    width = max(len(part.table.source.distinct) for part in mixture.parts)
    if not width:
        return None
    keys = np.zeros((len(mixture), width), np.uint64)
    for row in range(len(mixture)):
        part, table_row = mixture.find(row)
        table = mixture.parts[part].table
        for place, column in enumerate(table.source.distinct):
            keys[row, place] = text_key(table.columns[column][table_row])
    return keys
