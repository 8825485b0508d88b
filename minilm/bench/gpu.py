"""What is asked of a GPU besides the time of a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minilm.bench.timing import CudaTimer, HostTimer, quantiles

LATENCY_CALLS = 100


def working_memory(call: Callable[[], Any]) -> int:
    """Return the bytes that a call holds at most, beyond what is held before it."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def extras(call: Callable[[], Any], *, one_sequence: bool) -> dict[str, Any]:
    """Return a call's kernel launches; for a single sequence its latency too, with and without a CUDA graph around it.

    What can't be had is left out, with the reason under `..._error`.
    """
    import torch

    wanted: dict[str, Callable[[], Any]] = {"launches": lambda: sum(count for count, _ in kernels(call).values())}
    if one_sequence:
        wanted["host_latency"] = lambda: quantiles(HostTimer(torch.cuda.synchronize).time([call], LATENCY_CALLS))
        wanted["device_latency"] = lambda: quantiles(CudaTimer().time([call], LATENCY_CALLS))
        wanted["graph_latency"] = lambda: quantiles(CudaTimer().time([graphed(call)], LATENCY_CALLS))
    found: dict[str, Any] = {}
    for name, measure in wanted.items():
        try:
            found[name] = measure()
        except Exception as error:  # capturing fails in as many ways as there are engines
            found[f"{name}_error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found


def kernels(call: Callable[[], Any]) -> dict[str, tuple[int, float]]:
    """Return, for each kernel that a call runs, how often it does and the seconds that it takes, copies left out."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    found: dict[str, tuple[int, float]] = {}
    for event in profiler.events():
        other = getattr(event, "is_user_annotation", False) or event.name.startswith(("Memcpy", "Memset"))
        if event.device_type.name == "CUDA" and not other:
            count, seconds = found.get(event.name, (0, 0.0))
            found[event.name] = count + 1, seconds + event.time_range.elapsed_us() / 1e6
    return found


def graphed(call: Callable[[], Any]) -> Callable[[], Any]:
    """Return what replays a call as one CUDA graph."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    replay: Callable[[], Any] = graph.replay
    return replay
