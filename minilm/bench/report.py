"""A run's report as tables of text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

TITLES = {"texts": "from text to vectors", "tokens": "model alone", "attention": "attention alone"}

Report = dict[str, Any]
Cell = dict[str, Any]


def choose_baseline(report: Report, baseline: str | None = None) -> str:
    """Return the engine that others are compared with: the one asked for now or at the run, else the first.

    Raises:
        ValueError: the run had no such engine.
    """
    names = [str(engine["name"]) for engine in report["engines"]]
    chosen = baseline or report["settings"].get("baseline") or names[0]
    if chosen not in names:
        raise ValueError(f"the baseline must be one of the engines, {', '.join(names)}; got {chosen!r}")
    return str(chosen)


def cells(report: Report) -> dict[tuple[str, str], Cell]:
    """Return the timed results by workload and engine."""
    return {(r["workload"], r["engine"]): r for r in report["results"] if "seconds" in r}


def table(report: Report, baseline: str | None = None) -> str:
    """Return the report as text: each workload's engines, token grids as matrices, and what engines take to load.

    Raises:
        ValueError: the baseline is no engine of this run.
    """
    baseline = choose_baseline(report, baseline)
    parts = [_heading(report)]
    for kind, title in TITLES.items():
        workloads = [workload for workload in report["workloads"] if workload["kind"] == kind]
        if workloads and kind == "texts":
            parts.append(_summary(report, workloads, baseline))
            parts += [_details(report, workload, baseline) for workload in workloads]
        elif workloads:
            parts.append(_matrix(report, workloads, title))
    parts += [_latencies(report), _scaling(report), _engines(report), _problems(report)]
    return "\n\n".join(part for part in parts if part)


def align(rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Return rows of cells as lines: the first `left` columns flush left, the others flush right."""
    rows = [list(row) for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        padded = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


# Numbers for people.


def seconds(*values: float) -> str:
    """Return times with three digits and the unit of the last: `1.02 ms`, `0.98-1.10 ms`."""
    limits = ((1e-3, 1e6, "µs"), (1, 1e3, "ms"), (float("inf"), 1, "s"))
    factor, unit = next((factor, unit) for limit, factor, unit in limits if values[-1] < limit)
    return f"{'-'.join(digits(value * factor) for value in values)} {unit}"


def digits(value: float) -> str:
    """Return a number with three digits, or all those before the point."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def rate(value: float, unit: str) -> str:
    """Return a rate with its prefix: `1.5e14, "FLOP/s"` is `150 TFLOP/s`."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{digits(value / factor)} {prefix}{unit}"
    return f"{digits(value)} {unit}"


def size(value: float | None) -> str:
    """Return a number of bytes in MB."""
    return "-" if value is None else f"{value / 1e6:,.0f} MB"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _cosine(cell: dict[str, Any]) -> str:
    value = cell.get("min_cosine")
    return "NaN" if value is None else f"{value:.7f}"


def _doubt(cell: dict[str, Any]) -> str:
    """Mark a result that differs from plain torch's by more than its engine promises."""
    return " WRONG" if cell["faithful"] is False else ""


# The parts.


def _heading(report: Report) -> str:
    machine, versions, ceilings = report["machine"], report["versions"], report["ceilings"]
    threads = "/".join(map(str, report["settings"]["threads"] or [machine["threads"]]))
    device = machine.get("gpu") or f"{machine['processor']}, {threads} thread{'s' if threads != '1' else ''}"
    rounds = max((cell["seconds"]["rounds"] for cell in cells(report).values()), default=0)
    lines = [
        f"{report['model']['source']} on {device}; {report['seconds']:.0f} s",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"median of {rounds} round{'s' if rounds != 1 else ''} (p10-p90); FLOPs are the model's, without padding",
    ]
    fastest: dict[tuple[str, str], tuple[float, str]] = {}  # of each method in a precision
    for name, ceiling in ceilings.items():
        key = name.partition(",")[0], ceiling["dtype"]
        fastest[key] = max(fastest.get(key, (0.0, "")), (ceiling["median"], name))
    lines += [f"  {rate(value, ceilings[name]['unit']):>12}  {name}" for value, name in fastest.values()]
    return "\n".join(lines)


def best_peer(report: Report, workload: str, engine: dict[str, Any]) -> tuple[str, float | None]:
    """Return the fastest peer in an engine's precision, with as many threads, and its median seconds, None if none."""
    alike = [e for e in report["engines"] if all(e[fact] == engine[fact] for fact in ("precision", "threads"))]
    peers = {e["name"] for e in alike if e["role"] == "peer"}
    timed = [(c["seconds"]["median"], who) for (what, who), c in cells(report).items() if what == workload]
    fastest = min((pair for pair in timed if pair[1] in peers), default=None)
    return ("", None) if fastest is None else (fastest[1], fastest[0])


def _summary(report: Report, workloads: Sequence[dict[str, Any]], baseline: str) -> str:
    """Return engines down, workloads across: how many times as fast as the baseline, then as the fastest peer."""
    times = {key: cell["seconds"]["median"] for key, cell in cells(report).items()}
    names = [workload["name"] for workload in workloads]
    engines = [engine for engine in report["engines"] if any((name, engine["name"]) in times for name in names)]
    evaluated = any(engine["sts"] for engine in engines)
    titles = [textwrap.wrap(workload["title"], 11) for workload in workloads]
    speeds = _heads([[f"speed, {baseline} = 1"], [], *titles, ["min", "cosine"], *[["STS", "average"]] * evaluated])
    ratios = [["over the fastest peer (*) in its precision", *[""] * (len(speeds[0]) - 1)]]
    for engine in engines:
        speed, ratio = [], []
        for name in names:
            base, taken = times.get((name, baseline)), times.get((name, engine["name"]))
            who, peer = best_peer(report, name, engine)
            speed.append(_ratio(base / taken if base and taken else None) + ("*" if who == engine["name"] else " "))
            ratio.append(_ratio(peer / taken if peer and taken else None) + " ")
        sts = engine["sts"].get("average")
        accuracy = [_cosine(engine), *["-" if sts is None else f"{sts:.2f}"] * evaluated]
        speeds.append([engine["name"], engine["precision"], *speed, *accuracy])
        if engine["role"] == "backend" and any("x" in cell for cell in ratio):
            ratios.append([engine["name"], engine["precision"], *ratio, *[""] * len(accuracy)])
    return align([*speeds, *(ratios if len(ratios) > 1 else [])], left=2)


def _heads(heads: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return column heads of several lines each as rows, the last lines level."""
    height = max(map(len, heads))
    return [list(row) for row in zip(*([""] * (height - len(head)) + list(head) for head in heads), strict=True)]


def _details(report: Report, workload: dict[str, Any], baseline: str) -> str:
    """Return one workload's engines, all figures."""
    found = cells(report)
    base = found.get((workload["name"], baseline))
    rows = [["", "median", "p10-p90", "tokens/s", "FLOP/s", "of peak", f"vs {baseline}", "vs best peer", "min cosine"]]
    for engine in report["engines"]:
        cell = found.get((workload["name"], engine["name"]))
        if cell is None:
            continue
        times, (_, peer) = cell["seconds"], best_peer(report, workload["name"], engine)
        rows.append(
            [
                engine["name"],
                seconds(times["median"]),
                seconds(times["p10"], times["p90"]),
                rate(cell["tokens_per_second"], ""),
                rate(cell["flops_per_second"], ""),
                _share(cell["fraction_of_peak"]),
                _ratio(base["seconds"]["median"] / times["median"] if base else None),
                _ratio(peer / times["median"] if peer and engine["role"] == "backend" else None),
                _cosine(cell) + _doubt(cell),
            ]
        )
    title = f"{workload['title']} ({workload['tokens']:,} tokens)"
    return f"{title}\n{align(rows)}" if len(rows) > 1 else f"{title}\nnot measured"


def _matrix(report: Report, workloads: Sequence[dict[str, Any]], title: str) -> str:
    """Return workloads down, engines across: tokens a second, and for the first engine what that means."""
    found = cells(report)
    names = {workload["name"] for workload in workloads}
    engines = [e["name"] for e in report["engines"] if any(who == e["name"] and what in names for what, who in found)]
    if not engines:
        return f"{title}\nnot measured"
    first = next(engine for engine in report["engines"] if engine["name"] == engines[0])
    fastest = max(cell["tokens_per_second"] for (what, _), cell in found.items() if what in names)
    factor, unit = (1e6, "Mtok/s") if fastest >= 1e6 else (1e3, "ktok/s")
    rows = [[f"{title}, {unit}", *engines, f"{engines[0]}: of peak", "vs best peer", "p10-p90", "min cosine"]]
    for workload in workloads:
        row = [found.get((workload["name"], engine)) for engine in engines]
        rates = [digits(cell["tokens_per_second"] / factor) + _doubt(cell) if cell else "-" for cell in row]
        lead, (_, peer) = row[0], best_peer(report, workload["name"], first)
        rest = ["-"] * 4
        if lead is not None:
            times = lead["seconds"]
            rest = [
                _share(lead["fraction_of_peak"]),
                _ratio(peer / times["median"] if peer else None),
                seconds(times["p10"], times["p90"]),
                _cosine(lead) + _doubt(lead),
            ]
        rows.append([workload["title"], *rates, *rest])
    return align(rows)


def _latencies(report: Report) -> str:
    """Return what one sequence takes on a GPU, and kernel launches."""
    rows = [["one call", "launches", "from the host", "on the GPU", "as a CUDA graph"]]
    titles = {workload["name"]: workload["title"] for workload in report["workloads"]}
    for (workload, engine), cell in cells(report).items():
        if "launches" in cell or "host_latency" in cell:
            times = [cell.get(f"{name}_latency") for name in ("host", "device", "graph")]
            launches = str(cell.get("launches", "-"))
            rows.append(
                [f"{titles[workload]}: {engine}", launches, *(seconds(t["median"]) if t else "-" for t in times)]
            )
    return align(rows) if len(rows) > 1 else ""


def _scaling(report: Report) -> str:
    """Return how an engine's speed grows with its threads."""
    counts = report["settings"]["threads"]
    if len(counts) < 2:
        return ""
    found, rows = cells(report), [["speed by threads", *map(str, counts)]]
    for engine in dict.fromkeys(engine["name"].rsplit(", ", 1)[0] for engine in report["engines"]):
        labels = [f"{engine}, {count} thread{'s' if count != 1 else ''}" for count in counts]
        for workload in report["workloads"]:
            times = [found.get((workload["name"], label), {}).get("seconds", {}).get("median") for label in labels]
            if times[0]:
                ratios = (_ratio(times[0] / time if time else None) for time in times)
                rows.append([f"{workload['title']}: {engine}", *ratios])
    return align(rows) if len(rows) > 1 else ""


def _engines(report: Report) -> str:
    """Return what engines take to load and hold, and how they fared."""
    rows = [["engine", "status", "precision", "imports", "load", "cold start to first vector", "memory", "min cosine"]]
    checked = any(engine["parity"] for engine in report["engines"])
    rows[0] += ["parity"] * checked
    for engine in report["engines"]:
        times = [engine.get(f"{name}_seconds") for name in ("import", "load", "first_vector")]
        taken = [seconds(time) if time is not None else "-" for time in times]
        cosine = "-" if engine["min_cosine"] is None and engine["status"] != "wrong" else _cosine(engine)
        row = [engine["name"], engine["status"], engine["precision"], *taken, size(engine["peak_memory"]), cosine]
        within = f"{sum(check['ok'] for check in engine['parity'])} of {len(engine['parity'])}"
        rows.append(row + [within if engine["parity"] else "-"] * checked)
    return align(rows, left=3)


def _problems(report: Report) -> str:
    """Return what failed, and why."""
    lines = [f"{engine['name']}: {engine['error']}" for engine in report["engines"] if engine["error"]]
    told = {(engine["name"], engine["error"]) for engine in report["engines"]}
    lines += [
        f"{result['engine']}, {result['workload']}: {result['error']}"
        for result in report["results"]
        if "error" in result and (result["engine"], result["error"]) not in told
    ]
    lines += [f"{name}: {reason}" for name, reason in report["refused"].items()]
    if report["ceilings_error"]:
        lines.append(f"ceilings: {report['ceilings_error']}")
    return "\n".join(["not measured", *(f"  {line}" for line in lines)]) if lines else ""


def profile_table(report: Report) -> str:
    """Return what `measure.run_profile` returned as text: the parts of each workload's time, the largest first."""
    parts = [f"{report['engine']} on {report['machine'].get('gpu') or report['machine']['processor']}"]
    for workload in report["workloads"]:
        views = [(f"{workload['title']}, {seconds(workload['seconds'])}", workload["parts"])]
        if "operators" in workload:
            views.append(("the same, by torch's operators", workload["operators"]))
        rows = []
        for title, listed in views:
            total = sum(taken for *_, taken in listed)
            rows.append([title, "calls", "time", "share"])
            rows += [[f"  {name[:60]}", digits(n), seconds(taken), f"{taken / total:.1%}"] for name, n, taken in listed]
        parts.append(align(rows))
    return "\n\n".join(parts)
