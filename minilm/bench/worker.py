"""A worker process: loads one engine, and does what the lines of JSON on its input ask for.

Nothing heavy is imported before an engine is: what that takes is part of the engine's time to its first vector.
"""

from __future__ import annotations

import json
import math
import os
import queue
import signal
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from minilm.bench.engines import EngineError
from minilm.bench.timing import make_timer, peak_memory, quantiles, take_turn, wait_until_quiet
from minilm.bench.workloads import Workload

if TYPE_CHECKING:
    from minilm.bench.engines import Engine

LONG = 0.5  # seconds; a first call that takes longer is not repeated to see how long the next one takes
ROTATIONS = 3  # inputs that take turns on a GPU, where one alone would stay in its cache


def main() -> None:
    """Answer requests until there are no more."""
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # by which openvino tells of being imported
    inbox: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(requests, inbox), daemon=True).start()
    handlers = Seat().handlers()
    while True:
        request = json.loads(inbox.get())
        try:
            answer = handlers[request.pop("do")](**request)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": describe(error), "message": str(error)}
        answers.write(json.dumps(answer, default=str) + "\n")
        answers.flush()


def describe(error: Exception) -> str:
    """Return an exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {textwrap.shorten(lines[0], 200)}" if lines else type(error).__name__


def _read(requests: IO[str], inbox: queue.SimpleQueue[str]) -> None:
    """Pass requests on; when nobody can send any more, end this process and all that it started, in mid-work too."""
    for line in requests:
        inbox.put(line)
    if hasattr(os, "getsid") and os.getsid(0) == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(0)


class Seat:
    """What a worker does, request by request, and what it keeps between them."""

    engine: Engine

    def __init__(self) -> None:
        self._calls: dict[str, list[Callable[[], Any]]] = {}
        self._estimates: dict[str, float] = {}

    def handlers(self) -> dict[str, Callable[..., dict[str, Any]]]:
        """Return what can be asked for."""
        names = ("describe", "build", "export", "load", "parity", "prepare", "measure", "finish", "sts", "profile")
        return {name: getattr(self, name) for name in names}

    def describe(self, **request: Any) -> dict[str, Any]:
        """Describe the machine and the model."""
        from minilm.bench.reference import describe as describe_machine

        return describe_machine(**request)

    def build(self, **request: Any) -> dict[str, Any]:
        """Write the workloads, and what plain torch makes of them, for the other workers."""
        from minilm.bench.reference import build

        return build(**request)

    def export(self, **request: Any) -> dict[str, Any]:
        """Write ONNX files for the peers that read them."""
        from minilm.bench.onnx_files import export

        return {"errors": export(**request)}

    def load(self, **request: Any) -> dict[str, Any]:
        """Load an engine, and make it encode for the first time."""
        from minilm.bench.engines import Choice, make_engine

        self.engine = make_engine(Choice(**request))
        clock = [time.perf_counter()]
        for step in (self._imports, self.engine.load, self._first):
            step()
            clock.append(time.perf_counter())
        seconds = [end - start for start, end in pairwise(clock)]
        timed = dict(zip(("import_seconds", "load_seconds", "first_call_seconds"), seconds, strict=True))
        torch: Any = sys.modules.get("torch")
        return {
            **timed,
            "threads": torch.get_num_threads() if torch else self.engine.num_threads,
            "precision": self.engine.precision or self.engine.choice.dtype,
            "min_cosine": self.engine.min_cosine,
            "facts": self.engine.facts(),
            "workloads": list(self._workloads),
        }

    def parity(self) -> dict[str, Any]:
        """Hold every operation of the engine's backend against float64; on a CPU, where that is slow, in less cases."""
        from dataclasses import asdict

        from minilm.encoder import load
        from minilm.parity import check_parity
        from minilm.quantization import calibration_sentences

        choice = self.engine.choice
        encoder = load(self.engine.plan["model"], device=choice.device, dtype="float32", backend="torch")
        on_cpu = choice.device == "cpu"
        options: dict[str, Any] = {"quick": on_cpu, "dtypes": [self.engine.torch_dtype] if on_cpu else None}
        rows = check_parity(encoder, choice.name, calibration_sentences(), show_progress_bar=False, **options)
        error = {row: None if math.isnan(row.error) else row.error for row in rows}  # JSON has no NaN
        return {"rows": [{**asdict(row), "error": error[row], "ok": row.ok} for row in rows]}

    def prepare(self, names: list[str], seconds: float) -> dict[str, Any]:
        """Make ready what is to be measured, and compare its first results with the reference, for so many seconds."""
        end = time.perf_counter() + seconds
        ready, failed = {}, {}
        for name in names:
            if time.perf_counter() > end:
                failed[name] = f"not ready after {seconds:.0f} s"
                continue
            try:
                ready[name] = self._prepare(self._workloads[name])
            except Exception as error:
                traceback.print_exc()
                failed[name] = describe(error)
                self._calls.pop(name, None)
        return {"ready": ready, "failed": failed}

    def measure(self, name: str, seconds: float) -> dict[str, Any]:
        """Take one turn at a workload: the median of the calls in it."""
        workload, choice = self._workloads[name], self.engine.choice
        timer = make_timer(choice.device, workload.kind)
        times = take_turn(timer, self._calls[name], seconds, self._estimates[name])
        self._estimates[name] = min(self._estimates[name], *times)
        if choice.device == "cpu":
            wait_until_quiet()
        return {"seconds": quantiles(times)["median"], "calls": len(times)}

    def finish(self, names: list[str]) -> dict[str, Any]:
        """Return what is measured once, and might upset timings: memory, and on a GPU launches and latency."""
        from minilm.bench import gpu

        extras = {}
        if self.engine.choice.device.startswith("cuda"):
            for name in names:
                workload = self._workloads[name]
                extras[name] = gpu.extras(self._calls[name][0], one_sequence=len(workload.lengths) == 1)
        return {"peak_memory": peak_memory(), "extras": extras}

    def sts(self, data: str) -> dict[str, Any]:
        """Return Spearman's correlation x 100 on each task of semantic textual similarity, and their average."""
        from minilm.evaluate import evaluate_sts

        engine = self.engine

        class Encoder:
            def encode(self, sentences: list[str], /) -> Any:
                return engine.call(Workload("sts", "texts", "", texts=tuple(sentences)), 0)()

        scores = evaluate_sts(Encoder(), data, show_progress_bar=False).to_dict()
        tasks = {name: task["spearman"] for name, task in scores["tasks"].items()}
        return {"average": scores["figures"]["average"], "tasks": tasks}

    def profile(self, names: list[str], seconds: float) -> dict[str, Any]:
        """Return where the time of each workload goes."""
        from minilm.bench.profiling import profile

        return {name: profile(self.engine, self._workloads[name], seconds) for name in names}

    @cached_property
    def _workloads(self) -> dict[str, Workload]:
        """The jobs that this worker's engine can do, by name."""
        own = self.engine.own_workloads()
        if own is None:
            path = Path(self.engine.choice.scratch) / "workloads.json"
            every = map(Workload.from_dict, json.loads(path.read_text(encoding="utf-8")))
            own = [workload for workload in every if self.engine.takes(workload)]
        return {workload.name: workload for workload in own}

    def _imports(self) -> None:
        """Import what the engine needs; on a GPU, make it the one that is meant by default."""
        try:
            self.engine.imports()
        except ImportError as error:
            if self.engine.extra is None:
                raise
            raise EngineError(f'{error}: pip install "minilm[{self.engine.extra}]"') from error
        if self.engine.choice.device.startswith("cuda"):
            import torch

            torch.cuda.set_device(torch.device(self.engine.choice.device).index or 0)

    def _first(self) -> None:
        """Encode the smallest thing there is."""
        if self._workloads:
            smallest = min(self._workloads.values(), key=lambda workload: workload.num_tokens)
            self.engine.call(smallest, 0)()

    def _prepare(self, workload: Workload) -> dict[str, Any]:
        """Make one workload's calls, check the first result, and see how long the next takes."""
        from minilm.bench import gpu
        from minilm.bench.engines import agreement

        timer = make_timer(self.engine.choice.device, workload.kind)
        on_gpu = self.engine.choice.device.startswith("cuda")
        rotations = ROTATIONS if on_gpu and workload.kind == "tokens" else 1
        calls = self._calls[workload.name] = [self.engine.call(workload, rotation) for rotation in range(rotations)]
        start = time.perf_counter()
        facts: dict[str, Any] = agreement(calls[0](), self._reference(workload))  # before its memory is used again
        passed = time.perf_counter() - start
        timer.time(calls[1:], len(calls) - 1)
        if on_gpu:
            facts["working_memory"] = gpu.working_memory(calls[0])
        estimate = passed if passed > LONG and not on_gpu else min(timer.time(calls, 1))
        self._estimates[workload.name] = estimate
        return {**facts, "seconds": estimate}

    def _reference(self, workload: Workload) -> Path:
        """Return the file with the rows that are known to be right."""
        return Path(self.engine.choice.scratch) / "reference" / f"{workload.name}.npy"
