"""What a run comes to: a report that JSON can hold."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from minilm import __version__
from minilm.bench.contestant import Contestant
from minilm.bench.engines import is_faithful
from minilm.bench.peers import PEERS
from minilm.bench.settings import DTYPES, Settings
from minilm.bench.timing import quantiles
from minilm.bench.workloads import Workload
from minilm.config import MiniLMConfig

WIDTHS = {**DTYPES, "int8": 1}
"""The bytes of a number, by precision."""

PACKAGES = ("torch", "triton", "numpy", "tokenizers", "transformers", "sentence-transformers", "flash-attn")


def make_report(
    settings: Settings,
    described: dict[str, Any],
    built: dict[str, Any],
    workloads: Sequence[Workload],
    contestants: Sequence[Contestant],
    seconds: float,
) -> dict[str, Any]:
    """Return the report of a run.

    Args:
        settings: what was asked for.
        described: the machine.
        built: the plan, and the workloads that can't be had.
        workloads: those that can.
        contestants: the machine, then the engines.
        seconds: how long the run took.
    """
    machine, *engines = contestants
    sizes = MiniLMConfig.from_dict(built["plan"]["config"])
    ceilings = _ceilings(machine)
    return {
        "minilm": __version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": seconds,
        "machine": {**described["machine"], "device": described["device"], "threads": described["threads"]},
        "versions": _versions(),
        "settings": asdict(settings),
        "model": built["plan"],
        "workloads": [_describe_workload(workload, sizes) for workload in workloads],
        "refused": built["refused"],
        "ceilings": ceilings,
        "ceilings_error": machine.error,
        "engines": [_describe_engine(engine, settings) for engine in engines],
        "results": list(_results(engines, workloads, sizes, ceilings, settings)),
    }


def _versions() -> dict[str, str]:
    """Return the versions of what is installed here."""
    found = {"python": platform.python_version(), "minilm": __version__}
    for package in dict.fromkeys((*PACKAGES, *(name for peer in PEERS.values() for name in peer.packages))):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _describe_workload(workload: Workload, sizes: MiniLMConfig) -> dict[str, Any]:
    """Return what a workload is, without its texts."""
    return {
        "name": workload.name,
        "kind": workload.kind,
        "title": workload.title,
        "sequences": len(workload.lengths),
        "tokens": workload.num_tokens,
        "longest": max(workload.lengths),
        "flops": workload.flops(sizes),
    }


def _ceilings(machine: Contestant) -> dict[str, Any]:
    """Return the machine's rates, by name."""
    found = {}
    for name, facts in machine.loaded.get("facts", {}).items():
        if machine.samples.get(name):
            rates = [facts["amount"] / seconds for seconds in machine.samples[name]]
            found[name] = {"unit": facts["unit"], "dtype": facts["dtype"], **quantiles(rates)}
    return found


def peak(ceilings: dict[str, Any], precision: str) -> float | None:
    """Return the fastest matrix product in a precision, in FLOP/s."""
    rates = [c["median"] for c in ceilings.values() if c["unit"] == "FLOP/s" and c["dtype"] == precision]
    return max(rates, default=None)


def _describe_engine(engine: Contestant, settings: Settings) -> dict[str, Any]:
    """Return what is known of an engine besides its timings; its status is `ok`, `wrong` or `failed`."""
    checks = [facts for facts in engine.ready.values() if "max_error" in facts]
    cosines = [facts["min_cosine"] for facts in checks]
    choice = engine.choice
    ours = choice.role == "backend"
    wrong = any(_faithful(engine, facts, settings) is False for facts in checks)
    broken = [reason for reason in engine.failed.values() if "OutOfMemory" not in reason]
    status = "failed" if engine.error or (ours and broken) or not engine.ready else "ok"
    astray = [row["operation"] for row in engine.parity if not row["ok"]]
    if wrong or astray:
        status = "wrong"
    error = engine.error or (broken[0] if broken else None)
    if astray and not error:
        error = f"parity: {len(astray)} of {len(engine.parity)} checks beyond their limits, first {astray[0]}"
    if not error and not engine.ready:
        error = "it does none of these workloads"
    return {
        "name": choice.label,
        "role": choice.role,
        "dtype": choice.dtype,
        "precision": _precision(engine),
        "status": status,
        "error": error,
        "threads": choice.threads or engine.loaded.get("threads"),
        "min_cosine": None if any(math.isnan(cosine) for cosine in cosines) else min(cosines, default=None),
        "sts": engine.sts,
        "parity": engine.parity,
        "peak_memory": engine.peak_memory,
        **{name: value for name, value in engine.loaded.items() if name.endswith("_seconds")},
        "facts": engine.loaded.get("facts", {}),
    }


def _results(
    engines: Sequence[Contestant],
    workloads: Sequence[Workload],
    sizes: MiniLMConfig,
    ceilings: dict[str, Any],
    settings: Settings,
) -> Iterator[dict[str, Any]]:
    """Yield a record for each workload and engine that does it."""
    for workload in workloads:
        for engine in engines:
            pair = {"workload": workload.name, "engine": engine.choice.label}
            if workload.name in engine.failed:
                yield {**pair, "error": engine.failed[workload.name]}
            if not engine.samples.get(workload.name):
                continue
            facts, seconds = engine.ready[workload.name], quantiles(engine.samples[workload.name])
            rate, best = workload.flops(sizes) / seconds["median"], peak(ceilings, _precision(engine))
            yield {
                **pair,
                "seconds": seconds,
                "samples": engine.samples[workload.name],
                "tokens_per_second": workload.num_tokens / seconds["median"],
                "flops_per_second": rate,
                "fraction_of_peak": rate / best if best else None,
                "flops_per_byte": workload.flops(sizes) / workload.least_bytes(sizes, WIDTHS[_precision(engine)]),
                "faithful": _faithful(engine, facts, settings),
                **{name: _number(value) for name, value in facts.items() if name != "seconds"},
                **engine.extras.get(workload.name, {}),
            }


def _precision(engine: Contestant) -> str:
    """Return what an engine's matrix products are computed in."""
    return str(engine.loaded.get("precision", engine.choice.dtype))


def _faithful(engine: Contestant, facts: dict[str, float], settings: Settings) -> bool | None:
    """Tell whether an engine's rows are those of plain torch, as far as it promises; None where nothing was compared.

    What was asked for at the run goes for backends; peers are as they are.
    """
    if "max_error" not in facts:
        return None
    asked = settings.min_cosine if engine.choice.role == "backend" else None
    return is_faithful(facts, _precision(engine), engine.loaded.get("min_cosine") if asked is None else asked)


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value
