"""Pictures without a browser: each function returns a matplotlib `Figure`; `figure.savefig("name.png")` writes it."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec

import torch
from torch import Tensor

from minilm.plot_style import DOTS_PER_INCH, FAINT, INK, MUTED, OURS, STYLE, check_matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LESS, NOTHING, MORE, LOOK = "#6BAED6", "#F0F1F2", "#F29A4A", "#5B43D6"  # all pale enough for numbers on them but LOOK
CELL = 0.46  # inches
MOST_NUMBERS = 24  # columns up to which cells hold numbers
HEAD = re.compile(r"layers\.(\d+)\.attention\.heads\.(\d+)")
Arguments = ParamSpec("Arguments")


def _styled(draw: Callable[Arguments, Figure]) -> Callable[Arguments, Figure]:
    """Draw in this package's style, whatever the process's settings are; they stay as they are."""

    @functools.wraps(draw)
    def styled(*arguments: Arguments.args, **options: Arguments.kwargs) -> Figure:
        check_matplotlib()
        import matplotlib as mpl

        with mpl.rc_context({**STYLE, "figure.dpi": DOTS_PER_INCH, "savefig.dpi": DOTS_PER_INCH}):
            return draw(*arguments, **options)

    return styled


@_styled
def grid(
    values: Tensor | Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str = "",
    unit: str = "",
    digits: int = 3,
) -> Figure:
    """Draw a matrix of numbers of either sign: blue below 0, orange above, as strong as the largest of either.

    Args:
        values: `[rows, columns]`.
        rows: the rows' names.
        columns: the columns' names.
        title: what stands above.
        unit: what the colour bar measures.
        digits: of the numbers in the cells, which stand there up to 24 columns.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: names that do not fit the matrix.
    """
    matrix = _matrix(values, (len(rows), len(columns)))
    figure, axes = _canvas(matrix, rows, extra=1.0)
    _draw_matrix(axes, matrix, rows, columns, unit, digits)
    figure.suptitle(title, x=0.02, ha="left", fontsize=12, fontweight="bold")
    return figure


@_styled
def components(values: Mapping[str, float], *, title: str = "", unit: str = "") -> Figure:
    """Draw what each component of the model adds: heads and feed-forwards by layer, and the largest of all.

    Args:
        values: numbers by component name (`layers.3.attention.heads.5`), as `decompose_pair` names them.
        title: what stands above.
        unit: what is measured.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no head among the names.
    """
    from matplotlib.figure import Figure

    rows, columns, matrix = by_layer(values)
    figure = Figure(figsize=(CELL * len(columns) + 6.5, max(CELL * len(rows) + 1.4, 3.8)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.9, 1))
    _draw_matrix(left, matrix, rows, columns, unit, 3, bar=False)
    _draw_bars(right, values, 12)
    right.set_xlabel(unit, color=MUTED)
    figure.suptitle(title, x=0.02, ha="left", fontsize=12, fontweight="bold")
    return figure


def by_layer(values: Mapping[str, float]) -> tuple[list[str], list[str], Tensor]:
    """Lay components' numbers out: a row for each layer; columns for heads, the feed-forward and the sum of the biases.

    Columns of which there is nothing are left out, and so is what belongs to no layer.

    Raises:
        ValueError: there is no head among the names.
    """
    places = {name: (int(found[1]), int(found[2])) for name in values if (found := HEAD.fullmatch(name))}
    if not places:
        raise ValueError(
            f"expected components such as layers.3.attention.heads.5, got {', '.join([*values][:3]) or 'none'}"
        )
    num_layers, num_heads = (max(numbers) + 1 for numbers in zip(*places.values(), strict=True))
    columns = [*(f"head {head}" for head in range(num_heads)), "feed-forward", "biases"]
    matrix = torch.zeros(num_layers, num_heads + 2)
    used = set(range(num_heads))
    for name, value in values.items():
        if (layer := re.match(r"layers\.(\d+)\.(.*)", name)) is not None:
            column = places[name][1] if name in places else num_heads + (layer[2] != "feed_forward")
            matrix[int(layer[1]), column] += value
            used.add(column)
    return (
        [f"layer {layer}" for layer in range(num_layers)],
        [columns[i] for i in sorted(used)],
        matrix[:, sorted(used)],
    )


@_styled
def attention(pattern: Tensor, tokens: Sequence[str], *, title: str = "") -> Figure:
    """Draw one head's attention: a row for each token that looks, a column for each looked at.

    Args:
        pattern: `[L, L]`, as `capture(...)["layers.K.attention.pattern"][text][head]`.
        tokens: the L tokens.
        title: what stands above.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: not a matrix with a row and a column for each token.
    """
    matrix = _matrix(pattern, (len(tokens), len(tokens)))
    figure, axes = _canvas(matrix, tokens, extra=0.3)
    axes.imshow(matrix.numpy(), cmap=_sequential(), vmin=0, vmax=1, aspect="equal")
    _name(axes, tokens, tokens)
    if len(tokens) <= MOST_NUMBERS:
        for row, line in enumerate(matrix.tolist()):
            for column, weight in enumerate(line):
                colour = "white" if weight > 0.55 else INK
                if weight >= 0.01:
                    axes.text(column, row, f"{100 * weight:.0f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_xlabel("looked at, in percent", color=MUTED)
    figure.suptitle(title, x=0.02, ha="left", fontsize=12, fontweight="bold")
    return figure


@_styled
def heads(patterns: Tensor, *, title: str = "") -> Figure:
    """Draw the attention of every head, small: a row of pictures for each layer.

    Args:
        patterns: `[layers, H, L, L]` of one text.
        title: what stands above.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: another shape.
    """
    if patterns.dim() != 4 or patterns.shape[2] != patterns.shape[3]:
        raise ValueError(f"expected attention patterns [layers, heads, L, L], got {list(patterns.shape)}")
    from matplotlib.figure import Figure

    num_layers, num_heads = patterns.shape[:2]
    figure = Figure(figsize=(0.8 * num_heads + 1, 0.8 * num_layers + 0.7), layout="constrained")
    panels = figure.subplots(num_layers, num_heads, squeeze=False)
    for layer, row in enumerate(panels):
        for head, axes in enumerate(row):
            pattern = patterns[layer, head].detach().float().cpu().numpy()
            axes.imshow(pattern, cmap=_sequential(), vmin=0, vmax=1, aspect="equal")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if layer == 0:
                axes.set_title(str(head), fontsize=9, fontweight="normal", loc="center", color=MUTED, pad=3)
        row[0].set_ylabel(f"layer {layer}", rotation=0, ha="right", va="center", color=MUTED)
    figure.suptitle(title, x=0.02, ha="left", fontsize=12, fontweight="bold")
    return figure


@_styled
def layers(curves: Mapping[str, Sequence[float]], names: Sequence[str], *, title: str = "", unit: str = "") -> Figure:
    """Draw what changes from layer to layer, a line for each curve.

    Args:
        curves: by label, a number for each of `names`.
        names: the places, such as `embeddings`, `layer 0`, ...
        title: what stands above.
        unit: what is measured.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a curve with more or fewer numbers than there are names.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 1.1 * len(names)), 3.6), layout="constrained")
    axes = figure.add_subplot()
    for index, (label, values) in enumerate(curves.items()):
        if len(values) != len(names):
            raise ValueError(f"{label} has {len(values)} numbers for {len(names)} places")
        marker = "osD^v"[index // len(OURS) % 5]
        axes.plot(names, values, marker + "-", color=OURS[index % len(OURS)], label=label, lw=2, mfc="white", mew=2)
        if len(curves) == 1:
            for place, value in enumerate(values):
                falls = place > 0 and value < values[place - 1]  # then the line comes from above
                offset = (0, -18 if falls else 9)
                axes.annotate(f"{value:.2f}", (place, value), offset, textcoords="offset points", ha="center")
    axes.grid(axis="y")
    axes.spines["left"].set_visible(False)
    axes.margins(y=0.2)
    axes.set_ylabel(unit, color=MUTED)
    axes.set_title(title)
    if len(curves) > 1:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


@_styled
def bars(values: Mapping[str, float], *, title: str = "", unit: str = "", most: int = 12) -> Figure:
    """Draw the largest of some named numbers, of either sign, as bars.

    Args:
        values: numbers by name.
        title: what stands above.
        unit: what is measured.
        most: how many.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there are no numbers.
    """
    if not values:
        raise ValueError("expected numbers to draw, got none")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 0.3 * min(most, len(values)) + 1), layout="constrained")
    axes = figure.add_subplot()
    _draw_bars(axes, values, most)
    axes.set_xlabel(unit, color=MUTED)
    axes.set_title(title)
    return figure


def _draw_matrix(
    axes: Any, matrix: Tensor, rows: Sequence[str], columns: Sequence[str], unit: str, digits: int, *, bar: bool = True
) -> None:
    """Draw numbers of either sign as coloured cells."""
    most = matrix.abs().max().item() or 1.0
    image = axes.imshow(matrix.numpy(), cmap=_diverging(), vmin=-most, vmax=most, aspect="equal")
    _name(axes, rows, columns)
    if len(columns) <= MOST_NUMBERS:
        for row, line in enumerate(matrix.tolist()):
            for column, value in enumerate(line):
                axes.text(column, row, _signed(value, digits), ha="center", va="center", fontsize=7, color=INK)
    if bar:
        scale = axes.figure.colorbar(image, ax=axes, shrink=min(1.0, 5 / len(rows)), aspect=14, pad=0.02)
        scale.outline.set_visible(False)
        scale.set_label(unit, color=MUTED)


def _draw_bars(axes: Any, values: Mapping[str, float], most: int) -> None:
    """Draw the largest of some named numbers as bars."""
    chosen = sorted(values.items(), key=lambda item: -abs(item[1]))[:most][::-1]
    drawn = axes.barh([name for name, _ in chosen], [value for _, value in chosen], height=0.7)
    for bar, (_, value) in zip(drawn, chosen, strict=True):
        bar.set_color(LESS if value < 0 else MORE)
    axes.bar_label(drawn, [_signed(value, 3) for _, value in chosen], padding=4, fontsize=9)
    axes.axvline(0, color=FAINT, lw=1)
    axes.margins(x=0.3)
    axes.spines[:].set_visible(False)
    axes.set(xticks=[])


def _canvas(matrix: Tensor, rows: Sequence[str], extra: float) -> tuple[Figure, Any]:
    """Return a figure with room for a matrix of cells and its names, and its axes."""
    from matplotlib.figure import Figure

    height, width = matrix.shape
    cell = CELL if width <= MOST_NUMBERS else CELL / 2
    side = 0.09 * max(map(len, rows), default=0)
    figure = Figure(figsize=(max(4.0, cell * width + side + extra + 0.4), cell * height + 1.6), layout="constrained")
    return figure, figure.add_subplot()


def _name(axes: Any, rows: Sequence[str], columns: Sequence[str]) -> None:
    """Put names beside the cells of a matrix and above them, and thin lines between the cells."""
    axes.set_xticks(range(len(columns)), columns, rotation=50, ha="left", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.set_xticks([edge - 0.5 for edge in range(len(columns) + 1)], minor=True)
    axes.set_yticks([edge - 0.5 for edge in range(len(rows) + 1)], minor=True)
    axes.grid(which="minor", color="white", lw=1.5)
    axes.set_axisbelow(False)
    axes.spines[:].set_visible(False)


def _matrix(values: Tensor | Sequence[Sequence[float]], shape: tuple[int, int]) -> Tensor:
    """Return values as a float32 matrix on the CPU.

    Raises:
        ValueError: they do not have this shape.
    """
    matrix = torch.as_tensor(values).detach().float().cpu()
    if tuple(matrix.shape) != shape or not matrix.numel():
        raise ValueError(
            f"expected a matrix with a row and a column for each name, {list(shape)}, got {list(matrix.shape)}"
        )
    return matrix


def _signed(value: float, digits: int) -> str:
    """Return a number with its sign and no zero before the point, as short as a cell wants it."""
    text = f"{abs(value):.{digits}f}"
    return "0" if float(text) == 0 else ("\N{MINUS SIGN}" if value < 0 else "+") + text.removeprefix("0")


@functools.cache
def _diverging() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("contribution", [LESS, NOTHING, MORE])


@functools.cache
def _sequential() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("attention", [NOTHING, LOOK])
