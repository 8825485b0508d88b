"""Clustering: how well k-means on the vectors finds the groups that people made, by V-measure.

V-measure is the harmonic mean of homogeneity, 1 - H(label | cluster) / H(label), and completeness,
1 - H(cluster | label) / H(cluster) (Rosenberg and Hirschberg, 2007, https://aclanthology.org/D07-1043). k is the number
of labels; of ten starts by k-means++ the clustering with the least within-cluster sum of squares is taken. It needs
scikit-learn.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from minilm.evaluate.files import EvaluationDataError, read_columns
from minilm.evaluate.result import Counts, Result
from minilm.evaluate.vectors import Encoder, unit_vectors

FORM = "label<TAB>text"
STARTS = 10


@dataclass(frozen=True)
class ClusteringResult(Result):
    """What `evaluate_clustering` measured; it has no intervals, for each resample would have to be clustered again.

    Attributes:
        labels: each text's label.
        clusters: the number of each text's cluster.
    """

    measure: ClassVar[str] = "clustering"
    headline: ClassVar[str] = "V-measure"
    labels: tuple[str, ...]
    clusters: tuple[int, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """The numbers of texts and labels."""
        return {"texts": len(self.labels), "labels": len(set(self.labels))}

    def recount(self, counts: Sequence[Counts]) -> dict[str, float]:  # noqa: ARG002 - there are no units
        """Compute the agreement of labels and clusters."""
        from sklearn.metrics import homogeneity_completeness_v_measure

        homogeneity, completeness, v_measure = homogeneity_completeness_v_measure(self.labels, self.clusters)
        return {self.headline: v_measure, "homogeneity": homogeneity, "completeness": completeness}


def evaluate_clustering(
    encoder: Encoder, data: str | os.PathLike[str], *, seed: int = 0, show_progress_bar: bool | None = None
) -> ClusteringResult:
    """Measure an encoder on clustering.

    Args:
        encoder: any object whose `encode(list of str)` returns an `[n, C]` array or CPU tensor.
        data: a file of `label<TAB>text` lines in UTF-8, without a header; it may be compressed as `.gz` or `.xz`.
        seed: of the ten starts of k-means.
        show_progress_bar: `None` shows it if the `minilm` logger is at level INFO or below.

    Raises:
        EvaluationDataError: the file is missing, a line is malformed (it is named), or there is only one label.
        ImportError: scikit-learn is not installed.
        ValueError: the encoder's vectors are unusable.
    """
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise ImportError('clustering needs scikit-learn: pip install "minilm[eval]"') from error

    labels, texts = zip(*(columns for _, columns in read_columns(data, FORM)), strict=True)
    if len(set(labels)) < 2:
        raise EvaluationDataError(f"{data}: expected several labels, got only {labels[0]!r}")
    vectors = unit_vectors(encoder.encode, texts, show_progress_bar)[texts]
    clusters = KMeans(len(set(labels)), n_init=STARTS, random_state=seed).fit_predict(vectors)
    return ClusteringResult(labels, tuple(clusters.tolist()))
