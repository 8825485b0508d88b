"""What a run tells: a CSV file with a line every few steps, TensorBoard if wanted, a picture at the end."""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilm.plot_style import DOTS_PER_INCH, OURS, STYLE, check_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = ("step", "epoch", "loss", "learning_rate", "gradient_norm", "texts_per_second", "score", "seconds")


class RunLog:
    """A run's figures, appended to `log.csv` line by line, and sent to TensorBoard if asked.

    A resumed run drops the lines after the step it resumes from, which it will write again.

    Args:
        folder: where `log.csv` is, or will be.
        step: the step that the run begins at; 0 for a new one.
        tensorboard: whether to write TensorBoard's files to `folder/tensorboard` too.

    Raises:
        ImportError: TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path, step: int = 0, *, tensorboard: bool = False) -> None:
        self.path = folder / "log.csv"
        kept = [row for row in read_log(self.path) if row["step"] <= step] if step and self.path.exists() else []
        temporary = self.path.with_name(".log.csv.writing")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows({name: _shown(value) for name, value in row.items()} for row in kept)
        temporary.replace(self.path)
        self.seconds = logged_seconds(kept)
        self._board = _tensorboard(folder / "tensorboard", step) if tensorboard else None

    def write(self, figures: Mapping[str, float]) -> None:
        """Append a line; what is not given of `COLUMNS` stays empty."""
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS).writerow({name: _shown(value) for name, value in figures.items()})
        if self._board is not None:
            for name in COLUMNS[2:-1]:
                if name in figures:
                    self._board.add_scalar(name, figures[name], int(figures["step"]))

    def close(self) -> None:
        """Finish TensorBoard's files."""
        if self._board is not None:
            self._board.close()


def read_log(path: Path) -> list[dict[str, float]]:
    """Read the lines of a `log.csv`: nan where nothing was written. A last line that was cut short is left out."""
    with path.open(newline="", encoding="utf-8") as file:
        lines = [line for line in file if line.endswith("\n")]
    rows = csv.DictReader(lines)
    return [{name: float(row[name] or "nan") for name in COLUMNS} for row in rows]


def logged_seconds(rows: Sequence[Mapping[str, float]]) -> float:
    """Return how long a run had taken when it last told, from a log's rows; 0 if it never did."""
    return max((row["seconds"] for row in rows if not math.isnan(row["seconds"])), default=0.0)


def plot_log(path: Path, picture: Path) -> Path:
    """Draw loss and, where there are any, scores of a `log.csv` over the steps; return the picture's path.

    Raises:
        ImportError: matplotlib is not installed.
    """
    check_matplotlib()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rows = read_log(path)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes: Axes = figure.subplots()
        axes.set_xlabel("step")
        _draw_losses(axes, *_points(rows, "loss"))
        steps, scores = _points(rows, "score")
        if steps:
            _draw_scores(axes.twinx(), steps, scores)
        figure.savefig(picture, dpi=DOTS_PER_INCH)
    return picture


def _draw_losses(axes: Axes, steps: list[float], losses: list[float]) -> None:
    """Draw losses, and their moving average over them."""
    axes.set_ylabel("loss", color=OURS[0])
    axes.plot(steps, losses, color=OURS[0], alpha=0.35, linewidth=1)
    axes.plot(steps, _smoothed(losses), color=OURS[0], linewidth=2)


def _draw_scores(axes: Axes, steps: list[float], scores: list[float]) -> None:
    """Draw dev scores, the best of them as a number."""
    axes.set_ylabel("dev score", color=OURS[1])
    axes.plot(steps, scores, color=OURS[1], marker="o", markersize=4)
    best = max(range(len(scores)), key=scores.__getitem__)
    label, place = f"{scores[best]:.2f}", (steps[best], scores[best])
    axes.annotate(label, place, xytext=(0, 6), textcoords="offset points", ha="center", color=OURS[1])
    axes.margins(y=0.15)


@contextmanager
def training_bar(show: bool | None, total: int, done: int) -> Iterator[Callable[[str], object]]:
    """Give a function that moves a bar on by a step and shows a text beside it (the one before, for an empty one).

    Args:
        show: `None` shows it if the `minilm` logger is at level INFO or below.
        total: steps to do.
        done: steps done before.
    """
    if show is None:
        show = logging.getLogger("minilm").getEffectiveLevel() <= logging.INFO
    if not show:
        yield lambda _: None
        return
    from tqdm import tqdm

    with tqdm(total=total, initial=done, desc="train", unit="step", dynamic_ncols=True) as bar:

        def advance(text: str) -> None:
            if text:
                bar.set_postfix_str(text, refresh=False)
            bar.update()

        yield advance


def _points(rows: Sequence[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    """Return the steps at which a figure was written, and the figures."""
    pairs = [(row["step"], row[name]) for row in rows if not math.isnan(row[name])]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _smoothed(values: Sequence[float], weight: float = 0.1) -> list[float]:
    """Return an exponential moving average."""
    smoothed: list[float] = []
    for value in values:
        smoothed.append(value if not smoothed else smoothed[-1] + weight * (value - smoothed[-1]))
    return smoothed


def _shown(value: float) -> str:
    """Write a number so that it comes back as it was; nothing for nan."""
    return "" if math.isnan(value) else repr(int(value)) if float(value).is_integer() else repr(float(value))


def _tensorboard(folder: Path, step: int) -> Any:
    """Open TensorBoard's writer."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError('tensorboard = true needs TensorBoard: pip install "minilm[train]"') from error
    return SummaryWriter(str(folder), purge_step=step)
