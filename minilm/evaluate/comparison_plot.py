"""A comparison as a picture: a panel a figure, a row a model, each with its 95% interval."""

from __future__ import annotations

import math
from typing import IO, Any

from minilm.evaluate.comparison import SIGNIFICANT, Comparison
from minilm.evaluate.result import Result
from minilm.plot_style import DOTS_PER_INCH, FAINT, INK, MUTED, OURS, STYLE, check_matplotlib

COLUMNS = 4
ROW, HEAD = 0.3, 0.95
"""Inches that a model takes in a panel, and that a panel takes besides."""


def plot(comparison: Comparison, file: IO[bytes]) -> None:
    """Draw the headline figure in a panel of its own, with the differences from the first model, above the others.

    A dashed line stands where the first model is. A filled dot differs from it with p < 0.05, a hollow one does not.

    Args:
        comparison: what `compare` returned.
        file: where to write the PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    check_matplotlib()
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    first = next(iter(comparison.results.values()))
    others = [name for name in first.figures if name != first.headline]
    num_rows = math.ceil(len(others) / COLUMNS)
    panel = HEAD + ROW * len(comparison.results)
    with mpl.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12, hspace=0.02, wspace=0.02)
        figure = Figure(figsize=(13, (1 + num_rows) * panel + 0.7), layout=layout)
        rows: Any = figure.subfigures(2, height_ratios=[1, num_rows])
        top, below = rows
        _panel(comparison, top.subplots(), first.headline, is_headline=True)
        grid = below.add_gridspec(num_rows, COLUMNS)
        for index, name in enumerate(others):
            axes = below.add_subplot(grid[index // COLUMNS, index % COLUMNS])
            _panel(comparison, axes, name)
            axes.tick_params(labelleft=index % COLUMNS == 0)
        figure.suptitle(_title(comparison, first), x=0.012, ha="left", fontsize=10, color=MUTED)
        figure.savefig(file, format="png", dpi=DOTS_PER_INCH, facecolor="white")


def _title(comparison: Comparison, first: Result) -> str:
    """Say what was measured, and how to read it."""
    sizes = ", ".join(f"{count:,} {what}" for what, count in first.sizes.items())
    baseline = next(iter(comparison.results))
    reading = f"lines: 95% intervals   ·   filled: differs from {baseline} with p < {SIGNIFICANT}"
    return f"{first.measure}: {sizes}" + (f"   ·   {reading}" if comparison.differences else "")


def _panel(comparison: Comparison, axes: Any, figure: str, *, is_headline: bool = False) -> None:
    """Draw one figure of every model, the first at the top."""
    for row, (name, result) in enumerate(comparison.results.items()):
        value, colour = result.figures[figure], OURS[0] if row else INK
        if math.isfinite(value):
            filled = row == 0 or not comparison.differences or comparison.is_significant(name, figure)
            marker = {"marker": "o", "markersize": 7, "markeredgewidth": 1.5, "color": colour, "zorder": 3}
            axes.plot([value], [row], markerfacecolor=colour if filled else "white", **marker)
        if interval := result.intervals.get(figure):
            axes.plot([interval.low, interval.high], [row, row], color=colour, linewidth=2, solid_capstyle="round")
        place = {"xycoords": ("axes fraction", "data"), "xytext": (6, 0), "textcoords": "offset points", "va": "center"}
        text = _text(comparison, name, figure, is_headline=is_headline).replace("-", "\u2212")
        axes.annotate(text, (1, row), color=colour, fontsize=9.5, annotation_clip=False, **place)
    start = next(iter(comparison.results.values())).figures[figure]
    if math.isfinite(start):
        axes.axvline(start, color=FAINT, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    axes.set_yticks(range(len(comparison.results)), list(comparison.results))
    axes.set_ylim(len(comparison.results) - 0.4, -0.6)
    axes.margins(x=0.06)
    axes.locator_params(axis="x", nbins=8 if is_headline else 4)
    axes.grid(axis="x")
    axes.set_title(figure)


def _text(comparison: Comparison, name: str, figure: str, *, is_headline: bool) -> str:
    """Write a model's figure; in the headline's panel its difference from the first too."""
    result = comparison.results[name]
    text = f"{result.figures[figure]:.{result.digits}f}"
    difference = comparison.differences.get(name, {}).get(figure)
    if not is_headline or difference is None:
        return text
    interval = difference.interval.text(result.digits, "+")
    return f"{text}   {difference.value:+.{result.digits}f} {interval}   p = {difference.p_value:.3f}"
