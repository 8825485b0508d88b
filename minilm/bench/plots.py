"""A run's report as a picture: bars for texts; for token batches a roofline, and speed against length."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import IO, Any

from minilm.bench.report import Report, cells, choose_baseline, digits, rate
from minilm.bench.results import peak
from minilm.bench.workloads import KIBI, parse

OURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito's colours, which all eyes tell apart
THEIRS = ("#8A8F98", "#C3A66B", "#6C8EAD", "#B58FB0", "#9CB38A", "#54585F", "#C98B7B")
INK, MUTED, FAINT = "#22262B", "#5B6169", "#C9CDD3"
STYLE = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#E8EAED",
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9,
}
DOTS_PER_INCH = 150
ALONG_A_SLOPE = "along a slope"


def plot(report: Report, file: IO[bytes], baseline: str | None = None) -> None:
    """Draw what the report has, as PNG.

    Args:
        report: what `measure.run` returned.
        file: where to.
        baseline: the engine whose speed is 1 among the bars; the first by default.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the baseline is no engine of this run, or nothing was measured.
    """
    check_matplotlib()
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    baseline = choose_baseline(report, baseline)
    panels = [panel for kind, panel in PANELS if _of_kind(report, kind)]
    if not panels:
        raise ValueError("there is nothing to plot: nothing was measured")
    rows = math.ceil(len(panels) / 2)
    with mpl.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(h_pad=0.2, w_pad=0.25, hspace=0.05, wspace=0.03)
        figure = Figure(figsize=(15, 6.2 * rows + 0.4), layout=layout)
        grid = figure.add_gridspec(rows, 2)
        for index, panel in enumerate(panels):
            last_alone = index == len(panels) - 1 and index % 2 == 0
            axes = figure.add_subplot(grid[index // 2, :] if last_alone else grid[index // 2, index % 2])
            panel(report, axes, baseline)
            _legend(report, axes, 200 if last_alone else 95)
        figure.suptitle(_title(report), x=0.012, ha="left", fontsize=10, color=MUTED)
        figure.draw_without_rendering()  # the layout is settled: now a slope has an angle
        for axes in figure.axes:
            _turn_labels(axes)
        figure.savefig(file, format="png", dpi=DOTS_PER_INCH, facecolor="white")


def check_matplotlib() -> None:
    """Raise `ImportError` where matplotlib is not installed, with how to get it."""
    try:
        import matplotlib  # noqa: F401, ICN001
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "minilm[plots]"') from error


def _title(report: Report) -> str:
    machine, versions = report["machine"], report["versions"]
    threads = "/".join(map(str, report["settings"]["threads"] or [machine["threads"]]))
    device = machine.get("gpu") or f"{machine['processor']}, {threads} thread{'s' if threads != '1' else ''}"
    when = report["date"][:10]
    return f"{report['model']['source']}   ·   {device}   ·   torch {versions.get('torch', '?')}   ·   {when}"


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
    """Return a colour an engine: strong ones for ours."""
    found: dict[str, str] = {}
    for role, palette in (("backend", OURS), ("peer", THEIRS)):
        names = [engine["name"] for engine in report["engines"] if engine["role"] == role]
        found |= {name: palette[index % len(palette)] for index, name in enumerate(names)}
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


def _bars(report: Report, axes: Any, baseline: str) -> None:
    """Draw the speed of every engine at every text workload, relative to the baseline's, with p10 and p90."""
    found, colours = cells(report), _colours(report)
    workloads = [w for w in _of_kind(report, "texts") if (w["name"], baseline) in found]
    labels = {engine["name"]: _label(engine) for engine in _engines(report, workloads)}
    names = [engine["name"] for engine in report["engines"] if engine["name"] in labels]
    width = 0.82 / max(1, len(names))
    highest = 1.0
    for index, name in enumerate(names):
        places, heights, below, above = [], [], [], []
        for place, workload in enumerate(workloads):
            cell = found.get((workload["name"], name))
            if cell:
                base, times = found[workload["name"], baseline]["seconds"]["median"], cell["seconds"]
                places.append(place + (index - (len(names) - 1) / 2) * width)
                heights.append(base / times["median"])
                below.append(heights[-1] - base / times["p90"])
                above.append(base / times["p10"] - heights[-1])
        axes.bar(places, heights, width * 0.88, color=colours[name], label=labels[name], zorder=2)
        whiskers = {"fmt": "none", "ecolor": INK, "elinewidth": 0.9, "capsize": 1.5, "capthick": 0.9, "zorder": 3}
        axes.errorbar(places, heights, (below, above), **whiskers)
        for x, height, extra in zip(places, heights, above, strict=True):
            text = {"ha": "center", "va": "bottom", "textcoords": "offset points", "xytext": (0, 2.5)}
            size = 8.5 if len(names) <= 6 else 7
            axes.annotate(digits(height), (x, height + extra), fontsize=size, **text)
            highest = max(highest, height + extra)
    axes.axhline(1, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    axes.set_xticks(range(len(workloads)), [_wrapped(w) for w in workloads])
    axes.set_xlim(-0.55, len(workloads) - 0.45)
    axes.set_ylim(0, highest * 1.12)
    axes.grid(axis="y")
    axes.set_ylabel(f"speed, {baseline} = 1")
    axes.set_title("From text to vectors")


def _wrapped(workload: dict[str, Any]) -> str:
    return f"{textwrap.fill(workload['title'], 16)}\n({workload['tokens']:,} tokens)"


def _roofline(report: Report, axes: Any, _baseline: str) -> None:
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
    for dtype in dict.fromkeys(engine["dtype"] for engine in engines):
        if best := peak(ceilings, dtype):
            axes.plot([left, right], [best, best], color=INK, linewidth=1.3, zorder=2)
            label = f"fastest matrix product in {dtype}, {rate(best, 'FLOP/s')}"
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


def _by_length(report: Report, axes: Any, _baseline: str) -> None:
    """Draw tokens a second against the length of the sequences."""
    chosen, amount = _of_one_size(_of_kind(report, "tokens"))
    _lines(report, axes, chosen, "tokens_per_second", "tok/s")
    axes.set_title(f"The model alone: batches of {amount} tokens")


def _attention(report: Report, axes: Any, _baseline: str) -> None:
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
    dtypes = Counter(engine["dtype"] for engine in _engines(report, workloads) if engine["role"] == "backend")
    best = peak(report["ceilings"], dtypes.most_common(1)[0][0]) if dtypes else None
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


PANELS = (("tokens", _roofline), ("tokens", _by_length), ("attention", _attention), ("texts", _bars))
