"""Timers, turns and quantiles, by clocks that only move when told to."""

import statistics
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minilm.bench.timing import (
    MOST_CALLS,
    CudaTimer,
    HostTimer,
    make_timer,
    peak_memory,
    quantiles,
    take_turn,
    wait_until_quiet,
)


class Clock:
    """A clock, and calls that take a known time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def taking(self, seconds: float):
        def call() -> None:
            self.calls.append(seconds)
            self.now += seconds

        return call


def test_host_timer_rotates_through_the_calls():
    clock = Clock()
    assert HostTimer(clock=clock).time([clock.taking(1.0), clock.taking(3.0)], 5) == [1, 3, 1, 3, 1]


def test_host_timer_waits_for_the_device():
    clock = Clock()
    assert HostTimer(clock.taking(0.5), clock).time([clock.taking(1.0)], 2) == [1.5, 1.5]


def test_cuda_timer_reads_events_after_the_last_call(monkeypatch):
    clock, synchronized = Clock(), []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock.now

        def elapsed_time(self, end: "Event") -> float:
            assert len(synchronized) == 2, "read before the GPU is done"
            return 1_000 * (end.at - self.at)

    cuda = SimpleNamespace(Event=Event, synchronize=lambda: synchronized.append(clock.now))
    monkeypatch.setattr(torch, "cuda", cuda)
    assert CudaTimer().time([clock.taking(1.0), clock.taking(2.0)], 3) == [1, 2, 1]
    assert synchronized == [0, 4]


@pytest.mark.parametrize(
    ("device", "kind", "expected"),
    [
        ("cpu", "texts", HostTimer),
        ("cpu", "tokens", HostTimer),
        ("cuda:1", "tokens", CudaTimer),
        ("cuda", "texts", HostTimer),
    ],
)
def test_who_times_what(device, kind, expected):
    assert type(make_timer(device, kind)) is expected


@pytest.mark.parametrize(
    ("taken", "expected"),
    [(0.1, 1 + 10), (0.3, 1 + 3), (2.0, 1), (1e-4, 1 + MOST_CALLS)],
    ids=["ten-fit", "three-fit", "one-is-longer-than-the-turn", "no-more-than-the-limit"],
)
def test_a_turn_is_as_long_as_told(taken, expected):
    clock = Clock()
    times = take_turn(HostTimer(clock=clock), [clock.taking(taken)], 1.0, taken * 0.999)
    assert len(clock.calls) == expected
    assert len(times) == (expected - 1 or 1)
    assert times == pytest.approx([taken] * len(times))


@pytest.mark.parametrize(("spinning", "waited"), [(0.0, 0.005), (0.1, 0.105), (9.0, 0.5)])
def test_waits_until_no_thread_spins(spinning, waited):
    clock = Clock()
    wait_until_quiet(0.5, clock, lambda: min(clock.now, spinning), clock.sleep)
    assert clock.now == pytest.approx(waited, abs=0.006)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_quantiles(count):
    values = np.random.default_rng(count).lognormal(size=count).tolist()
    expected = dict(zip(("p10", "median", "p90"), np.quantile(values, [0.1, 0.5, 0.9]), strict=True))
    assert quantiles(values) == pytest.approx({**expected, "rounds": count})
    assert quantiles(values)["median"] == pytest.approx(statistics.median(values))


def test_peak_memory_is_this_process_s_own():
    """A process just started holds little, however much the one that started it does."""
    code = "from minilm.bench.timing import peak_memory; print(peak_memory())"
    small = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 1e6 < small < 1e8
    assert peak_memory() > small
