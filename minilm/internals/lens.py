"""The embedding lens: every layer's tokens pooled as the model pools its last, as if it ended there.

What the logit lens is to a language model: how a pair's similarity, the STS score and the geometry of the space come
about layer by layer. One pass over the texts gives all layers.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from numpy.typing import NDArray
from torch import Tensor

from minilm.config import MiniLMConfig
from minilm.encoder import SentenceEncoder
from minilm.evaluate.result import aligned
from minilm.evaluate.sts import evaluate_sts
from minilm.evaluate.sts_data import read_sts
from minilm.internals import geometry
from minilm.internals.observed import Site
from minilm.internals.points import VECTOR, Point, hidden_states, resolve
from minilm.internals.streaming import as_rows, row_point, stream
from minilm.kernels.torch_backend import TorchBackend
from minilm.texts import as_texts

_WITHIN_A_LAYER = {"avg_top2": "mean", "avg_first_last": "mean"}  # poolings that average two layers' tokens


@dataclass(frozen=True, eq=False)
class LayerEmbeddings:
    """Texts' pooled vectors at several points.

    Attributes:
        rows: each text's row.
        pooled: by point, in the order of computation: float32 `[B, C]`, on the CPU, not normalised.
    """

    rows: dict[str, int]
    pooled: dict[str, Tensor]

    def __getitem__(self, point: str) -> Tensor:
        """Return a point's vectors, `[B, C]`, a row for each different text."""
        return self.pooled[point]

    def cosines(self, first: Sequence[str], second: Sequence[str]) -> dict[str, NDArray[np.float64]]:
        """Return, by point, the cosine of each text of `first` with its partner in `second`, float64 `[n]`."""
        ours, theirs = ([self.rows[text] for text in texts] for texts in (first, second))
        pairs = {point: (vectors[ours].double(), vectors[theirs].double()) for point, vectors in self.pooled.items()}
        return {point: F.cosine_similarity(a, b).numpy() for point, (a, b) in pairs.items()}

    def encoder_at(self, point: str) -> LayerEncoder:
        """Return what evaluators take for an encoder that ends at a point (of these texts only)."""
        return LayerEncoder(self.rows, self.pooled[point])


@dataclass(frozen=True, eq=False)
class LayerEncoder:
    """Looks texts' vectors up; for `minilm.evaluate`."""

    rows: dict[str, int]
    vectors: Tensor

    def encode(self, sentences: list[str], /) -> Tensor:
        """Return one vector a text, float32 `[n, C]`."""
        return self.vectors[[self.rows[sentence] for sentence in sentences]]


@dataclass(frozen=True)
class LayerFigures:
    """Figures of each layer, or of other points.

    Attributes:
        values: by point, in the order of computation, the figures by name.
    """

    values: Mapping[str, Mapping[str, float]]

    def __getitem__(self, point: str) -> Mapping[str, float]:
        """Return a point's figures."""
        return self.values[point]

    def figure(self, name: str) -> list[float]:
        """Return one figure at every point."""
        return [figures[name] for figures in self.values.values()]

    def table(self) -> str:
        """Lay them out as text, a row a point."""
        names = list(next(iter(self.values.values())))
        rows = [[point, *(f"{figures[name]:.4f}" for name in names)] for point, figures in self.values.items()]
        return aligned([["point", *names], *rows])

    __repr__ = table


@dataclass(frozen=True, eq=False, repr=False)
class LayerAlignment:
    """The CKA of every two layers.

    Attributes:
        rows: the first model's points.
        columns: the other's, or the same.
        values: float64 `[rows, columns]`.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: NDArray[np.float64]

    def table(self) -> str:
        """Lay it out as text."""
        lines = [[row, *(f"{v:.3f}" for v in values)] for row, values in zip(self.rows, self.values, strict=True)]
        return aligned([["CKA", *self.columns], *lines])

    __repr__ = table


def chosen_points(points: str | Iterable[str] | None, config: MiniLMConfig) -> list[Point]:
    """Return the points of these names that have rows; the embeddings and every layer's output of None.

    Raises:
        UnknownPointError: there is no point of a name given.
        ValueError: a point is an attention pattern.
    """
    names = hidden_states(config) if points is None else points
    return [row_point(point.name, config) for point in resolve(names, config)]


def layer_embeddings(
    encoder: SentenceEncoder,
    texts: str | Iterable[str],
    points: str | Iterable[str] | None = None,
    *,
    on_truncate: str = "error",
    show_progress_bar: bool | None = None,
) -> LayerEmbeddings:
    """Pool each text's tokens at several points, all in one pass; memory is that of the results.

    The pooling is the model's (where that averages two layers, the mean over tokens), so of the last layer these are
    the model's vectors before normalisation. Heads are taken side by side.

    Args:
        encoder: whose; patches in force are seen.
        texts: one text or several; each different one is encoded once.
        points: names, as `capture` takes them; the embeddings and every layer's output by default.
        on_truncate: what becomes of a text over the length limit: `error`, `warn` or `ignore` (both cut it).
        show_progress_bar: `None` shows it if the `minilm` logger is at level INFO or below.

    Raises:
        UnknownPointError: there is no point of a name given.
        ValueError: no text, a text is too long, or a point is an attention pattern.
    """
    distinct: list[str] = list(dict.fromkeys(as_texts(texts)[0]))  # type: ignore[arg-type]
    parts: dict[str, list[Tensor]] = {point.name: [] for point in chosen_points(points, encoder.config)}
    backend = TorchBackend(encoder.config)
    pooling = _WITHIN_A_LAYER.get(encoder.encoding.pooling, encoder.encoding.pooling)

    def pool(kept: list[Tensor], value: Tensor, site: Site) -> None:
        rows = as_rows(value, site)
        kept.append((rows if site.point.rows == VECTOR else backend.pool([rows], site.batch, pooling)).cpu())

    visitors = {name: [partial(pool, kept)] for name, kept in parts.items()}
    stream(encoder, distinct, visitors, on_truncate=on_truncate, show_progress_bar=show_progress_bar)
    rows = {text: row for row, text in enumerate(distinct)}
    return LayerEmbeddings(rows, {name: torch.cat(kept) for name, kept in parts.items()})


def layer_similarities(
    encoder: SentenceEncoder, text_a: str, text_b: str, points: str | Iterable[str] | None = None
) -> LayerFigures:
    """Return the cosine of two texts at every layer.

    Arguments and errors are those of `layer_embeddings`.
    """
    cosines = layer_embeddings(encoder, [text_a, text_b], points).cosines([text_a], [text_b])
    return LayerFigures({point: {"cosine": float(values[0])} for point, values in cosines.items()})


def layer_sts(
    encoder: SentenceEncoder,
    data: str | os.PathLike[str] | None = None,
    *,
    tasks: Iterable[str] = ("stsb",),
    split: str = "test",
    points: str | Iterable[str] | None = None,
    show_progress_bar: bool | None = None,
) -> LayerFigures:
    """Return Spearman's correlation x 100 on STS tasks, and their average, at every layer, from one pass.

    Args:
        encoder: whose.
        data: the folder of the tasks, or None for the hub's, as `evaluate_sts` takes it.
        tasks: which of `minilm.evaluate.sts_data.TASKS`.
        split: `test`, or `dev`.
        points: as `layer_embeddings` takes them.
        show_progress_bar: `None` shows it if the `minilm` logger is at level INFO or below.

    Raises:
        EvaluationDataError: data is missing, malformed or out of reach.
        UnknownPointError: there is no point of a name given.
        ValueError: an unknown task or split, or a point is an attention pattern.
    """
    tasks = tuple(tasks)
    subsets = [part for task in read_sts(data, tasks, split).values() for part in task.values()]
    texts = [text for part in subsets for text in (*part.first, *part.second)]
    embeddings = layer_embeddings(encoder, texts, points, on_truncate="warn", show_progress_bar=show_progress_bar)
    figures = {}
    for point in embeddings.pooled:
        result = evaluate_sts(embeddings.encoder_at(point), data, tasks=tasks, split=split, show_progress_bar=False)
        figures[point] = result.figures
    return LayerFigures(figures)


def layer_geometry(
    encoder: SentenceEncoder,
    texts: Iterable[str],
    positives: Iterable[tuple[str, str]] = (),
    points: str | Iterable[str] | None = None,
    *,
    show_progress_bar: bool | None = None,
) -> LayerFigures:
    """Return measures of the space of every layer's pooled vectors; `minilm.internals.geometry` has the formulas.

    They are `effective rank` (of centred vectors), `isoscore`, `partition isotropy` (of vectors scaled to length 1, so
    that layers compare), `mean cosine`, `uniformity`, and `alignment` if positives are given.

    Args:
        encoder: whose.
        texts: what the measures are over; equal ones count once. For the effective rank and IsoScore to say something
            of the model and not of the sample, take several times as many as a vector has dimensions.
        positives: pairs of texts that belong together.
        points: as `layer_embeddings` takes them.
        show_progress_bar: `None` shows it if the `minilm` logger is at level INFO or below.

    Raises:
        UnknownPointError: there is no point of a name given.
        ValueError: fewer than 2 different texts, or all vectors are equal at a point; else as `layer_embeddings`.
    """
    texts, positives = list(dict.fromkeys(texts)), list(positives)
    wanted = [*texts, *(text for pair in positives for text in pair)]
    embeddings = layer_embeddings(encoder, wanted, points, show_progress_bar=show_progress_bar)
    figures = {}
    for point in embeddings.pooled:
        at = embeddings.encoder_at(point)
        vectors = at.encode(texts).double()
        figures[point] = {
            "effective rank": geometry.effective_rank(vectors - vectors.mean(dim=0)),
            "isoscore": geometry.isoscore(vectors),
            "partition isotropy": geometry.partition_isotropy(F.normalize(vectors, dim=1)),
            "mean cosine": geometry.mean_cosine(vectors),
            "uniformity": geometry.uniformity(vectors),
        }
        if positives:
            firsts, seconds = ([pair[side] for pair in positives] for side in (0, 1))
            figures[point]["alignment"] = geometry.alignment(at.encode(firsts), at.encode(seconds))
    return LayerFigures(figures)


def layer_cka(
    encoder: SentenceEncoder,
    texts: Iterable[str],
    other: SentenceEncoder | None = None,
    points: str | Iterable[str] | None = None,
    *,
    kernel: str = "linear",
    debiased: bool = False,
    bandwidth: float = 0.5,
    show_progress_bar: bool | None = None,
) -> LayerAlignment:
    """Return the CKA of every two layers of a model, or of every layer of one with every layer of another.

    Over pooled vectors; `minilm.internals.geometry.cka` has formulas and sources. Memory grows with the square of the
    number of texts: 32 MB a layer for 2,000.

    Args:
        encoder: whose layers are the rows.
        texts: equal ones count once.
        other: whose layers are the columns; the same model's by default.
        points: as `layer_embeddings` takes them, of both models.
        kernel: `linear` or `rbf`.
        debiased: take the unbiased HSIC; right where texts are not many times more than dimensions.
        bandwidth: of `rbf`, as a multiple of the median distance.
        show_progress_bar: `None` shows it if the `minilm` logger is at level INFO or below.

    Raises:
        UnknownPointError: there is no point of a name given.
        ValueError: too few texts (2, or 4 if debiased), an unknown kernel; else as `layer_embeddings`.
    """
    texts = list(texts)

    def kernels(model: SentenceEncoder) -> dict[str, NDArray[np.float64]]:
        names = [point.name for point in chosen_points(points, model.config)]
        pooled = layer_embeddings(model, texts, names, show_progress_bar=show_progress_bar).pooled
        options = {"debiased": debiased, "bandwidth": bandwidth}
        return {point: geometry.centred_kernel(x, kernel, **options) for point, x in pooled.items()}  # type: ignore[arg-type]

    rows = kernels(encoder)
    columns = rows if other is None else kernels(other)
    values = [[geometry.alignment_of_kernels(k, l) for l in columns.values()] for k in rows.values()]  # noqa: E741
    return LayerAlignment(tuple(rows), tuple(columns), np.array(values))
