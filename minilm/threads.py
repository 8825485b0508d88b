"""Computing in threads without touching what the rest of the process sees.

Two facts about torch on a CPU shape this file. A matrix product's last bits can depend on how many threads share it, so
bitwise reproducible vectors are computed one sequence at a time, each by a single thread. And a forked child inherits
OpenMP's record of threads that no longer exist, so its inherited thread would wait for them forever; a thread started
after the fork has a record of its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Generic, ParamSpec, TypeVar

import torch

Item = TypeVar("Item")
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_inherited = threading.local()
_thread_count_lock = threading.Lock()


def _after_fork_in_child() -> None:
    """Mark the child's one thread as inherited, and drop a lock that another thread may have held."""
    global _thread_count_lock
    _thread_count_lock = threading.Lock()
    _inherited.value = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def run(function: Callable[[], Result]) -> Result:
    """Call `function` here, or in a thread of its own where this one was inherited through a fork."""
    if getattr(_inherited, "value", False):
        return _Workers(lambda _: function(), [None], 1).results()[0]
    with _thread_count_lock:  # take up torch's thread count now, not while workers below are being started
        torch.get_num_threads()
    return function()


def fork_safe(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Make a function that computes with torch usable in a forked child, through `run`."""

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        return run(lambda: function(*args, **kwargs))

    return call


def map_single_threaded(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Apply `function` to each item, in as many threads as torch uses, each of which computes on its own.

    Torch's thread count, which is also the default of threads started later, is left as it was.
    """
    with _thread_count_lock:
        count = torch.get_num_threads()
        try:
            workers = _Workers(function, items, min(count, len(items)), torch_threads=1)
        finally:
            torch.set_num_threads(count)
    return workers.results()


class _Workers(Generic[Item, Result]):
    """Threads that take items in turn; ready, with their own thread count, once constructed."""

    def __init__(
        self, function: Callable[[Item], Result], items: Sequence[Item], count: int, torch_threads: int | None = None
    ) -> None:
        self._function, self._items, self._next = function, items, iter(range(len(items)))
        self._results: dict[int, Result] = {}
        self._error: BaseException | None = None
        self._torch_threads = torch_threads
        self._ready = threading.Barrier(count + 1)
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()
        self._ready.wait()

    def results(self) -> list[Result]:
        """Wait for all items; the results are in their order. The first error of a worker is raised here."""
        try:
            for thread in self._threads:
                thread.join()
        finally:
            self._next = iter(())
        if self._error is not None:
            raise self._error
        return [self._results[index] for index in range(len(self._items))]

    def _work(self) -> None:
        if self._torch_threads is not None:
            torch.set_num_threads(self._torch_threads)
            torch.get_num_threads()  # takes effect for this thread
        self._ready.wait()
        try:
            while (index := next(self._next, None)) is not None:
                self._results[index] = self._function(self._items[index])
        except BaseException as error:
            self._error = error
            self._next = iter(())
