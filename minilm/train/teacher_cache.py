"""Teachers' vectors, computed once: kept on disk by text, gone on with after any interruption, and read by memory map.

A folder belongs to one teacher and holds `teacher.json` (which one), `vectors.npy` `[n, D]` and `keys.npy` `[n]`, a
hash of each vector's text. Vectors are appended before their keys, and what has no key doesn't count: whenever the
process is killed, what is there is whole.
"""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from minilm.progress import progress_bar
from minilm.train.rows import text_key
from minilm.train.teachers import Teacher, encode, teacher_identity

logger = logging.getLogger(__name__)

DTYPES = ("float16", "float32")
CHUNK, GPU_CHUNK = 512, 16_384
"""Texts embedded between two writes, what is lost at most: by a teacher on a CPU, and on a GPU."""
_HEADER = 128


class CachedTeacher:
    """A teacher that computes no text's vector twice, in this process or another.

    Args:
        folder: where its vectors are kept; made if need be.
        teacher: who computes them; without one, only what is there can be had.
        dtype: of the numbers on disk, `float16` or `float32`; by default what the folder has, or float16 in a new one.
        identity: what tells this teacher from others; by default `teacher_identity(teacher)`.

    Raises:
        ValueError: the folder is another teacher's or of another dtype, or the teacher has no identity of its own.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        teacher: Teacher | None = None,
        *,
        dtype: str | None = None,
        identity: str | None = None,
    ) -> None:
        if dtype not in (None, *DTYPES):
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
        self.folder, self.teacher = Path(folder).expanduser(), teacher
        self.identity = identity or (None if teacher is None else teacher_identity(teacher))
        self._dtype = dtype
        self._read()

    def __len__(self) -> int:
        """Count the vectors kept."""
        return len(self._sorted_keys)

    @property
    def vectors(self) -> NDArray[np.floating[Any]]:
        """All vectors kept, `[n, D]`, in the order they came, as a memory map."""
        return self._vectors

    def encode(self, sentences: Sequence[str]) -> NDArray[np.float32]:
        """Return the texts' vectors as they are kept, in float32 `[n, D]`; those that lack are computed first.

        Raises:
            ValueError: some lack, and there is no teacher to ask; or it gives no usable vectors.
        """
        keys = np.array([text_key(text) for text in sentences], np.uint64)
        if not self._has(keys).all():
            self.embed(sentences, show_progress_bar=False)
        places = self._order[np.searchsorted(self._sorted_keys, keys)] if len(keys) else np.empty(0, np.int64)
        return self._vectors[places].astype(np.float32)

    def embed(
        self, texts: Iterable[str], *, chunk_size: int | None = None, show_progress_bar: bool | None = None
    ) -> int:
        """Compute the vectors that lack, and return how many that were. Killed at any time, it can be called again.

        Args:
            texts: as many as there are, read as they are needed.
            chunk_size: texts to be embedded between two writes; by default `CHUNK`, on a GPU `GPU_CHUNK`.
            show_progress_bar: by default, if the `minilm` logger is at level INFO or below.

        Raises:
            ValueError: there is no teacher to ask, or it gives no usable vectors.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        on_cpu = torch.device(getattr(self.teacher, "device", "cpu")).type == "cpu"
        chunk_size = chunk_size or (CHUNK if on_cpu else GPU_CHUNK)
        total = len(texts) if isinstance(texts, Sized) else None
        with _locked(self.folder), progress_bar(show_progress_bar, total, "embed", "text") as advance:
            self._read()  # another process may have added some
            before, known, iterator = len(self), set(self._sorted_keys.tolist()), iter(texts)
            try:
                count = before
                while chunk := _unknown(iterator, known, chunk_size, advance):
                    self._add(chunk, count)
                    count += len(chunk)
                    advance(len(chunk))
            finally:
                self._read()
        return count - before

    # Inner steps.

    def _read(self) -> None:
        """Take up what the folder holds."""
        about = self.folder / "teacher.json"
        stored = json.loads(about.read_text(encoding="utf-8")) if about.exists() else {}
        for name, here in (("teacher", self.identity), ("dtype", self._dtype)):
            if stored and here not in (None, stored[name]):
                raise ValueError(
                    f"{self.folder} holds vectors with {name} {stored[name]!r}, not {here!r}; choose another folder"
                )
        self._stored_dtype, width = np.dtype(stored.get("dtype", self._dtype or "float16")), stored.get("width", 0)
        vectors, keys = self.folder / "vectors.npy", self.folder / "keys.npy"
        count = min(_rows(vectors, width * self._stored_dtype.itemsize), _rows(keys, 8))
        self._vectors = _mapped(vectors, self._stored_dtype, (count, width))
        unsorted = np.array(_mapped(keys, np.dtype(np.uint64), (count,)))
        self._order = np.argsort(unsorted, kind="stable")
        self._sorted_keys = unsorted[self._order]

    def _has(self, keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Tell which keys have a vector."""
        if not len(self):
            return np.zeros(len(keys), bool)
        found = self._sorted_keys[np.searchsorted(self._sorted_keys, keys).clip(max=len(self) - 1)]
        matches: NDArray[np.bool_] = found == keys
        return matches

    def _add(self, chunk: dict[int, str], count: int) -> None:
        """Compute the vectors of texts, given by their keys, and write them behind the first `count`."""
        if self.teacher is None:
            raise ValueError(
                f"{self.folder} lacks the vectors of {len(chunk)} texts or more, such as "
                f"{next(iter(chunk.values()))!r}, and there is no teacher to compute them: "
                "give one, or embed these texts first"
            )
        computed = encode(self.teacher, list(chunk.values()))
        with np.errstate(over="ignore"):
            vectors = computed.astype(self._stored_dtype)
        width = self._vectors.shape[1] or vectors.shape[1]
        if vectors.shape[1] != width or not np.isfinite(vectors).all():
            raise ValueError(
                f"expected vectors [n, {width}] that {self._stored_dtype} can hold, got {list(vectors.shape)} with "
                f"entries up to {np.abs(computed).max():.3g}"
            )
        about = {"teacher": self.identity, "dtype": str(self._stored_dtype), "width": width}
        _write_once(self.folder / "teacher.json", json.dumps(about, indent=2) + "\n")
        _append(self.folder / "vectors.npy", vectors, count)
        _append(self.folder / "keys.npy", np.array(list(chunk), np.uint64), count)


def _unknown(texts: Iterator[str], known: set[int], count: int, advance: Callable[[int], object]) -> dict[int, str]:
    """Take the next texts whose keys are unknown, up to `count`, and note their keys as known."""
    found: dict[int, str] = {}
    for text in texts:
        key = text_key(text)
        if key in known:
            advance(1)
            continue
        known.add(key)
        found[key] = text
        if len(found) == count:
            break
    return found


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let no other process write to the folder until the block ends; where files can't be locked, trust to that."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            logger.warning("another process writes to %s; waiting for it", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield  # a closed file is unlocked, a killed process's too


def _write_once(path: Path, content: str) -> None:
    """Write a file that does not exist yet, whole or not at all."""
    if not path.exists():
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        partial.write_text(content, encoding="utf-8")
        partial.replace(path)


def _rows(path: Path, row_bytes: int) -> int:
    """Count the whole rows of a file in numpy's format, whatever its header says."""
    return max(0, path.stat().st_size - _HEADER) // row_bytes if row_bytes and path.exists() else 0


def _mapped(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Map a file in numpy's format into memory."""
    return np.memmap(path, dtype, "r", _HEADER, shape) if shape[0] else np.empty(shape, dtype)


def _append(path: Path, rows: NDArray[Any], count: int) -> None:
    """Write rows to a file in numpy's format behind its first `count`, then the number of rows to its header."""
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.truncate(_HEADER + count * rows[:1].nbytes)  # what a killed process left behind them goes
        file.seek(0, os.SEEK_END)
        file.write(rows.tobytes())
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        file.write(_header(rows.dtype, (count + len(rows), *rows.shape[1:])))


def _header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """Return the head of a file in numpy's format, version 1, of a fixed size."""
    description = repr({"descr": dtype.str, "fortran_order": False, "shape": shape}).encode()
    return b"\x93NUMPY\x01\x00" + (_HEADER - 10).to_bytes(2, "little") + description.ljust(_HEADER - 11) + b"\n"
