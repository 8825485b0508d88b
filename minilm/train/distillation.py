"""Objectives that learn from a teacher's vectors, computed ahead of time.

A student of width C meets a teacher of width D through a linear map W without bias. W starts with orthonormal columns
(rows, where it narrows), so that it at first leaves the student's cosines as they are: of all such maps the one that
brings a sample of the student's vectors nearest to the teacher's (`align`), as from any other the student would first
have to turn, and lose what it knows. W is dropped after training, except where it gives the model's output (HPD).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn

from minilm.train import losses
from minilm.train.losses import check_positive
from minilm.train.objectives import Objective, Targets, Texts


class MSE(Objective):
    """W·(the student's vector) is to be the teacher's vector (`losses.mse`).

    The student's is the vector that the model gives. Of a model that normalises, both are of length 1 then, where a
    longer one would spend its first hundreds of steps on getting shorter, and lose what it knows.
    """

    columns = ("text",)
    targets = ("teacher",)

    def __init__(self, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.projection = projection(student_width, teacher_width)

    def prepare(self, texts: Texts, targets: Targets) -> None:
        """Bring the student's vectors near the teacher's."""
        align(self.projection, texts["text"]["embedding"], targets["teacher"])

    def loss(self, texts: Texts, targets: Targets) -> Tensor:
        """Apply the loss to the projected student and the teacher."""
        return losses.mse(self.projection(texts["text"]["embedding"]), targets["teacher"])


class HPD(Objective):
    """Homomorphic projective distillation: W·(the student's vector) is to be the teacher's, reduced by PCA.

    The student's is the vector that the model gives, as in `MSE`. The model's output is the reduced vector:
    `output_layer` is W `[output_width, C]`, and becomes the model's (in a sentence-transformers folder, a Dense module
    without bias and activation). As in the published code, the components are applied to the teacher's vectors without
    subtracting their mean; unlike there, no tanh follows W.

    Source: Zhao et al. 2022 (arXiv 2203.07687).

    Args:
        student_width: C.
        teacher_width: D.
        output_width: principal components kept.
    """

    columns = ("text",)
    targets = ("teacher",)
    components: Tensor
    output_layer: nn.Linear

    def __init__(self, student_width: int, teacher_width: int, output_width: int = 128) -> None:
        super().__init__()
        self.output_layer = projection(student_width, output_width)
        self.register_buffer("components", torch.full((output_width, teacher_width), torch.nan))

    def prepare(self, texts: Texts, targets: Targets) -> None:
        """Fit the PCA to a sample of teacher vectors `[m, D]`, and bring the student's near what it makes of them.

        Raises:
            ValueError: not of width D, or fewer of them than components.
        """
        count, width = self.components.shape
        sample = targets["teacher"]
        if sample.dim() != 2 or sample.shape[1] != width or len(sample) < count:
            raise ValueError(
                f"expected at least {count} teacher vectors of width {width}, got shape {list(sample.shape)}"
            )
        self.components.copy_(principal_components(sample, count))
        align(self.output_layer, texts["text"]["embedding"], sample @ self.components.T.to(sample))

    def loss(self, texts: Texts, targets: Targets) -> Tensor:
        """Apply the loss to the projected student and the reduced teacher."""
        if self.components.isnan().any():
            raise ValueError("expected a fitted PCA: call prepare with teacher vectors, or load a state")
        reduced = targets["teacher"] @ self.components.T
        return losses.mse(self.output_layer(texts["text"]["embedding"]), reduced)


class SimilarityDistillation(Objective):
    """The cosines between the texts of a batch are to be the teacher's: squared error, and divergence of neighbours.

    loss = a·`losses.similarity_squared_error` + b·`losses.similarity_kl`; no projection, so that the student's own
    vectors are what is trained, whatever the teacher's width.

    Args:
        temperature: τ of the divergence.
        squared_weight: a.
        kl_weight: b.
        stretch: spreads out the teacher's cosines: c becomes 1 - stretch·(1 - c).
    """

    columns = ("text",)
    targets = ("teacher",)

    def __init__(
        self, temperature: float = 0.05, squared_weight: float = 1.0, kl_weight: float = 1.0, stretch: float = 1.0
    ) -> None:
        super().__init__()
        self.temperature = check_positive("temperature", temperature)
        self.stretch = check_positive("stretch", stretch)
        self.squared_weight, self.kl_weight = squared_weight, kl_weight

    def loss(self, texts: Texts, targets: Targets) -> Tensor:
        """Apply both losses to the student's and the teacher's vectors."""
        student, teacher = texts["text"]["embedding"], targets["teacher"]
        squared_error = losses.similarity_squared_error(student, teacher, self.stretch)
        divergence = losses.similarity_kl(student, teacher, self.temperature, self.stretch)
        return self.squared_weight * squared_error + self.kl_weight * divergence


class CRD(Objective):
    """Contrastive representation distillation: tell the student's and teacher's vectors of one text from noise.

    Both are projected to a common width, and compared in both directions (`losses.crd`). Noise are the other texts of
    the batch and a memory bank of the batches before. The constant c of each direction is estimated on the first batch
    and kept.

    Source: Tian, Krishnan and Isola 2020. Their published code remembers a running mean of each text's two vectors, and
    compares with those even for the text itself; that takes epochs to fill. Here the last batches are remembered, and a
    text's own vectors are those of now.

    Args:
        student_width: C.
        teacher_width: D.
        projection_width: width that both are projected to.
        bank_size: texts remembered.
        temperature: τ > 0.
    """

    columns = ("text",)
    states = ("unnormalized",)
    targets = ("teacher",)
    log_constants: Tensor

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        projection_width: int = 128,
        bank_size: int = 4096,
        temperature: float = 0.07,
    ) -> None:
        super().__init__()
        self.temperature = check_positive("temperature", temperature)
        self.student_projection = projection(student_width, projection_width)
        self.teacher_projection = projection(teacher_width, projection_width)
        self.bank = MemoryBank(bank_size, 2 * projection_width)
        self.register_buffer("log_constants", torch.full((2,), torch.nan))

    @torch.no_grad()
    def prepare(self, texts: Texts, targets: Targets) -> None:
        """Bring the student's vectors near the teacher's, both projected."""
        align(self.student_projection, texts["text"]["unnormalized"], self.teacher_projection(targets["teacher"]))

    def loss(self, texts: Texts, targets: Targets) -> Tensor:
        """Apply the loss in both directions, then remember the batch."""
        student = self.student_projection(texts["text"]["unnormalized"])
        teacher = self.teacher_projection(targets["teacher"])
        student_bank, teacher_bank = self.bank().to(student).chunk(2, dim=1)
        directions = [
            (student, torch.cat([teacher, teacher_bank])),
            (teacher, torch.cat([student, student_bank])),
        ]
        constants = self.log_constants
        if constants.isnan().any():
            constants = torch.stack([losses.crd_log_constant(*pair, self.temperature) for pair in directions])
        if self.training:
            self.log_constants.copy_(constants)
            self.bank.remember(torch.cat([student, teacher], dim=1))
        parts = [losses.crd(*pair, c, self.temperature) for pair, c in zip(directions, constants, strict=True)]
        return torch.stack(parts).sum()


class IBKD(Objective):
    """Information bottleneck distillation, first stage, on texts without labels.

        loss = InfoNCE(W·z, t) + λ·HSIC(x, z)

    z the student's vectors, t the teacher's (followed by a memory bank of other texts' as further negatives), x the
    pooled early layer. The first term keeps what the teacher knows, the second forgets what only the words say.
    Source: Zhang et al. 2023 (arXiv 2311.05472); the defaults are its published settings. Their gamma suits vectors at
    distances near 1: all-MiniLM-L6-v2's lie at squared distances of 4 to 50, where HSIC is constant under it, and gives
    the student 10⁵ times the gradient at gamma 0.02.

    Args:
        student_width: C.
        teacher_width: D.
        temperature: τ of InfoNCE.
        hsic_weight: λ.
        gamma: that of HSIC's kernels; see `losses.hsic` on choosing it.
        bank_size: teacher vectors remembered; 0 for none.
        early_state: the pooled state x.
    """

    columns = ("text",)
    targets = ("teacher",)

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        temperature: float = 1.0,
        hsic_weight: float = 0.2,
        gamma: float = 1.0,
        bank_size: int = 0,
        early_state: str = "layer.0",
    ) -> None:
        super().__init__()
        self.states = (early_state, "unnormalized")
        self.temperature, self.gamma = check_positive("temperature", temperature), check_positive("gamma", gamma)
        self.hsic_weight = hsic_weight
        self.projection = projection(student_width, teacher_width)
        self.bank = MemoryBank(bank_size, teacher_width)

    def prepare(self, texts: Texts, targets: Targets) -> None:
        """Bring the student's vectors near the teacher's."""
        align(self.projection, texts["text"]["unnormalized"], targets["teacher"])

    def loss(self, texts: Texts, targets: Targets) -> Tensor:
        """Apply both terms, then remember the teacher's vectors."""
        early, student = (texts["text"][state] for state in self.states)
        teacher = targets["teacher"]
        others = self.bank.without(teacher)
        contrastive = losses.info_nce(self.projection(student), teacher, others, self.temperature)
        if self.training:
            self.bank.remember(teacher)
        return contrastive + self.hsic_weight * losses.hsic(early, student, self.gamma)


class IBKDFineTuning(Objective):
    """Information bottleneck distillation, second stage, on NLI triplets (premise, entailed, contradiction).

        loss = SimCSE(W·z) + λ·HSIC(x, z)

    z the student's vectors, W a map to a narrower space, dropped after training, x the pooled layer before the last;
    HSIC is over all texts of the batch.
    Source: Zhang et al. 2023 (arXiv 2311.05472); the defaults are its published settings.

    Args:
        student_width: C.
        projection_width: width in which texts are compared.
        temperature: τ of SimCSE.
        hsic_weight: λ.
        gamma: that of HSIC's kernels; see `losses.hsic` on choosing it.
        early_state: the pooled state x.
    """

    columns = ("query", "positive", "negatives")

    def __init__(
        self,
        student_width: int,
        projection_width: int = 128,
        temperature: float = 0.05,
        hsic_weight: float = 1.0,
        gamma: float = 0.1,
        early_state: str = "layer.5",
    ) -> None:
        super().__init__()
        self.states = (early_state, "unnormalized")
        self.temperature, self.gamma = check_positive("temperature", temperature), check_positive("gamma", gamma)
        self.hsic_weight = hsic_weight
        self.projection = projection(student_width, projection_width)

    def loss(self, texts: Texts, targets: Targets) -> Tensor:  # noqa: ARG002 - as the base class has it
        """Apply both terms."""
        early, student = (
            torch.cat([texts[column][state].flatten(0, -2) for column in self.columns]) for state in self.states
        )
        anchors, entailed, contradictions = (self.projection(texts[column]["unnormalized"]) for column in self.columns)
        contrastive = losses.simcse_supervised(anchors, entailed, contradictions, self.temperature)
        return contrastive + self.hsic_weight * losses.hsic(early, student, self.gamma)


class MemoryBank(nn.Module):
    """The last rows seen, for further negatives; part of the state, so that a resumed run goes on as it was.

    It starts empty. As training data is shuffled, its rows are a random draw of the texts of other batches.

    Args:
        size: rows kept; 0 for a bank that stays empty.
        width: numbers a row.

    Raises:
        ValueError: a negative size.
    """

    rows: Tensor
    seen: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        if size < 0:
            raise ValueError(f"bank_size must be at least 0, got {size}")
        self.register_buffer("rows", torch.zeros(size, width))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self) -> Tensor:
        """Return what is remembered, in no particular order: `[m, width]`."""
        return self.rows[: int(self.seen)]

    @torch.no_grad()
    def without(self, vectors: Tensor) -> Tensor:
        """Return what is remembered, but for rows that point where one of `vectors [n, width]` does: the same texts."""
        rows: Tensor = self().to(vectors)
        cosines = F.normalize(rows) @ F.normalize(vectors).T
        return rows[(cosines < 1 - 1e-5).all(dim=1)]

    @torch.no_grad()
    def remember(self, vectors: Tensor) -> None:
        """Take up `vectors [n, width]` in place of the oldest rows."""
        size = len(self.rows)
        if size:
            vectors = vectors[-size:]
            places = (self.seen + torch.arange(len(vectors), device=vectors.device)) % size
            self.rows[places] = vectors.to(self.rows)
            self.seen += len(vectors)


def projection(inputs: int, outputs: int) -> nn.Linear:
    """Make a linear map without bias that starts with orthonormal columns, or rows where it narrows."""
    linear = nn.Linear(inputs, outputs, bias=False)
    nn.init.orthogonal_(linear.weight)
    return linear


@torch.no_grad()
def align(linear: nn.Linear, student: Tensor, teacher: Tensor) -> None:
    """Make a map that with orthonormal columns, or rows where it narrows, which brings vectors nearest to others.

    W = U·Vᵀ, where teacherᵀ·student = U·S·Vᵀ: of all such maps it makes Σ t_i·(W·s_i) the largest, and so,
    unless it narrows, Σ‖W·s_i - t_i‖² the smallest.
    Source: Schönemann 1966 (the orthogonal Procrustes problem).

    Args:
        linear: W `[D, C]`, overwritten.
        student: s, `[m, C]`.
        teacher: t, `[m, D]`.
    """
    u, _, v = torch.linalg.svd(teacher.double().T @ student.double(), full_matrices=False)
    linear.weight.copy_(u @ v)


def principal_components(vectors: Tensor, count: int) -> Tensor:
    """Return the directions in which vectors `[m, D]` vary most, from the most on: orthonormal rows `[count, D]`.

    Each is given the sign that makes its largest entry positive.
    """
    centred = vectors.double() - vectors.double().mean(dim=0)
    _, directions = torch.linalg.eigh(centred.T @ centred)  # ascending
    components: Tensor = directions.T.flip(0)[:count]
    largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
    return components * largest.sign()
