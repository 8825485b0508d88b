"""Linear probes: what can be read off a point's activations by a linear map, cross-validated, against a control.

A classifier reads classes (logistic regression; the score is accuracy), a regressor numbers (ridge; R²). A score says
little by itself, for a probe can learn by heart: the control task (Hewitt and Liang, 2019,
https://arxiv.org/abs/1909.03368) gives every kind of item (a word, for tokens; a text, for texts) a label drawn at
random from all labels, and selectivity is what the probe scores above that. It needs scikit-learn (extra `probes`).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minilm.encoder import SentenceEncoder
from minilm.evaluate.result import aligned
from minilm.internals.lens import chosen_points, layer_embeddings
from minilm.internals.observed import Site
from minilm.internals.points import VECTOR
from minilm.internals.streaming import as_rows, stream
from minilm.texts import as_texts

Scores = NDArray[np.float64]


@dataclass(frozen=True, eq=False, repr=False)
class ProbeScores:
    """How well probes read labels off each point.

    Attributes:
        points: where.
        scores: accuracy, or R² of numbers, on each held-out fold: float64 `[points, folds]`.
        controls: the same of the control task.
        baseline: the accuracy of always guessing the commonest label; 0, the R² of guessing the mean, for numbers.
        num_items: texts, or tokens, with a label.
    """

    points: tuple[str, ...]
    scores: Scores
    controls: Scores
    baseline: float
    num_items: int

    @property
    def selectivity(self) -> Scores:
        """Mean score less the control's, `[points]`."""
        selectivity: Scores = self.scores.mean(axis=1) - self.controls.mean(axis=1)
        return selectivity

    def table(self) -> str:
        """Lay them out as text: mean and standard deviation over folds, control, selectivity."""
        rows = [
            [point, f"{scores.mean():.3f}", f"{scores.std():.3f}", f"{controls.mean():.3f}", f"{above:+.3f}"]
            for point, scores, controls, above in zip(
                self.points, self.scores, self.controls, self.selectivity, strict=True
            )
        ]
        head = f"{self.num_items:,} items, baseline {self.baseline:.3f}\n\n"
        return head + aligned([["point", "score", "std", "control", "selectivity"], *rows])

    __repr__ = table


def probe_texts(
    encoder: SentenceEncoder,
    texts: Sequence[str],
    labels: Sequence[Hashable],
    points: str | Iterable[str] | None = None,
    *,
    folds: int = 5,
    regularization: float = 1.0,
    seed: int = 0,
    show_progress_bar: bool | None = None,
) -> ProbeScores:
    """Read a label a text off its pooled vector at each point.

    Args:
        encoder: whose.
        texts: equal ones never are in different folds.
        labels: one a text: classes, or floats for regression.
        points: names, as `capture` takes them; the embeddings and every layer's output by default.
        folds: of the cross-validation; classes are spread evenly over them.
        regularization: the penalty on the squared weights, of standardised activations; above 0.
        seed: of the folds and the control's labels.
        show_progress_bar: `None` shows it if the `minilm` logger is at level INFO or below.

    Raises:
        ImportError: scikit-learn is not installed.
        UnknownPointError: there is no point of a name given.
        ValueError: not one label a text, fewer than two classes, fewer texts of a class (or in all) than folds; else as
            `layer_embeddings`.
    """
    texts = list(as_texts(texts)[0])  # type: ignore[arg-type]
    if len(labels) != len(texts):
        raise ValueError(f"expected one label a text, got {len(labels)} for {len(texts)} texts")
    embeddings = layer_embeddings(encoder, texts, points, show_progress_bar=show_progress_bar)
    groups = np.array([embeddings.rows[text] for text in texts])
    features = {point: vectors[groups].numpy() for point, vectors in embeddings.pooled.items()}
    return _cross_validate(features, list(labels), groups, groups, folds, regularization, seed)


def probe_tokens(
    encoder: SentenceEncoder,
    texts: Sequence[str],
    labels: Sequence[Sequence[Hashable]],
    points: str | Iterable[str] | None = None,
    *,
    folds: int = 5,
    regularization: float = 1.0,
    seed: int = 0,
    show_progress_bar: bool | None = None,
) -> ProbeScores:
    """Read a label a token off its vector at each point; all labelled tokens' vectors are in memory at once.

    Args:
        encoder: whose.
        texts: the tokens of a text never are in different folds.
        labels: for each text, one label for each of its tokens, [CLS] and [SEP] included
            (`encoder.tokenizer.tokens(encoder.tokenizer(text).ids)` are the tokens); None leaves a token out.
        points: names, as `capture` takes them; the embeddings and every layer's output by default.
        folds: of the cross-validation.
        regularization: the penalty on the squared weights, of standardised activations; above 0.
        seed: of the folds and the control's labels, one a word piece.
        show_progress_bar: `None` shows it if the `minilm` logger is at level INFO or below.

    Raises:
        ImportError: scikit-learn is not installed.
        UnknownPointError: there is no point of a name given.
        ValueError: not one label a token (the text is named), a point with one row a text; else as `probe_texts`.
    """
    texts = list(as_texts(texts)[0])  # type: ignore[arg-type]
    ids = [encoder.tokenizer(text).ids for text in texts]
    if list(map(len, labels)) != list(map(len, ids)):
        wrong = next((i for i, (a, b) in enumerate(zip(labels, ids, strict=False)) if len(a) != len(b)), len(labels))
        raise ValueError(f"expected one label a token, [CLS] and [SEP] included; text {wrong} has another number")
    chosen = chosen_points(points, encoder.config)
    if pooled := [point.name for point in chosen if point.rows == VECTOR]:
        raise ValueError(f"{pooled[0]} has one row a text, and no tokens to probe")
    flat = [label for of_text in labels for label in of_text]
    labelled = torch.tensor([label is not None for label in flat], dtype=torch.bool)
    features: dict[str, list[Tensor]] = {point.name: [] for point in chosen}
    done = dict.fromkeys(features, 0)

    def keep(name: str, value: Tensor, site: Site) -> None:
        rows = as_rows(value, site).cpu()
        features[name].append(rows[labelled[done[name] : done[name] + len(rows)]])
        done[name] += len(rows)

    stream(encoder, texts, {name: [partial(keep, name)] for name in features}, show_progress_bar=show_progress_bar)
    number = {text: index for index, text in enumerate(texts)}
    groups = np.array([number[text] for text, pieces in zip(texts, ids, strict=True) for _ in pieces])
    pieces = np.array([piece for of_text in ids for piece in of_text])
    kept = labelled.numpy()
    stacked = {name: torch.cat(rows).numpy() for name, rows in features.items()}
    chosen_labels = [label for label in flat if label is not None]
    return _cross_validate(stacked, chosen_labels, groups[kept], pieces[kept], folds, regularization, seed)


def _cross_validate(
    features: dict[str, NDArray[np.float32]],
    labels: list[Any],
    groups: NDArray[np.int64],
    kinds: NDArray[np.int64],
    folds: int,
    regularization: float,
    seed: int,
) -> ProbeScores:
    """Score probes on every point, for the labels and for the control's.

    Args:
        features: by point, `[n, width]`.
        labels: `[n]`.
        groups: what must not be in different folds, `[n]`.
        kinds: what gets one label in the control task, `[n]`.
        folds: how many.
        regularization: the penalty.
        seed: of folds and control.
    """
    try:
        from sklearn.linear_model import LogisticRegression, Ridge
        from sklearn.model_selection import GroupKFold, StratifiedGroupKFold, cross_val_score
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError('probes need scikit-learn: pip install "minilm[probes]"') from error

    if not regularization > 0:
        raise ValueError(f"regularization must be above 0, got {regularization}")
    numeric = all(isinstance(label, float | np.floating) for label in labels)
    target = np.array(labels) if numeric else np.unique([str(label) for label in labels], return_inverse=True)[1]
    _check_enough(target, groups, folds, numeric=numeric)
    # scikit-learn's C is 1 / the penalty, for the sum of the losses, which is what Ridge's alpha is the penalty to.
    estimator = Ridge(alpha=regularization) if numeric else LogisticRegression(C=1 / regularization, max_iter=2000)
    splitter = (GroupKFold if numeric else StratifiedGroupKFold)(folds, shuffle=True, random_state=seed)
    splits = list(splitter.split(target, target, groups))
    _, of_kind = np.unique(kinds, return_inverse=True)
    control = np.random.default_rng(seed).choice(target, of_kind.max() + 1)[of_kind]

    def scores(rows: NDArray[np.float32], wanted: NDArray[Any]) -> Scores:
        result: Scores = cross_val_score(make_pipeline(StandardScaler(), estimator), rows, wanted, cv=splits)
        return result

    return ProbeScores(
        points=tuple(features),
        scores=np.stack([scores(rows, target) for rows in features.values()]),
        controls=np.stack([scores(rows, control) for rows in features.values()]),
        baseline=0.0 if numeric else float(np.bincount(target).max() / len(target)),
        num_items=len(target),
    )


def _check_enough(target: NDArray[Any], groups: NDArray[np.int64], folds: int, *, numeric: bool) -> None:
    """Raise a ValueError if there are too few items to divide."""
    if folds < 2 or len(set(groups.tolist())) < folds:
        raise ValueError(f"expected 2 folds or more, and a text for each, got {folds} and {len(set(groups.tolist()))}")
    if numeric:
        return
    sizes = [len(set(groups[target == label].tolist())) for label in np.unique(target)]
    if len(sizes) < 2 or min(sizes) < folds:
        raise ValueError(
            f"expected at least 2 labels, each in {folds} texts or more (one a fold); got {len(sizes)}, the rarest in "
            f"{min(sizes)}"
        )
