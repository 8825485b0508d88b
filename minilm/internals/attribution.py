"""Pair attribution: how much each token of one text and each token of another contribute to their similarity.

On the straight line from a reference r (a text of the same length that says nothing) to a text a, at a point of the
model, x(t) = r + t·(a - r), the embedding e moves from e(r) to e(a). By the chain rule each token has a share in that:

    v_i = ∫ ∂e/∂x_i(x(t)) · (a_i - r_i) dt        Σ_i v_i = e(a) - e(r)

the integrated Jacobian, applied to the token's own displacement. The similarity of two texts is an inner product, so

    A_ij = v_i · w_j        Σ_ij A_ij = e(a)·e(b) - e(r_a)·e(b) - e(a)·e(r_b) + e(r_a)·e(r_b)

holds for the embeddings that the model really returns (for a cosine: scaled to length 1 everywhere on the line): the
sum is not the score, but the score less what the references alone have of it. Nothing of the score is missing: with
e(r_a) and e(r_b) as one more row and column, the whole matrix sums to it (`with_references`).

The Jacobian itself is never formed: v_i is a directional derivative, and L of them at each node take memory O(L·C).

For one text against another's vector, `attribute_text` has the usual gradients of the score f by the tokens' vectors x:

    gradient      ∂f/∂x        gradient_x_input      x ⊙ ∂f/∂x
    integrated_gradients      (a - r) ⊙ ∫ ∂f/∂x(x(t)) dt        Σ = f(a) - f(r)

Dimensions: L tokens, C hidden. Sources: Möller, Nikolaev and Padó 2023 (An Attribution Method for Siamese
Encoders: integrated Jacobians) and 2024 (Approximate Attributions for Off-the-Shelf Siamese Transformers: cosine,
references that are not neutral); Sundararajan, Taly and Yan 2017 (integrated gradients).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from minilm import threads
from minilm.encoder import SentenceEncoder
from minilm.internals.captures import capture
from minilm.internals.line import Line
from minilm.progress import progress_bar

METHODS = ("gradient", "gradient_x_input", "integrated_gradients")


@dataclass(frozen=True, eq=False)
class IntegratedJacobian:
    """How each token of a text moves the embedding away from the reference's.

    Attributes:
        tokens: the text's L word pieces.
        reference_tokens: the reference's.
        point: where the line from one to the other was drawn.
        contributions: v, what each token adds, float64 `[L, C]`.
        embedding: e(a), float64 `[C]`.
        reference: e(r), float64 `[C]`.
        steps: nodes of the quadrature.
    """

    tokens: list[str]
    reference_tokens: list[str]
    point: str
    contributions: Tensor
    embedding: Tensor
    reference: Tensor
    steps: int

    @cached_property
    def residual(self) -> float:
        """The length of Σ v - (e(a) - e(r)), which is 0 but for quadrature and rounding."""
        return float((self.contributions.sum(dim=0) - (self.embedding - self.reference)).norm())

    def __repr__(self) -> str:
        """Say where, and how exact."""
        return (
            f"IntegratedJacobian({len(self.tokens)} tokens from {self.point}, {self.steps} steps, "
            f"residual {self.residual:.1e})"
        )


@dataclass(frozen=True, eq=False)
class SimilarityAttribution:
    """A similarity by pairs of tokens.

    Attributes:
        first: the first text's integrated Jacobian.
        second: the second's.
        metric: `cosine` or `dot`.
    """

    first: IntegratedJacobian
    second: IntegratedJacobian
    metric: str

    @cached_property
    def by_token(self) -> Tensor:
        """A, what each token of the first text and each of the second contribute together: float64 `[L1, L2]`."""
        return self.first.contributions @ self.second.contributions.T

    @cached_property
    def with_references(self) -> Tensor:
        """A with a last row and column for the references: `[L1 + 1, L2 + 1]`, which sums to the score."""
        first = torch.cat([self.first.contributions, self.first.reference.unsqueeze(0)])
        second = torch.cat([self.second.contributions, self.second.reference.unsqueeze(0)])
        return first @ second.T

    @cached_property
    def score_by_token(self) -> Tensor:
        """A with the references' part spread evenly over the tokens: `[L1, L2]`, which sums to the score.

        Evenly is a convention: in a reference of one repeated token, none has more of e(r) than another.
        """
        first, second = self.first, self.second
        spread_first = first.contributions + first.reference / len(first.tokens)
        return spread_first @ (second.contributions + second.reference / len(second.tokens)).T

    @cached_property
    def score(self) -> float:
        """The similarity of the two texts: e(a)·e(b)."""
        return float(self.first.embedding @ self.second.embedding)

    @cached_property
    def reference_scores(self) -> tuple[float, float, float]:
        """e(r_a)·e(b), e(a)·e(r_b) and e(r_a)·e(r_b): what the references alone have of it."""
        a, b = self.first, self.second
        return float(a.reference @ b.embedding), float(a.embedding @ b.reference), float(a.reference @ b.reference)

    @cached_property
    def attributable(self) -> float:
        """What A sums to: e(a)·e(b) - e(r_a)·e(b) - e(a)·e(r_b) + e(r_a)·e(r_b)."""
        first, second, both = self.reference_scores
        return self.score - first - second + both

    @cached_property
    def residual(self) -> float:
        """The sum of A less that: quadrature and rounding."""
        return float(self.by_token.sum()) - self.attributable

    def __repr__(self) -> str:
        """Say the score, what of it is attributed, and how exactly."""
        return (
            f"SimilarityAttribution({self.metric} {self.score:.4f}, of which {self.attributable:.4f} by pairs of "
            f"tokens, from {self.first.point}, residual {self.residual:.1e})"
        )


@dataclass(frozen=True, eq=False)
class TextAttribution:
    """A text's score against a vector, by its tokens.

    Attributes:
        method: how, one of `METHODS`.
        tokens: the text's L word pieces.
        point: where its tokens' vectors were taken.
        values: the method's value for each dimension of each token, float64 `[L, C]`.
        score: f(a), the text's score.
        reference_score: f(r), the reference's.
        steps: nodes of the quadrature; 0 where there is none.
    """

    method: str
    tokens: list[str]
    point: str
    values: Tensor
    score: float
    reference_score: float
    steps: int

    @cached_property
    def by_token(self) -> Tensor:
        """Each token's sum over dimensions, `[L]`; of plain gradients, which are no shares of anything, the length."""
        return self.values.norm(dim=1) if self.method == "gradient" else self.values.sum(dim=1)

    @cached_property
    def residual(self) -> float:
        """The sum of all values less f(a) - f(r): quadrature and rounding for integrated gradients.

        Raises:
            ValueError: another method, whose values sum to nothing in particular.
        """
        if self.method != "integrated_gradients":
            raise ValueError(f"only integrated gradients sum to a difference of scores, not {self.method}")
        return float(self.values.sum()) - (self.score - self.reference_score)

    def __repr__(self) -> str:
        """Say the score, and how it was attributed."""
        return f"TextAttribution({self.method} from {self.point}, {len(self.tokens)} tokens, score {self.score:.4f})"


@threads.fork_safe
def integrated_jacobian(
    encoder: SentenceEncoder,
    text: str,
    point: str = "embeddings",
    *,
    reference: str = "[PAD]",
    metric: str = "cosine",
    tolerance: float | None = None,
    steps: int | None = None,
    show_progress_bar: bool | None = None,
) -> IntegratedJacobian:
    """Say how each token moves the embedding away from a reference's; the arguments are `attribute_similarity`'s.

    Warns:
        ConvergenceWarning: the tolerance was not reached.
    """
    line = Line(encoder, text, point, reference, metric)
    steps = steps or line.steps(tolerance)
    with progress_bar(show_progress_bar, steps, "attribute", "node") as advance:
        contributions = line.integral(steps, torch.eye(len(line.tokens)), advance)
    start, end = line.ends()
    return IntegratedJacobian(line.tokens, line.reference_tokens, line.point, contributions, end, start, steps)


def attribute_similarity(
    encoder: SentenceEncoder,
    first: str,
    second: str,
    point: str = "embeddings",
    *,
    reference: str = "[PAD]",
    metric: str = "cosine",
    tolerance: float | None = None,
    steps: int | None = None,
    show_progress_bar: bool | None = None,
) -> SimilarityAttribution:
    """Attribute the similarity of two texts to pairs of their tokens, as they are at a point.

    The work grows with the square of a text's tokens; memory does not. `max` pooling bends the line's image wherever
    another token takes over: its integrals converge slowly, which a warning and the residual show.

    Args:
        encoder: whose, in float32 or float64; patches in force are seen.
        first: a text.
        second: a text.
        point: `embeddings` for the input, or `layers.K.output` for the tokens as they have become by then.
        reference: what both texts are compared with: one token, such as `[PAD]`, `[MASK]` or a word, in the place of
            each token between [CLS] and [SEP]; or a text of as many tokens.
        metric: `cosine`, or `dot` for the inner product of the embeddings as the model returns them.
        tolerance: how exactly the embedding's whole movement is to be integrated, as a distance; by default, as exactly
            as rounding allows.
        steps: so many nodes instead, an even number.
        show_progress_bar: by default, if the `minilm` logger is at level INFO or below.

    Raises:
        ValueError: another point, metric or dtype; a text too long; a reference text of another length.

    Warns:
        ConvergenceWarning: the tolerance was not reached.
    """
    one, other = (
        integrated_jacobian(
            encoder,
            text,
            point,
            reference=reference,
            metric=metric,
            tolerance=tolerance,
            steps=steps,
            show_progress_bar=show_progress_bar,
        )
        for text in (first, second)
    )
    return SimilarityAttribution(one, other, metric)


@threads.fork_safe
def attribute_text(
    encoder: SentenceEncoder,
    text: str,
    target: str | Tensor,
    method: str = "integrated_gradients",
    point: str = "embeddings",
    *,
    reference: str = "[PAD]",
    metric: str = "cosine",
    tolerance: float | None = None,
    steps: int | None = None,
) -> TextAttribution:
    """Attribute a text's score against a fixed vector to its tokens, as they are at a point.

    Where pooling reads an earlier hidden state as well, integrated gradients take the sum over both; the other methods
    see the tokens at the point only.

    Args:
        encoder: whose, in float32 or float64; patches in force are seen.
        text: the text.
        target: what it is compared with, a text or a vector `[C]`.
        method: `gradient`, `gradient_x_input` or `integrated_gradients`.
        point: as in `attribute_similarity`, which explains the other arguments, too.
        reference: where integrated gradients start.
        metric: `cosine` or `dot`.
        tolerance: how exactly to integrate.
        steps: so many nodes instead, an even number.

    Raises:
        ValueError: an unknown method, a target of another shape; else as `attribute_similarity`.

    Warns:
        ConvergenceWarning: the tolerance was not reached.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    vector = capture(encoder, target, "embedding").embeddings[0] if isinstance(target, str) else target
    if vector.shape != (encoder.config.hidden_size,):
        raise ValueError(
            f"the target must be a text or a vector [{encoder.config.hidden_size}], got {list(vector.shape)}"
        )
    line = Line(encoder, text, point, reference, metric)
    vector = vector.detach().cpu().double()
    if metric == "cosine":
        vector = F.normalize(vector, dim=0)
    if method == "integrated_gradients":
        steps = steps or line.steps(tolerance)
        values = line.integrated_gradients(steps, vector)
    else:
        steps, values = 0, line.gradients(torch.ones(1), vector)[-1][0].cpu().double()
        if method == "gradient_x_input":
            values = values * line.end[-1].cpu().double()
    start_score, score = (float(embedding @ vector) for embedding in line.ends())
    return TextAttribution(method, line.tokens, line.point, values, score, start_score, steps)
