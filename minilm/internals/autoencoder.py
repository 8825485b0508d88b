"""Sparse autoencoders: a point's activations as sums of few directions out of many, each hopefully with one meaning.

    f = a(W_e·(s·x - b_d) + b_e),    x̂ = (W_d·f + b_d) / s

W_d's directions have length 1. a is either ReLU, in training with a penalty λ·Σ f (L1: Bricken et al., 2023,
https://transformer-circuits.pub/2023/monosemantic-features), or ReLU of the k largest (top-k: Gao et al., 2024,
https://arxiv.org/abs/2406.04093). The constant s brings activations to a root mean square of 1 an entry, so that one λ
and one learning rate do for every point. `minilm.internals.autoencoder_training` trains them.

Dimensions: C width of the activations, F features.
"""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn

from minilm.encoder import SentenceEncoder
from minilm.evaluate.result import aligned
from minilm.evaluate.sts import STSResult, evaluate_sts
from minilm.internals.observed import Site, observe
from minilm.internals.patches import ablate, patch
from minilm.internals.points import VECTOR, Point
from minilm.internals.streaming import as_rows, row_point, stream
from minilm.texts import as_texts
from minilm.weights.files import WeightsError, read_safetensors, write_safetensors

FORMAT = "minilm sparse autoencoder 1"


class SparseAutoencoder(nn.Module):
    """Features of one point's activations, and their reconstruction.

    Args:
        point: the point's name.
        width: C.
        num_features: F.
        top_k: how many features of an activation may be above 0; None for as many as L1 leaves.
        seed: of the initial directions, which are random, and the encoder's as well (W_e = W_dᵀ at first).

    Attributes:
        encoder_weight: W_e, `[F, C]`.
        encoder_bias: b_e, `[F]`.
        decoder_weight: the directions, rows of length 1: W_dᵀ, `[F, C]`.
        pre_bias: b_d, `[C]`.
        scale: s.
        mean: the mean of the activations it was trained on, `[C]`: what mean ablation puts in their place.

    Raises:
        ValueError: a number out of range.
    """

    scale: Tensor
    mean: Tensor

    def __init__(self, point: str, width: int, num_features: int, top_k: int | None = None, seed: int = 0) -> None:
        super().__init__()
        if width < 1 or num_features < 1:
            raise ValueError(f"width and num_features must be at least 1, got {width} and {num_features}")
        if top_k is not None and not 1 <= top_k <= num_features:
            raise ValueError(f"top_k must be from 1 to num_features = {num_features}, got {top_k}")
        self.point, self.top_k = point, top_k
        directions = torch.randn(num_features, width, generator=torch.Generator().manual_seed(seed))
        self.decoder_weight = nn.Parameter(F.normalize(directions, dim=1))
        self.encoder_weight = nn.Parameter(self.decoder_weight.detach().clone())
        self.encoder_bias = nn.Parameter(torch.zeros(num_features))
        self.pre_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("mean", torch.zeros(width))

    @property
    def width(self) -> int:
        """C."""
        return self.pre_bias.shape[0]

    @property
    def num_features(self) -> int:
        """F."""
        return self.encoder_bias.shape[0]

    def pre_activations(self, x: Tensor) -> Tensor:
        """W_e·(s·x - b_d) + b_e: `[..., C]` -> `[..., F]`."""
        return F.linear(x.to(self.scale.dtype) * self.scale - self.pre_bias, self.encoder_weight, self.encoder_bias)

    def activate(self, pre_activations: Tensor) -> Tensor:
        """Return ReLU, of the k largest only if `top_k` is set: `[..., F]` -> `[..., F]`."""
        features = F.relu(pre_activations)
        if self.top_k is None:
            return features
        values, indices = features.topk(self.top_k, dim=-1)
        return torch.zeros_like(features).scatter(-1, indices, values)

    def features(self, x: Tensor) -> Tensor:
        """Return how strong each feature is in each activation, 0 or above: `[..., C]` -> `[..., F]`."""
        return self.activate(self.pre_activations(x))

    def decode(self, features: Tensor) -> Tensor:
        """Put activations together from features: `[..., F]` -> `[..., C]`."""
        return (features @ self.decoder_weight + self.pre_bias) / self.scale

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct activations in their shape, `[..., C]`, or `[L, H, D]` with H·D = C of heads side by side."""
        rows = x if x.shape[-1] == self.width else x.flatten(-2)
        return self.decode(self.features(rows)).reshape(x.shape)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it to a safetensors file, whole or not at all, and return the file.

        Raises:
            OSError: it can't be written.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}")
        settings = {"point": self.point, "top_k": self.top_k}
        try:
            write_safetensors(temporary, self.state_dict(), {"format": FORMAT, "settings": json.dumps(settings)})
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str | torch.device = "cpu") -> SparseAutoencoder:
        """Read what `save` wrote.

        Raises:
            WeightsError: the file is missing, damaged, or holds something else.
        """
        tensors, metadata = read_safetensors(Path(path))
        if metadata.get("format") != FORMAT:
            raise WeightsError(f"{path} holds no sparse autoencoder: expected the format {FORMAT!r} in its metadata")
        num_features, width = tensors["encoder_weight"].shape
        loaded = cls(**json.loads(metadata["settings"]), width=width, num_features=num_features)
        loaded.load_state_dict(tensors)
        return loaded.to(device)


@dataclass(frozen=True, eq=False, repr=False)
class ReconstructionQuality:
    """How well and how sparsely an autoencoder reconstructs.

    Attributes:
        explained_variance: 1 - Σ|x - x̂|² / Σ|x - mean|²: 1 for a perfect reconstruction, 0 for always the mean.
        l0: features above 0 of an activation, on average.
        density: of each feature, the share of activations in which it is above 0: float64 `[F]`.
        num_rows: activations looked at.
    """

    explained_variance: float
    l0: float
    density: Tensor
    num_rows: int

    @property
    def dead(self) -> list[int]:
        """The features that never were above 0."""
        return (self.density == 0).nonzero()[:, 0].tolist()

    def __repr__(self) -> str:
        """Say it in a line."""
        return (
            f"ReconstructionQuality(explained variance {self.explained_variance:.4f}, L0 {self.l0:.1f}, dead "
            f"{len(self.dead)} of {len(self.density)} features, over {self.num_rows:,} activations)"
        )


def reconstruction_quality(
    encoder: SentenceEncoder,
    autoencoder: SparseAutoencoder,
    texts: str | Iterable[str],
    *,
    on_truncate: str = "error",
    show_progress_bar: bool | None = None,
) -> ReconstructionQuality:
    """Measure an autoencoder on texts, best on others than it was trained on.

    Args:
        encoder: whose activations.
        autoencoder: on the encoder's device.
        texts: one text or several.
        on_truncate: what becomes of a text over the length limit: `error`, `warn` or `ignore` (both cut it).
        show_progress_bar: `None` shows it if the `minilm` logger is at level INFO or below.

    Raises:
        ValueError: no text, a text is too long, or the autoencoder does not fit the model.
    """
    point = autoencoder_point(encoder, autoencoder)
    fired, squares, errors = torch.zeros(autoencoder.num_features, dtype=torch.float64), 0.0, 0.0
    sums, num_rows = torch.zeros(autoencoder.width, dtype=torch.float64), 0

    @torch.no_grad()
    def add(value: Tensor, site: Site) -> None:
        nonlocal num_rows, squares, errors
        rows = as_rows(value, site)
        features = autoencoder.features(rows)
        fired.add_((features > 0).sum(dim=0).cpu())
        errors += (rows - autoencoder.decode(features)).square().sum().item()
        apart = rows - autoencoder.mean  # sums of squares about a mean lose nothing to rounding
        sums.add_(apart.sum(dim=0).cpu())
        squares += apart.square().sum().item()
        num_rows += len(rows)

    stream(encoder, texts, {point.name: [add]}, on_truncate=on_truncate, show_progress_bar=show_progress_bar)
    variance = squares - sums.square().sum().item() / num_rows
    explained = 1 - errors / variance if variance > 0 else math.nan
    return ReconstructionQuality(explained, fired.sum().item() / num_rows, fired / num_rows, num_rows)


@dataclass(frozen=True, eq=False, repr=False)
class ReconstructionEffect:
    """STS with a point as it is, with its reconstruction in its place, and without it.

    Attributes:
        original: as it is.
        reconstructed: with the reconstruction.
        zero: with zeros.
        mean: with the mean of the activations that the autoencoder was trained on.
    """

    original: STSResult
    reconstructed: STSResult
    zero: STSResult
    mean: STSResult

    @property
    def recovered(self) -> float:
        """The share of the average Spearman lost by mean ablation that the reconstruction keeps: 1 is all.

        (reconstructed - mean) / (original - mean). Where the mean leaves all texts alike, no correlation is defined,
        and counts as 0: it tells nothing of the pairs.
        """
        original, reconstructed, mean = map(_average, (self.original, self.reconstructed, self.mean))
        return (reconstructed - mean) / (original - mean) if original != mean else math.nan

    def table(self) -> str:
        """Lay the Spearman correlations x 100 out as text."""
        names = ("original", "reconstructed", "zero", "mean")
        rows = [[name, *(f"{value:.2f}" for value in getattr(self, name).figures.values())] for name in names]
        return f"{aligned([['', *self.original.figures], *rows])}\nrecovered: {self.recovered:.1%}"

    __repr__ = table


def reconstruction_effect(
    encoder: SentenceEncoder,
    autoencoder: SparseAutoencoder,
    data: str | os.PathLike[str] | None = None,
    *,
    tasks: Iterable[str] = ("stsb",),
    split: str = "test",
    show_progress_bar: bool | None = None,
) -> ReconstructionEffect:
    """Measure what becomes of STS when a point's activations are replaced by their reconstructions.

    Args:
        encoder: whose.
        autoencoder: on the encoder's device.
        data: the folder of the tasks, or None for the hub's, as `evaluate_sts` takes it.
        tasks: which of `minilm.evaluate.sts_data.TASKS`.
        split: `test`, or `dev`.
        show_progress_bar: `None` shows it if the `minilm` logger is at level INFO or below.

    Raises:
        EvaluationDataError: data is missing, malformed or out of reach.
        ValueError: the autoencoder does not fit the model; an unknown task or split.
    """
    point, tasks = autoencoder_point(encoder, autoencoder), tuple(tasks)

    def score() -> STSResult:
        return evaluate_sts(encoder, data, tasks=tasks, split=split, show_progress_bar=show_progress_bar)

    def mean(part: Tensor) -> Tensor:
        return autoencoder.mean.view(part.shape[1:] if point.rows != VECTOR else part.shape).expand_as(part)

    with observe(encoder, {}):  # so that the original, too, is computed by plain torch
        original = score()
    with patch(encoder, point.name, torch.no_grad()(autoencoder)):
        reconstructed = score()
    with ablate(encoder, point.name):
        zero = score()
    with patch(encoder, point.name, mean):
        return ReconstructionEffect(original, reconstructed, zero, score())


@dataclass(frozen=True)
class Example:
    """Where a feature is strong.

    Attributes:
        text: in which text.
        tokens: its tokens.
        position: at which of them; None at points with one row a text.
        activation: how strong.
    """

    text: str
    tokens: list[str]
    position: int | None
    activation: float

    def __repr__(self) -> str:
        """Show the text's tokens, the one in question in brackets."""
        marked = [f"[[{token}]]" if place == self.position else token for place, token in enumerate(self.tokens)]
        return f"{self.activation:8.3f}  {' '.join(marked)}"


@torch.no_grad()
def top_examples(
    encoder: SentenceEncoder,
    autoencoder: SparseAutoencoder,
    texts: str | Iterable[str],
    count: int = 10,
    *,
    on_truncate: str = "error",
    show_progress_bar: bool | None = None,
) -> list[list[Example]]:
    """Return, for each feature, the texts in which it is strongest, each with the token where it is.

    Args:
        encoder: whose activations.
        autoencoder: on the encoder's device.
        texts: to look in; each different one counts once.
        count: at most so many of a feature; only those where it is above 0.
        on_truncate: what becomes of a text over the length limit: `error`, `warn` or `ignore` (both cut it).
        show_progress_bar: `None` shows it if the `minilm` logger is at level INFO or below.

    Raises:
        ValueError: no text, a text is too long, a count under 1, or the autoencoder does not fit the model.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    point = autoencoder_point(encoder, autoencoder)
    distinct: list[str] = list(dict.fromkeys(as_texts(texts)[0]))  # type: ignore[arg-type]
    best = torch.zeros(0, autoencoder.num_features)  # [at most count, F]: strength, text and position of each feature
    where = torch.zeros(2, 0, autoencoder.num_features, dtype=torch.int64)
    ids: list[list[int]] = []

    @torch.no_grad()
    def add(value: Tensor, site: Site) -> None:
        nonlocal best, where
        features = autoencoder.features(as_rows(value, site)).cpu()
        parts = features.unsqueeze(1) if point.rows == VECTOR else features.split(site.batch.lengths)
        strongest, positions = zip(*(part.max(dim=0) for part in parts), strict=True)
        numbers = torch.arange(len(ids), len(ids) + len(strongest)).unsqueeze(1).expand(-1, autoencoder.num_features)
        places = torch.stack((numbers, torch.stack(positions)))
        ids.extend(part.tolist() for part in site.batch.ids.split(site.batch.lengths))
        candidates, where = torch.cat((best, torch.stack(strongest))), torch.cat((where, places), dim=1)
        best, rows = candidates.topk(min(count, len(candidates)), dim=0)
        where = where.gather(1, rows.expand(2, -1, -1))

    stream(encoder, distinct, {point.name: [add]}, on_truncate=on_truncate, show_progress_bar=show_progress_bar)

    def example(strength: float, text: int, position: int) -> Example:
        return Example(
            distinct[text], encoder.tokenizer.tokens(ids[text]), None if point.rows == VECTOR else position, strength
        )

    columns = zip(best.T.tolist(), *where.transpose(1, 2).tolist(), strict=True)
    return [[example(*found) for found in zip(*column, strict=True) if found[0] > 0] for column in columns]


def autoencoder_point(encoder: SentenceEncoder, autoencoder: SparseAutoencoder) -> Point:
    """Return the point that an autoencoder reads.

    Raises:
        UnknownPointError: this model has no such point.
        ValueError: its activations have another width there.
    """
    point = row_point(autoencoder.point, encoder.config)
    width = point_width(point, encoder)
    if width != autoencoder.width:
        raise ValueError(f"{point.name} is {width} wide in this model, and the autoencoder takes {autoencoder.width}")
    return point


def point_width(point: Point, encoder: SentenceEncoder) -> int:
    """Return how wide a point's rows are, heads side by side."""
    return encoder.config.feed_forward_size if point.shape.endswith("F") else encoder.config.hidden_size


def _average(result: STSResult) -> float:
    """Return the average Spearman, 0 where it is undefined."""
    return 0.0 if math.isnan(result.average) else result.average
