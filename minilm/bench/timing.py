"""Timing calls on a CPU and on a GPU, and what several timings come to."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

Call = Callable[[], Any]

MOST_CALLS = 200  # timed in one turn


class Timer(Protocol):
    """Times calls one by one."""

    def time(self, calls: Sequence[Call], count: int) -> list[float]:
        """Make `count` calls, in turn through `calls`, and return the seconds that each took."""


class HostTimer:
    """Seconds that pass for the one who waits for the result.

    Args:
        synchronize: waits until the device is done, if it works on its own.
        clock: tells the time in seconds.
    """

    def __init__(self, synchronize: Call | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._synchronize = synchronize
        self._clock = clock

    def time(self, calls: Sequence[Call], count: int) -> list[float]:
        """See `Timer`."""
        times = []
        for index in range(count):
            call = calls[index % len(calls)]
            start = self._clock()
            call()
            if self._synchronize:
                self._synchronize()
            times.append(self._clock() - start)
        return times


class CudaTimer:
    """Seconds between events on the GPU's own time line: calls follow one another without waiting for the host."""

    def time(self, calls: Sequence[Call], count: int) -> list[float]:
        """See `Timer`."""
        import torch

        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        torch.cuda.synchronize()
        for index, (start, end) in enumerate(events):
            start.record()
            calls[index % len(calls)]()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1_000 for start, end in events]


def make_timer(device: str, kind: str) -> Timer:
    """Return the timer for a kind of work: what ends in the GPU's memory is timed there, all else from outside."""
    if not device.startswith("cuda"):
        return HostTimer()
    if kind != "texts":
        return CudaTimer()
    import torch

    return HostTimer(torch.cuda.synchronize)


def take_turn(timer: Timer, calls: Sequence[Call], seconds: float, estimate: float) -> list[float]:
    """Time as many calls as fit into `seconds`, at least one; short ones after one that does not count.

    Args:
        timer: what times them.
        calls: the same work on different inputs.
        seconds: how long the turn may take.
        estimate: how long one call takes, about.
    """
    if estimate < seconds:
        timer.time(calls, 1)  # wakes threads, and brings weights back into the caches
    return timer.time(calls, max(1, min(MOST_CALLS, int(seconds / max(estimate, 1e-9)))))


def wait_until_quiet(
    limit: float = 0.5,
    clock: Callable[[], float] = time.perf_counter,
    cpu_clock: Callable[[], float] = time.process_time,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Wait until this process uses no processor time: threads that spin for new work would tax whoever is next.

    Args:
        limit: the longest wait, in seconds.
        clock: tells the time.
        cpu_clock: tells the processor time of all threads.
        sleep: lets time pass.
    """
    pause, end = 0.005, clock() + limit
    while clock() < end:
        used = cpu_clock()
        sleep(pause)
        if cpu_clock() - used < pause / 5:
            return


def quantiles(values: Sequence[float]) -> dict[str, float | int]:
    """Return median, p10, p90 (linear between neighbours), and how many values there are."""
    ordered = sorted(values)
    figures: dict[str, float | int] = {}
    for name, share in (("median", 0.5), ("p10", 0.1), ("p90", 0.9)):
        place = share * (len(ordered) - 1)
        below, above = ordered[math.floor(place)], ordered[math.ceil(place)]
        figures[name] = below + (above - below) * (place - math.floor(place))
    return {**figures, "rounds": len(ordered)}


def peak_memory() -> int | None:
    """Return the most memory that this process has held, in bytes; None where the system does not say."""
    try:
        with open("/proc/self/status", encoding="utf-8") as status:  # noqa: PTH123 - nothing is imported for this
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:
        return None
    import sys

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
