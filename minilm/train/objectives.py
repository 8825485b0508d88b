"""What a run minimises: an objective picks vectors out of a batch and applies a loss, with parameters of its own.

The trainer encodes every text and gives an objective the pooled vectors alone, so that the gradient reaches the encoder
through them only, and cached gradients and gathered batches work with every objective. Those that learn from a teacher
are in `distillation`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from minilm.train import losses
from minilm.train.losses import check_positive

Texts = Mapping[str, Mapping[str, Tensor]]
Targets = Mapping[str, Tensor]


class Objective(nn.Module):
    """What a run minimises. Subclasses set the attributes and write `loss`; the trainer calls the module.

    It stays in training mode while it trains: in evaluation mode nothing is remembered (see `distillation.MemoryBank`).
    Constructor arguments are plain values, as a recipe has them. Those called `student_width` (C, the encoder's hidden
    size) and `teacher_width` (D, of the teacher's vectors) are the trainer's to fill in.

    Attributes:
        columns: text columns of a row, such as `("query", "positive", "negatives")`.
        states: which pooled states of each text it needs: `embedding` (as the encoder pools, and normalises if so set),
            `unnormalized` (the same, never normalised), `layer.0` (mean of the embeddings' output) to `layer.6`.
        targets: what else of a row it needs: `score` (`[n]`), `teacher` (the teacher's vector of the text, `[n, D]`).
        views: how often each text is encoded, each time with dropout of its own.
        output_layer: a linear map from the encoder's vector, normalised or not, to the one that the trained model is to
            give (normalised if the encoder's is): it becomes the model's output layer. None where it is the encoder's.
    """

    columns: tuple[str, ...]
    states: tuple[str, ...] = ("embedding",)
    targets: tuple[str, ...] = ()
    views: int = 1
    output_layer: nn.Linear | None

    def __init__(self) -> None:
        super().__init__()
        self.register_module("output_layer", None)

    def prepare(self, texts: Texts, targets: Targets) -> None:
        """See a sample of what `forward` gets once, before the first step of a new run; most need nothing."""

    def forward(self, texts: Texts, targets: Targets) -> Tensor:
        """Return the loss of a batch of n rows, a scalar, computed in float32 at least, autocast or not.

        Args:
            texts: `texts[column][state]` is `[n, C]`; `[n, k, C]` for a column that holds k texts a row (negatives),
                or where `views` is k.
            targets: `targets[name]` is `[n, ...]`.

        Raises:
            ValueError: something it needs is missing, misshapen or out of range.
        """
        self._check(texts, targets)
        wide_texts = {c: {s: _widened(texts[c][s]) for s in self.states} for c in self.columns}
        wide_targets = {name: _widened(targets[name]) for name in self.targets}
        device = wide_texts[self.columns[0]][self.states[0]].device
        with torch.autocast(device.type, enabled=False):
            return self.loss(wide_texts, wide_targets)

    def loss(self, texts: Texts, targets: Targets) -> Tensor:
        """Return the loss, given all that it needs, in float32 at least."""
        raise NotImplementedError

    def _check(self, texts: Texts, targets: Targets) -> None:
        """Check that everything it needs is there, for the same number of rows."""
        vectors = {f"texts[{c!r}][{s!r}]": texts.get(c, {}).get(s) for c in self.columns for s in self.states}
        needed = vectors | {f"targets[{name!r}]": targets.get(name) for name in self.targets}
        if missing := [name for name, tensor in needed.items() if tensor is None]:
            raise ValueError(f"{type(self).__name__} needs {', '.join(missing)}; the batch lacks them")
        shapes = {name: list(tensor.shape) for name, tensor in needed.items() if tensor is not None}
        if len({tuple(shape[:1]) for shape in shapes.values()}) > 1:
            raise ValueError(f"expected as many rows of each, got {', '.join(f'{k} {v}' for k, v in shapes.items())}")
        for name in vectors if self.views > 1 else ():
            if len(shapes[name]) != 3 or shapes[name][1] != self.views:
                raise ValueError(f"expected {name} to be [n, {self.views}, C], one for each view, got {shapes[name]}")


class UnsupervisedSimCSE(Objective):
    """A text, encoded twice with different dropout, finds itself in the batch (`losses.simcse_unsupervised`)."""

    columns = ("text",)
    views = 2

    def __init__(self, temperature: float = 0.05) -> None:
        super().__init__()
        self.temperature = check_positive("temperature", temperature)

    def loss(self, texts: Texts, targets: Targets) -> Tensor:  # noqa: ARG002 - as the base class has it
        """Apply the loss to the two views."""
        first, second = texts["text"]["embedding"].unbind(1)
        return losses.simcse_unsupervised(first, second, self.temperature)


class Contrastive(Objective):
    """A query finds its positive among all texts of the batch (`losses.info_nce`).

    With NLI triplets (premise, entailed, contradiction) as query, positive and negatives this is supervised SimCSE.

    Args:
        temperature: τ > 0.
        hard_negatives: whether rows have a column of negatives.
        symmetric: whether a positive has to find its query too.
    """

    def __init__(self, temperature: float = 0.05, hard_negatives: bool = True, symmetric: bool = False) -> None:
        super().__init__()
        self.columns = ("query", "positive", "negatives") if hard_negatives else ("query", "positive")
        self.temperature = check_positive("temperature", temperature)
        self.symmetric = symmetric

    def loss(self, texts: Texts, targets: Targets) -> Tensor:  # noqa: ARG002
        """Apply the loss to queries, positives and, if there are any, negatives."""
        queries, positives = texts["query"]["embedding"], texts["positive"]["embedding"]
        negatives = texts["negatives"]["embedding"] if "negatives" in texts else None
        return losses.info_nce(queries, positives, negatives, self.temperature, self.symmetric)


class Ranking(Objective):
    """The reference's fine-tuning: a query finds its positive by plain inner products (`losses.ranking`)."""

    columns = ("query", "positive", "negatives")

    def loss(self, texts: Texts, targets: Targets) -> Tensor:  # noqa: ARG002
        """Apply the loss to queries and, query by query, the positive with its negatives."""
        queries, positives, negatives = (texts[column]["embedding"] for column in self.columns)
        rows = torch.cat([positives, negatives.flatten(1)], dim=1)  # [n, (1 + k)·C]
        return losses.ranking(queries, rows.view(-1, queries.shape[1]))


class CosineRegression(Objective):
    """The cosine of two sentences is to be their score, from -1 to 1 (`losses.cosine_regression`)."""

    columns = ("sentence1", "sentence2")
    targets = ("score",)

    def loss(self, texts: Texts, targets: Targets) -> Tensor:
        """Apply the loss to the pairs and their scores."""
        first, second = (texts[column]["embedding"] for column in self.columns)
        return losses.cosine_regression(first, second, targets["score"])


class CoSENT(Objective):
    """Of two pairs the one with the higher score is to have the higher cosine (`losses.cosent`)."""

    columns = ("sentence1", "sentence2")
    targets = ("score",)

    def __init__(self, temperature: float = 0.05) -> None:
        super().__init__()
        self.temperature = check_positive("temperature", temperature)

    def loss(self, texts: Texts, targets: Targets) -> Tensor:
        """Apply the loss to the pairs and their scores."""
        first, second = (texts[column]["embedding"] for column in self.columns)
        return losses.cosent(first, second, targets["score"], self.temperature)


class Matryoshka(Objective):
    """Another objective at several widths at once, so that vectors may be cut to them later (`losses.matryoshka`).

    Args:
        objective: one without parameters or memory, which would be of one width.
        widths: from 1 to C each.
        weights: one for each width; 1 each by default.

    Raises:
        ValueError: the objective has parameters or a memory.
    """

    def __init__(
        self,
        objective: Objective,
        widths: Sequence[int] = (384, 256, 128, 64),
        weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if state := list(objective.state_dict()):
            raise ValueError(f"expected an objective that works at any width, but {', '.join(state)} is of one width")
        self.columns, self.states = objective.columns, objective.states
        self.targets, self.views = objective.targets, objective.views
        self.objective, self.widths, self.weights = objective, widths, weights

    def loss(self, texts: Texts, targets: Targets) -> Tensor:
        """Apply the objective to all vectors, cut."""
        places = [(column, state) for column in self.columns for state in self.states]

        def at_one_width(*vectors: Tensor) -> Tensor:
            cut: dict[str, dict[str, Tensor]] = {column: {} for column in self.columns}
            for (column, state), vector in zip(places, vectors, strict=True):
                cut[column][state] = vector
            return self.objective.loss(cut, targets)

        vectors = [texts[column][state] for column, state in places]
        return losses.matryoshka(at_one_width, vectors, self.widths, self.weights)


def _widened(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
