"""One run of the benchmark: engines are loaded, checked, and take turns in rounds until the time is up."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minilm.bench.ceilings import CPU_PRECISIONS
from minilm.bench.contestant import Contestant
from minilm.bench.engines import Choice
from minilm.bench.onnx_peers import EXPORT_ERRORS, OnnxPeer
from minilm.bench.peers import PEERS
from minilm.bench.processes import Worker, WorkerError
from minilm.bench.results import make_report
from minilm.bench.settings import Settings
from minilm.bench.workloads import Workload

TURN_SECONDS = {"cpu": 0.2, "cuda": 0.03}
MOST_ROUNDS = 25
PREPARING_SHARE = 0.4  # of the time, for what an engine compiles
LOADING_PATIENCE = 180.0  # seconds, until the first vector
STS_PATIENCE = 900.0  # for seven tasks, 26,000 sentences
PATIENCE = 120.0  # seconds for what should take a moment, and beyond what is expected of the rest

Progress = Callable[[str], object]


def run(settings: Settings, progress: Progress = lambda _: None) -> dict[str, Any]:
    """Measure, and return the report that `report.table` and `plots.plot` show; all of it can be written as JSON.

    Args:
        settings: what to measure.
        progress: told in a few words what is being done.

    Raises:
        ValueError: the model, the data or the device can't be used.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="minilm-bench-") as scratch, ExitStack() as stack:
        progress("reference: plain torch in float32")
        described, built, settings = _reference(settings, scratch)
        workloads = [Workload.from_dict(values) for values in built["workloads"]]
        _export(settings, built["plan"], scratch, progress)
        contestants = _start(settings, scratch, stack, progress)
        if settings.parity:
            _check(contestants, progress)
        _prepare(contestants, settings, workloads, progress)
        _rounds(contestants, workloads, settings, start, progress)
        _finish(contestants, workloads, settings, progress)
    return make_report(settings, described, built, workloads, contestants, time.perf_counter() - start)


def run_profile(settings: Settings, progress: Progress = lambda _: None) -> dict[str, Any]:
    """Return where the time of the first backend goes, at each workload that it does.

    Raises:
        ValueError: the model, the data, the device or the backend can't be used.
    """
    with tempfile.TemporaryDirectory(prefix="minilm-bench-") as scratch:
        progress("making the workloads")
        wanted = settings.workloads
        described, built, settings = _reference(settings, scratch)
        choice = next((choice for choice in settings.choices(scratch) if choice.role == "backend"), None)
        if choice is None:
            raise ValueError("only backends can be profiled: name one with --backend")
        workloads = {values["name"]: values for values in built["workloads"]}
        if wanted is None:
            workloads = {name: values for name, values in workloads.items() if Workload.from_dict(values).is_headline}
        each = min(3.0, (settings.seconds or 0) / max(1, len(workloads)))
        with closing(Worker(choice.label, Path(scratch) / "profile.log", choice.threads)) as worker:
            try:
                progress(f"profiling {choice.label}")
                worker.ask("load", PATIENCE, **asdict(choice))
                answer = worker.ask("profile", 5 * PATIENCE, names=list(workloads), seconds=each)
            except WorkerError as error:
                raise ValueError(f"{choice.label} can't be profiled: {error.message}") from None
    return {
        "engine": choice.label,
        "machine": described["machine"],
        "workloads": [{"name": n, "title": w["title"], **answer[n]} for n, w in workloads.items()],
    }


def _reference(settings: Settings, scratch: str) -> tuple[dict[str, Any], dict[str, Any], Settings]:
    """Find out what is here, and have the workloads and the reference made."""
    with closing(Worker("reference", Path(scratch) / "reference.log", offline=False)) as worker:
        try:
            described = worker.ask("describe", PATIENCE, device=settings.device)
            settings = settings.on(described["device"], described["threads"])
            names = list(settings.workloads or ())
            model = {"model": settings.model, "data": settings.data, "scratch": scratch, "sts": settings.sts}
            built = worker.ask("build", 5 * PATIENCE, names=names, **model)
        except WorkerError as error:
            raise ValueError(f"nothing can be measured: {error.message}") from None
    return described, built, settings


def _export(settings: Settings, plan: dict[str, Any], scratch: str, progress: Progress) -> None:
    """Have the files made that peers read, in a process of its own; leave beside them why one could not be."""
    peers = [PEERS[choice.name] for choice in settings.choices(scratch) if choice.role == "peer"]
    names = [peer.file for peer in peers if issubclass(peer, OnnxPeer)]
    if not names or "folder_error" in plan:
        return
    progress(f"making {', '.join(dict.fromkeys(names))}")
    with closing(Worker("export", Path(scratch) / "export.log")) as worker:
        try:
            errors = worker.ask("export", LOADING_PATIENCE, names=names, plan=plan)["errors"]
        except WorkerError as error:
            errors = dict.fromkeys(names, str(error))
    (Path(plan["folder"]) / EXPORT_ERRORS).write_text(json.dumps(errors), encoding="utf-8")


def _start(settings: Settings, scratch: str, stack: ExitStack, progress: Progress) -> list[Contestant]:
    """Start and load the machine and the engines: on a CPU one after the other, so that loading can be timed."""
    choices = settings.choices(scratch)
    dtypes = dict.fromkeys(choice.dtype for choice in choices)
    dtypes |= dict.fromkeys(CPU_PRECISIONS if settings.device == "cpu" else ())
    device, threads = settings.device or "cpu", max(settings.threads, default=None)
    machine = Choice("machine", "machine", "machine", ",".join(dtypes), device, scratch, threads)
    contestants = []
    for number, choice in enumerate([machine, *choices]):
        progress(f"loading {choice.label}")
        worker = stack.enter_context(closing(Worker(choice.label, Path(scratch) / f"{number}.log", choice.threads)))
        contestants.append(Contestant(choice, worker))
        contestants[-1].asked("load", **asdict(choice))
        if device == "cpu":
            contestants[-1].load(contestants[-1].answered(LOADING_PATIENCE))
    if device != "cpu":
        for contestant in contestants:
            contestant.load(contestant.answered(LOADING_PATIENCE))
    return contestants


def _check(contestants: Iterable[Contestant], progress: Progress) -> None:
    """Run the parity suite on each of our backends."""
    for contestant in contestants:
        if contestant.choice.role == "backend" and contestant.asked("parity"):
            progress(f"every operation of {contestant.choice.label} against float64")
            answer = contestant.answered(5 * PATIENCE)
            contestant.parity = answer["rows"] if answer is not None else []


def _prepare(
    contestants: Sequence[Contestant], settings: Settings, workloads: Sequence[Workload], progress: Progress
) -> None:
    """Have every engine make ready what it does, the headline workloads first; on a GPU all engines at once."""
    seconds = max(60.0, PREPARING_SHARE * (settings.seconds or 0))
    order = [workload.name for workload in sorted(workloads, key=lambda workload: workload.priority)]
    waiting, precisions = [], {contestant.loaded.get("precision") for contestant in contestants}
    for contestant in contestants:
        own = contestant.loaded.get("workloads", [])
        if contestant.choice.role == "machine":
            ceilings = contestant.loaded.get("facts", {})
            names = [name for name in own if ceilings[name]["dtype"] in {"", *precisions}]
        else:
            names = [name for name in order if name in own]
        if contestant.asked("prepare", names=names, seconds=seconds):
            progress(f"checking {contestant.choice.label}")
            waiting.append(contestant)
        if settings.device == "cpu":
            contestant.prepare(waiting.pop().answered(seconds + PATIENCE) if waiting else None)
    for contestant in waiting:
        contestant.prepare(contestant.answered(seconds + PATIENCE))


def _rounds(
    contestants: list[Contestant], workloads: Sequence[Workload], settings: Settings, start: float, progress: Progress
) -> None:
    """Let the engines take turns at each workload, in another order each round, until another round would not fit."""
    machine, *engines = contestants
    seconds = settings.seconds or 0
    turn = min(TURN_SECONDS[(settings.device or "cpu").split(":")[0]], seconds / 100)
    for number in range(MOST_ROUNDS):
        began = time.perf_counter()
        for name in list(machine.ready):
            _take_turn(machine, name, turn)
        for workload in workloads:
            able = [engine for engine in engines if workload.name in engine.ready]
            shift = number % max(1, len(able))
            for engine in able[shift:] + able[:shift]:
                _take_turn(engine, workload.name, turn)
        now = time.perf_counter()
        progress(f"round {number + 1} took {now - began:.1f} s")
        if now + (now - began) > start + seconds:
            return


def _take_turn(contestant: Contestant, name: str, seconds: float) -> None:
    if contestant.asked("measure", name=name, seconds=seconds):
        expected = seconds + 3 * contestant.ready[name]["seconds"]
        answer = contestant.answered(PATIENCE + 10 * expected, name)
        if answer is not None:
            contestant.samples.setdefault(name, []).append(answer["seconds"])


def _finish(
    contestants: Iterable[Contestant], workloads: Sequence[Workload], settings: Settings, progress: Progress
) -> None:
    """Ask for memory, on a GPU for launches and latencies, and for the STS scores if wanted; then end the engines."""
    progress("memory, launches and latency")
    looked_into = {workload.name for workload in workloads if workload.is_looked_into}
    texts = {workload.name for workload in workloads if workload.kind == "texts"}
    for contestant in contestants:
        names = [name for name in contestant.ready if name in looked_into]
        if contestant.asked("finish", names=names):
            answer = contestant.answered(PATIENCE)
            if answer is not None:
                contestant.peak_memory, contestant.extras = answer["peak_memory"], answer["extras"]
        if settings.sts and texts & set(contestant.ready) and contestant.asked("sts", data=settings.data):
            progress(f"STS scores of {contestant.choice.label}")
            answer = contestant.answered(STS_PATIENCE)
            if answer is not None:
                contestant.sts = {name: answer[name] for name in ("average", "tasks")}
        contestant.worker.close(grace=0)
