"""Progress bars: tqdm's, on stderr, and only when asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(
    show: bool | None, total: int | None, description: str, unit: str
) -> Iterator[Callable[[int], object]]:
    """Give a function that moves a bar on by so many units.

    Args:
        show: `None` shows it if the `minilm` logger is at level INFO or below, as sentence-transformers does.
        total: units to do, if known.
        description: what is being done.
        unit: what is counted.
    """
    if show is None:
        show = logging.getLogger("minilm").getEffectiveLevel() <= logging.INFO
    if not show:
        yield lambda _: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=description, unit=unit, dynamic_ncols=True) as bar:
        yield bar.update
