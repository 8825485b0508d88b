"""Methods as a picture: a row a recipe, a dot a seed, the best on top, and where they all started."""

from __future__ import annotations

import math
from typing import IO, Any

from minilm.plot_style import DOTS_PER_INCH, INK, MUTED, OURS, STYLE, check_matplotlib
from minilm.train.methods_table import HEADLINE, MethodTable

ROW, BESIDES = 0.42, 1.25
"""Inches that a recipe takes, and that the picture takes besides."""


def plot(table: MethodTable, file: IO[bytes]) -> None:
    """Draw the average of the seven tasks of each recipe that has one: a dot a seed, a bar at the mean.

    A dashed line stands where the start is.

    Args:
        table: the figures.
        file: where to write the PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    check_matplotlib()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    judged = [method for method in table.methods if math.isfinite(method.mean(HEADLINE))]
    methods = sorted(judged, key=lambda method: method.mean(HEADLINE), reverse=True)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, BESIDES + ROW * max(1, len(methods))), layout="constrained")
        axes: Any = figure.subplots()
        place = {"xycoords": ("axes fraction", "data"), "xytext": (8, 0), "textcoords": "offset points", "va": "center"}
        for row, method in enumerate(methods):
            values, mean = method.values(HEADLINE), method.mean(HEADLINE)
            axes.plot([mean], [row], "|", color=INK, markersize=17, markeredgewidth=2)
            axes.plot(values, [row] * len(values), "o", color=OURS[0], markersize=7, alpha=0.6, markeredgewidth=0)
            axes.annotate(method.score(HEADLINE), (1, row), annotation_clip=False, **place)
        if math.isfinite(start := table.start[HEADLINE]):
            above = {"xycoords": ("data", "axes fraction"), "xytext": (0, 4), "textcoords": "offset points"}
            axes.axvline(start, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
            axes.annotate(f"start {start:.2f}", (start, 1), color=MUTED, fontsize=9, ha="center", **above)
        axes.set_yticks(range(len(methods)), [method.name for method in methods])
        axes.set_ylim(max(1, len(methods)) - 0.4, -0.6)
        axes.margins(x=0.08)
        axes.grid(axis="x")
        axes.set_title("average of the seven STS tasks", pad=24)
        figure.savefig(file, format="png", dpi=DOTS_PER_INCH, facecolor="white")
