"""Where the time goes: on a CPU by the backend's operations and by torch's operators, on a GPU by kernels."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from minilm.bench.engines import Engine, Ours
from minilm.bench.workloads import Workload

OPERATIONS = {
    "embed": "embed",
    "attention": "attention",
    "linear": "linear",
    "gelu": "gelu",
    "layer_norm": "layer norm",
    "add_layer_norm": "layer norm",
    "pool": "pool",
    "attention_block": "attention block, what is left of it",
    "feed_forward_block": "feed-forward block, what is left of it",
    "whole": "encoder as a whole",
}
SHOWN_KERNELS = 20
SHOWN_OPERATORS = 8
PROFILED_CALLS = 20
NOTHING = 0.0005  # of the time


class Stopwatch:
    """Gives every second to the innermost of the functions that are running.

    Args:
        clock: tells the time in seconds.

    Attributes:
        seconds: by name.
        calls: by name; one of a function of the same name within another is the same call.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self._clock = clock
        self._local = threading.local()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function`, timed under `name`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            running = self._local.__dict__.setdefault("running", [("", [])])
            caller, beside = running[-1]  # who calls, and what each of the functions that it called took
            running.append((name, []))
            start = self._clock()
            try:
                return function(*args, **kwargs)
            finally:
                beside.append(self._clock() - start)
                _, inner = running.pop()
                self.seconds[name] = self.seconds.get(name, 0.0) + beside[-1] - sum(inner)
                self.calls[name] = self.calls.get(name, 0) + (name != caller)

        return call


class _Tokenizer:
    """A tokenizer whose calls are timed."""

    def __init__(self, tokenizer: Any, stopwatch: Stopwatch) -> None:
        self._tokenizer = tokenizer
        self._call = stopwatch.timed("tokenise", tokenizer)

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def profile(engine: Engine, workload: Workload, seconds: float) -> dict[str, Any]:
    """Return where one workload's time goes in one of our backends.

    Returns:
        `seconds`: of one call; `parts`: for each operation or kernel its name, calls and seconds in one call; on a CPU
        `operators`: the same for torch's operators, and for what is none (as Python and tokenising), by its profiler.

    Raises:
        TypeError: the engine is not one of ours.
    """
    if not isinstance(engine, Ours):
        raise TypeError(f"only backends can be profiled, not {engine.choice.label}")
    call = engine.call(workload, 0)
    call()
    if engine.choice.device.startswith("cuda"):
        return _by_kernel(call)
    stopwatch, count, start = Stopwatch(), 0, time.perf_counter()
    with _watched(engine.encoder, stopwatch):
        while count == 0 or time.perf_counter() - start < seconds:
            call()
            count += 1
    total = (time.perf_counter() - start) / count
    parts = [(name, stopwatch.calls[name] / count, taken / count) for name, taken in stopwatch.seconds.items()]
    shown = sorted((part for part in parts if part[2] > NOTHING * total), key=lambda part: -part[2])
    other = total - sum(taken for _, _, taken in shown)
    operators = _by_operator(call, max(1, min(count, PROFILED_CALLS)))
    return {"seconds": total, "parts": [*shown, ("other", 1, max(0.0, other))], "operators": operators}


def _by_operator(call: Callable[[], Any], count: int) -> list[tuple[str, float, float]]:
    """Return torch's operators that take longest in a call, each without those within it, and what the rest takes."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        call()  # the first one sets the profiler up
        start = time.perf_counter()
        for _ in range(count):
            call()
        total = (time.perf_counter() - start) / count
    averages: Any = profiler.key_averages()
    found = [(e.key, e.count / (count + 1), e.self_cpu_time_total / 1e6 / (count + 1)) for e in averages]
    found.sort(key=lambda part: -part[2])
    shown, rest = found[:SHOWN_OPERATORS], found[SHOWN_OPERATORS:]
    shown.append(("other operators", sum(calls for _, calls, _ in rest), sum(taken for *_, taken in rest)))
    return [*shown, ("no operator of torch", 1, max(0.0, total - sum(taken for *_, taken in shown)))]


@contextmanager
def _watched(encoder: Any, stopwatch: Stopwatch) -> Iterator[None]:
    """Time the operations of the encoder's backend, its tokenizer, and the packing of batches."""
    from minilm.batch import PackedBatch

    backend, tokenizer, pack = encoder.model.backend, encoder.tokenizer, PackedBatch.__dict__["from_sequences"]
    for method, name in OPERATIONS.items():  # on the instance, where calls through `self` find them first
        setattr(backend, method, stopwatch.timed(name, getattr(backend, method)))
    encoder.tokenizer = _Tokenizer(tokenizer, stopwatch)
    timed_pack = stopwatch.timed("pack", PackedBatch.from_sequences)
    type.__setattr__(PackedBatch, "from_sequences", staticmethod(timed_pack))
    try:
        yield
    finally:
        for method in OPERATIONS:
            delattr(backend, method)
        encoder.tokenizer = tokenizer
        type.__setattr__(PackedBatch, "from_sequences", pack)


def _by_kernel(call: Callable[[], Any]) -> dict[str, Any]:
    """Return the kernels that take longest, what the others take, and when the GPU waits for the host."""
    from minilm.bench.gpu import kernels
    from minilm.bench.timing import CudaTimer

    total = min(CudaTimer().time([call], 5))
    found = sorted(((name, *figures) for name, figures in kernels(call).items()), key=lambda part: -part[2])
    shown, rest = found[:SHOWN_KERNELS], found[SHOWN_KERNELS:]
    if rest:
        shown.append(("other kernels", sum(part[1] for part in rest), sum(part[2] for part in rest)))
    shown.append(("no kernel running", 1, max(0.0, total - sum(part[2] for part in found))))
    return {"seconds": total, "parts": shown}
