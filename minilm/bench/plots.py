"""A run's report as a picture: speeds at texts; for token batches a roofline, and speed against length."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import IO, Any

from minilm.bench.report import Report, best_peer, cells, choose_baseline, digits, rate, seconds
from minilm.bench.results import peak
from minilm.bench.workloads import KIBI, parse
from minilm.plot_style import DOTS_PER_INCH, GRID, INK, MUTED, OURS, STYLE, THEIRS, check_matplotlib

ALONG_A_SLOPE = "along a slope"


def plot(report: Report, file: IO[bytes], baseline: str | None = None) -> None:
    """Draw what the report has, as PNG.

    Args:
        report: what `measure.run` returned.
        file: where to.
        baseline: the engine whose speed at texts is 1; the first by default.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the baseline is no engine of this run, or nothing was measured.
    """
    check_matplotlib()
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    baseline = choose_baseline(report, baseline)
    wide = [panel for kind, panel in PANELS if _of_kind(report, kind)]
    texts = _of_kind(report, "texts")
    if not wide and not texts:
        raise ValueError("there is nothing to plot: nothing was measured")
    columns = {1: 1, 2: 2, 4: 2}.get(len(texts), 3)
    heights = [6.2] * math.ceil(len(wide) / 2) + [_text_height(report)] * math.ceil(len(texts) / columns)
    with mpl.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(h_pad=0.15, w_pad=0.2, hspace=0.04, wspace=0.03)
        figure = Figure(figsize=(15, sum(heights) + 0.8), layout=layout)
        grid = figure.add_gridspec(len(heights), 6, height_ratios=heights)
        for index, panel in enumerate(wide):
            last_alone = index == len(wide) - 1 and index % 2 == 0
            place = slice(None) if last_alone else slice(3 * (index % 2), 3 * (index % 2) + 3)
            axes = figure.add_subplot(grid[index // 2, place])
            panel(report, axes)
            _legend(report, axes, 200 if last_alone else 95)
        for index, workload in enumerate(texts):
            row, column = math.ceil(len(wide) / 2) + index // columns, index % columns
            axes = figure.add_subplot(grid[row, column * 6 // columns : (column + 1) * 6 // columns])
            _speeds(report, axes, workload, baseline, named=column == 0)
        figure.suptitle(_title(report, baseline if texts else None), x=0.012, ha="left", fontsize=10, color=MUTED)
        figure.draw_without_rendering()  # the layout is settled: now a slope has an angle
        for axes in figure.axes:
            _turn_labels(axes)
        figure.savefig(file, format="png", dpi=DOTS_PER_INCH, facecolor="white")


def _title(report: Report, baseline: str | None) -> str:
    machine, versions = report["machine"], report["versions"]
    threads = "/".join(map(str, report["settings"]["threads"] or [machine["threads"]]))
    device = machine.get("gpu") or f"{machine['processor']}, {threads} thread{'s' if threads != '1' else ''}"
    names = {"torch", *(re.split("[@,]", engine["name"])[0] for engine in report["engines"])}
    packages = [f"{name} {version}" for name, version in versions.items() if name in names]
    lines = ["   ·   ".join((report["model"]["source"], device, report["date"][:10])), "   ·   ".join(packages)]
    if baseline is not None:
        rounds = max(cell["seconds"]["rounds"] for cell in cells(report).values())
        median = f"median of {rounds} round{'s' if rounds != 1 else ''} with p10 and p90"
        lines.append(f"texts: speed, {baseline} = 1, {median} (over the fastest peer, dotted)")
    return "\n".join(lines)


def _legend(report: Report, axes: Any, width: int) -> None:
    """Put a legend below, in the report's order of engines, about `width` characters wide."""
    order = [_label(engine) for engine in report["engines"]]
    entries = list(zip(*axes.get_legend_handles_labels(), strict=True))
    entries.sort(key=lambda entry: order.index(entry[1]) if entry[1] in order else len(order))
    if not entries:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=MUTED)
        return
    handles, labels = zip(*entries, strict=True)
    columns = max(1, width // (max(map(len, labels)) + 7))
    axes.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=columns)


def _label(engine: dict[str, Any]) -> str:
    return f"{engine['name']} (wrong)" if engine["status"] == "wrong" else str(engine["name"])


def _colours(report: Report) -> dict[str, str]:
    """Return a colour an engine, the same with any number of threads: strong ones for ours."""
    found: dict[str, str] = {}
    several = len(report["settings"]["threads"]) > 1
    for role, palette in (("backend", OURS), ("peer", THEIRS)):
        engines = [engine["name"] for engine in report["engines"] if engine["role"] == role]
        kinds = {name: name.rpartition(", ")[0] if several else name for name in engines}
        order = list(dict.fromkeys(kinds.values()))
        found |= {name: palette[order.index(kind) % len(palette)] for name, kind in kinds.items()}
    return found


def _engines(report: Report, workloads: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the engines that were timed at one of these workloads; what is to be drawn on top comes last."""
    names, found = {workload["name"] for workload in workloads}, cells(report)
    timed = [e for e in report["engines"] if any(who == e["name"] and what in names for what, who in found)]
    return sorted(timed, key=lambda engine: engine["role"] == "backend")


def _of_kind(report: Report, kind: str) -> list[dict[str, Any]]:
    """Return the workloads of a kind that any engine was timed at."""
    timed = {name for name, _ in cells(report)}
    return [workload for workload in report["workloads"] if workload["kind"] == kind and workload["name"] in timed]


def _groups(report: Report) -> dict[str, list[dict[str, Any]]]:
    """Return by precision, and threads where they vary, the engines that were timed at any text."""
    engines = _engines(report, _of_kind(report, "texts"))
    groups: dict[str, list[dict[str, Any]]] = {}
    for engine in sorted(engines, key=report["engines"].index):
        name = engine["precision"]
        if len(report["settings"]["threads"]) > 1:
            name += f", {engine['threads']} thread{'s' if engine['threads'] != 1 else ''}"
        groups.setdefault(name, []).append(engine)
    return groups


def _text_height(report: Report) -> float:
    """Return the inches of a panel of `_speeds`."""
    groups = _groups(report)
    return 1.1 + 0.25 * sum(map(len, groups.values())) + 0.3 * len(groups)


def _base(report: Report, workload: str, baseline: str) -> tuple[str, float]:
    """Return the engine whose speed is 1 at a workload, and its median seconds: another where the baseline has none."""
    times = {who: cell["seconds"]["median"] for (what, who), cell in cells(report).items() if what == workload}
    who = baseline if baseline in times else next(iter(times))
    return who, times[who]


def _range(report: Report, baseline: str) -> tuple[float, float]:
    """Return the least and the largest speed at any text."""
    names = {workload["name"] for workload in _of_kind(report, "texts")}
    speeds = [
        _base(report, what, baseline)[1] / cell["seconds"][quantile]
        for (what, _), cell in cells(report).items()
        if what in names
        for quantile in ("p90", "p10")
    ]
    return min(0.9, *speeds), max(1.1, *speeds)


def _speeds(report: Report, axes: Any, workload: dict[str, Any], baseline: str, *, named: bool) -> None:
    """Draw every engine's speed at one text workload, relative to the baseline's, with p10 and p90.

    Engines stand by precision, across each group a line at its fastest peer; ours say how far from it they are.
    """
    found, colours = cells(report), _colours(report)
    one, base = _base(report, workload["name"], baseline)
    place, places, names = 0.0, [], []
    for group, engines in _groups(report).items():
        aside = {"color": MUTED, "fontsize": 8.5, "ha": "right", "va": "center"}
        axes.text(1, place, group, transform=axes.get_yaxis_transform(), **aside)
        _, peer = best_peer(report, workload["name"], engines[0])
        if peer:
            style = {"color": INK, "linewidth": 1, "linestyle": (0, (2, 2)), "zorder": 2}
            axes.vlines(base / peer, place + 0.5, place + 0.5 + len(engines), **style)
        for engine in engines:
            place += 1
            places.append(place)
            names.append(_label(engine))
            cell = found.get((workload["name"], engine["name"]))
            if cell is None:
                continue
            times, ours = cell["seconds"], engine["role"] == "backend"
            low, speed, high = (base / times[name] for name in ("p90", "median", "p10"))
            colour = colours[engine["name"]] if ours else MUTED
            axes.hlines(place, low, high, color=colour, linewidth=1.6, zorder=3)
            axes.plot(
                speed, place, "o", color=colour, markersize=8, markerfacecolor=colour if ours else "white", zorder=4
            )
            ahead = f"  ({digits(peer / times['median'])}x)" if peer and ours else ""
            text = {"va": "center", "textcoords": "offset points", "xytext": (8, 0), "fontsize": 8.5, "zorder": 3}
            text["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
            text |= {"weight": "bold"} if ours else {}
            axes.annotate(digits(speed) + ahead, (max(high, speed), place), **text)
        place += 1.2
    axes.axvline(1, color=MUTED, linewidth=0.9, zorder=1)
    axes.hlines(places, 0, 1, transform=axes.get_yaxis_transform(), color=GRID, linewidth=0.8, zorder=0)
    axes.set_yticks(places, names if named else [""] * len(names))
    axes.set_ylim(place - 0.4, -0.6)
    axes.set_xscale("log", base=2)
    low, high = _range(report, baseline)
    axes.set_xlim(low / 1.15, high * (high / low) ** 0.4)  # to the right, room for the figures
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}" if value >= 1 else f"1/{1 / value:g}")
    axes.minorticks_off()
    of = "" if one == baseline else f" of {one}"
    axes.set_title(f"{workload['title']}  (1 = {seconds(base)}{of})", fontsize=10.5)


def _roofline(report: Report, axes: Any) -> None:
    """Draw every token workload's FLOP/s against its FLOPs a byte, under what the machine can do."""
    found, colours, ceilings = cells(report), _colours(report), report["ceilings"]
    workloads = _of_kind(report, "tokens")
    engines = _engines(report, workloads)
    every = [cell for (name, _), cell in found.items() if name in {w["name"] for w in workloads}]
    left, right = (pick(cell["flops_per_byte"] for cell in every) for pick in (min, max))
    left, right = left / 1.8, max(right * 1.8, left * 100)
    for engine in engines:
        mine = [found[w["name"], engine["name"]] for w in workloads if (w["name"], engine["name"]) in found]
        ours = engine["role"] == "backend"
        axes.scatter(
            [cell["flops_per_byte"] for cell in mine],
            [cell["flops_per_second"] for cell in mine],
            s=44 if ours else 26,
            color=colours[engine["name"]] if ours else "white",
            edgecolors="white" if ours else colours[engine["name"]],
            linewidths=0.8 if ours else 1.4,
            label=_label(engine),
            zorder=4 if ours else 3,
        )
    top = max(cell["flops_per_second"] for cell in every)
    for precision in dict.fromkeys(engine["precision"] for engine in engines):
        if best := peak(ceilings, precision):
            axes.plot([left, right], [best, best], color=INK, linewidth=1.3, zorder=2)
            label = f"fastest matrix product in {precision}, {rate(best, 'FLOP/s')}"
            options = {"xytext": (0, 4), "textcoords": "offset points", "ha": "right", "fontsize": 8.5, "color": MUTED}
            axes.annotate(label, (right / 1.1, best), **options)
            top = max(top, best)
    slopes = {name: c["median"] for name, c in ceilings.items() if c["unit"] == "B/s"}
    for name, slope in slopes.items():
        end = min(right, top / slope)
        axes.plot([left, end], [slope * left, slope * end], color=INK, linewidth=1, linestyle=(0, (5, 3)), zorder=2)
        upper = slope == max(slopes.values())
        options = {"gid": ALONG_A_SLOPE, "rotation_mode": "anchor", "ha": "center", "fontsize": 8.5, "color": MUTED}
        options |= {"va": "bottom" if upper else "top"}
        middle = (left * end) ** 0.5
        axes.text(middle * (0.94 if upper else 1.08), slope * middle, f"{name}, {rate(slope, 'B/s')}", **options)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    axes.set_ylim(min(*(cell["flops_per_second"] / 2 for cell in every), top / 100), top * 2.2)
    axes.minorticks_off()
    _rates(axes.yaxis, "FLOP/s")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.grid(which="major")
    axes.set_xlabel("FLOPs for each byte that must be moved (weights, ids, vectors)")
    axes.set_title("Roofline: the model alone, every length and batch size")


def _turn_labels(axes: Any) -> None:
    """Turn the labels of slopes, along which y doubles as x does."""
    for label in axes.texts:
        if label.get_gid() == ALONG_A_SLOPE:
            x, y = label.get_position()
            (left, low), (right, high) = axes.transData.transform([(x, y), (2 * x, 2 * y)])
            label.set_rotation(math.degrees(math.atan2(high - low, right - left)))


def _rates(axis: Any, unit: str) -> None:
    """Label an axis of rates with prefixes: 10 TFLOP/s."""
    prefixes = {1e12: "T", 1e9: "G", 1e6: "M", 1e3: "k", 1: ""}

    def label(value: float, _: int) -> str:
        factor = next((factor for factor in prefixes if value >= factor), 1)
        return f"{value / factor:g} {prefixes[factor]}{unit}" if value else "0"

    axis.set_major_formatter(label)


def _by_length(report: Report, axes: Any) -> None:
    """Draw tokens a second against the length of the sequences."""
    chosen, amount = _of_one_size(_of_kind(report, "tokens"))
    _lines(report, axes, chosen, "tokens_per_second", "tok/s")
    axes.set_title(f"The model alone: batches of {amount} tokens")


def _attention(report: Report, axes: Any) -> None:
    """Draw attention's FLOP/s against the length of the sequences."""
    chosen, amount = _of_one_size(_of_kind(report, "attention"))
    _lines(report, axes, chosen, "flops_per_second", "FLOP/s")
    axes.set_title(f"Attention alone: batches of {amount} tokens")


def _of_one_size(workloads: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """Return those of the batch size that most of them have, 64k if there are several such, and that size."""
    sizes = Counter(parse(workload["name"])[2] for workload in workloads)
    size = max(sizes, key=lambda size: (sizes[size], size == 64 * KIBI, size))
    chosen = [workload for workload in workloads if parse(workload["name"])[2] == size]
    return chosen, f"{size // KIBI}k" if size % KIBI == 0 else str(size)


def _lines(report: Report, axes: Any, workloads: Sequence[dict[str, Any]], figure: str, unit: str) -> None:
    """Draw a line an engine over the lengths, with p10 and p90; mixed lengths stand apart, at the right."""
    found, colours = cells(report), _colours(report)
    forms = sorted({form for w in workloads if isinstance(form := parse(w["name"])[1], int)})
    place = {form: index for index, form in enumerate(forms)} | {"mixed": len(forms) + 0.3}
    for engine in _engines(report, workloads):
        points = []
        for workload in workloads:
            cell = found.get((workload["name"], engine["name"]))
            if cell:
                times = cell["seconds"]
                low, high = (cell[figure] * times["median"] / times[name] for name in ("p90", "p10"))
                points.append((place[parse(workload["name"])[1]], cell[figure], low, high))
        points.sort()
        ours, colour = engine["role"] == "backend", colours[engine["name"]]
        marker = {"marker": "o", "markersize": 7 if ours else 5.5, "markeredgewidth": 1.4, "color": colour}
        marker |= {"markerfacecolor": colour if ours else "white", "zorder": 4 if ours else 3}
        line = [point for point in points if point[0] < len(forms)]
        axes.plot(*_columns(line, 0, 1), linewidth=2.2 if ours else 1.4, label=_label(engine), **marker)
        axes.plot(*_columns(points[len(line) :], 0, 1), linestyle="none", **marker)
        axes.vlines(*_columns(points, 0, 2, 3), color=colour, linewidth=1.2, zorder=2)
    if figure == "tokens_per_second":
        _bound(report, axes, workloads, place)
    labels = [*map(str, forms), *(["mixed"] if any(parse(w["name"])[1] == "mixed" for w in workloads) else [])]
    axes.set_xticks([place[int(label) if label.isdecimal() else label] for label in labels], labels)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y")
    _rates(axes.yaxis, unit)
    axes.set_xlabel("tokens a sequence")


def _bound(report: Report, axes: Any, workloads: Sequence[dict[str, Any]], place: dict[Any, float]) -> None:
    """Draw the tokens a second at which the model's FLOPs take all of the machine's peak."""
    used = Counter(engine["precision"] for engine in _engines(report, workloads) if engine["role"] == "backend")
    best = peak(report["ceilings"], used.most_common(1)[0][0]) if used else None
    if best is None:
        return
    bound = sorted(
        (place[form], best * w["tokens"] / w["flops"])
        for w in workloads
        if isinstance(form := parse(w["name"])[1], int)
    )
    if bound:
        style = {"color": INK, "linewidth": 1, "linestyle": (0, (5, 3)), "zorder": 1}
        axes.plot(*_columns(bound, 0, 1), label="at the machine's peak", **style)


def _columns(rows: Sequence[Sequence[float]], *indices: int) -> list[list[float]]:
    return [[row[index] for row in rows] for index in indices]


PANELS = (("tokens", _roofline), ("tokens", _by_length), ("attention", _attention))
