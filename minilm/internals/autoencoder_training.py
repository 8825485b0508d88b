"""Training sparse autoencoders (`minilm.internals.autoencoder`) on a point's activations.

L1 (Bricken et al., 2023): |x - x̂|² + λ·Σ f for rows of C entries with a mean square of 1; four times during training,
features that have not been above 0 since the last time start anew from activations that are reconstructed badly.
Top-k (Gao et al., 2024): |x - x̂|², plus 1/32 of how far the strongest of the dead features are from the error that the
living leave (AuxK), which brings them back. In both, directions keep length 1, and gradients along them are taken out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from minilm import threads
from minilm.encoder import SentenceEncoder
from minilm.internals.autoencoder import SparseAutoencoder, point_width
from minilm.internals.observed import Site
from minilm.internals.points import VECTOR, Point
from minilm.internals.streaming import as_rows, row_point, stream
from minilm.progress import progress_bar
from minilm.texts import as_texts

AUXILIARY_WEIGHT = 1 / 32
DEAD_AFTER_STEPS = 100  # steps without being above 0 that make a feature dead, for AuxK
RESAMPLINGS = 4


@dataclass(frozen=True)
class TrainingOptions:
    """How an autoencoder is trained.

    Attributes:
        l1: λ, for autoencoders without `top_k`; the larger, the sparser.
        epochs: passes over the activations.
        batch_size: activations a step.
        learning_rate: Adam's, falling to 0 over the last fifth of the steps.
        seed: of all that is random: directions, order, what dead features start anew from.

    Raises:
        ValueError: a number out of range.
    """

    l1: float = 3.0
    epochs: int = 1
    batch_size: int = 512
    learning_rate: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.l1 < 0 or min(self.epochs, self.batch_size) < 1 or not self.learning_rate > 0:
            raise ValueError(f"l1 must be 0 or above, all else above 0; got {self}")


@threads.fork_safe
@torch.inference_mode(False)
def train_autoencoder(
    encoder: SentenceEncoder,
    texts: str | Iterable[str],
    point: str,
    num_features: int | None = None,
    top_k: int | None = None,
    options: TrainingOptions | None = None,
    *,
    buffer_rows: int = 1 << 17,
    on_truncate: str = "error",
    show_progress_bar: bool | None = None,
) -> SparseAutoencoder:
    """Train a sparse autoencoder on a point's activations: one row a token, [CLS] and [SEP] included, or one a text.

    Texts are shuffled and taken in blocks whose activations fit the buffer; each block's rows are shuffled, too. The
    same arguments give the same autoencoder, on one machine with one number of threads.

    Args:
        encoder: whose activations; it is not changed.
        texts: to train on; equal ones count once.
        point: which point, heads side by side.
        num_features: F; 8 times the width by default.
        top_k: how many features an activation may have; None trains with L1.
        options: how; the defaults by default.
        buffer_rows: at most so many rows are in memory at once (200 MB of 384 numbers by default).
        on_truncate: what becomes of a text over the length limit: `error`, `warn` or `ignore` (both cut it).
        show_progress_bar: `None` shows it if the `minilm` logger is at level INFO or below.

    Raises:
        UnknownPointError: there is no such point, or the name means several.
        ValueError: no text, a text too long, all activations equal, an attention pattern, or a number out of range.
    """
    options = options or TrainingOptions()
    chosen = row_point(point, encoder.config)
    width = point_width(chosen, encoder)
    autoencoder = SparseAutoencoder(chosen.name, width, num_features or 8 * width, top_k, options.seed)
    distinct: list[str] = list(dict.fromkeys(as_texts(texts)[0]))  # type: ignore[arg-type]
    if not distinct:
        raise ValueError("expected at least one text, got none")
    blocks = _plan_blocks(encoder, distinct, chosen, buffer_rows, options.seed)
    num_steps = options.epochs * sum(-(-num_rows // options.batch_size) for _, num_rows in blocks)

    def rows() -> Iterator[Tensor]:
        if len(blocks) == 1:  # captured once
            yield from [_capture_rows(encoder, blocks[0][0], chosen, on_truncate)] * options.epochs
            return
        for _ in range(options.epochs):
            for block, _ in blocks:
                yield _capture_rows(encoder, block, chosen, on_truncate)

    return fit(autoencoder.to(encoder.device), rows(), num_steps, options, show_progress_bar=show_progress_bar)


@torch.inference_mode(False)
def fit(
    autoencoder: SparseAutoencoder,
    blocks: Iterable[Tensor],
    num_steps: int,
    options: TrainingOptions,
    *,
    show_progress_bar: bool | None = None,
) -> SparseAutoencoder:
    """Train an autoencoder on rows of activations, and return it.

    Args:
        autoencoder: changed in place; its scale, mean and pre-bias are set by the first block.
        blocks: rows `[n, C]`, all epochs' one after another, on the autoencoder's device.
        num_steps: how many batches these are, each block's rows divided by `options.batch_size` and rounded up.
        options: how; `epochs` is not looked at.
        show_progress_bar: `None` shows it if the `minilm` logger is at level INFO or below.

    Raises:
        ValueError: all rows of the first block are equal.
    """
    generator = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr=options.learning_rate)
    idle = torch.zeros(autoencoder.num_features, dtype=torch.int64, device=autoencoder.scale.device)
    resample_at = {
        num_steps * part // (RESAMPLINGS + 1): num_steps // (RESAMPLINGS + 1) for part in range(1, RESAMPLINGS + 1)
    }
    step = 0
    with torch.enable_grad(), progress_bar(show_progress_bar, num_steps, "train autoencoder", "step") as advance:
        for block in blocks:
            if step == 0:
                _standardise(autoencoder, block)
            for indices in torch.randperm(len(block), generator=generator).split(options.batch_size):
                if autoencoder.top_k is None and step in resample_at:
                    _resample(autoencoder, optimizer, idle >= resample_at[step], block, generator)
                for group in optimizer.param_groups:
                    group["lr"] = options.learning_rate * min(1.0, 5 * (1 - step / num_steps))
                fired = _step(
                    autoencoder, optimizer, block[indices.to(block.device)], idle >= DEAD_AFTER_STEPS, options
                )
                idle = torch.where(fired, 0, idle + 1)
                step += 1
                advance(1)
    return autoencoder


def _step(
    autoencoder: SparseAutoencoder, optimizer: torch.optim.Adam, rows: Tensor, dead: Tensor, options: TrainingOptions
) -> Tensor:
    """Take one step down the loss of a batch, and return which features were above 0, bool `[F]`."""
    pre_activations = autoencoder.pre_activations(rows)
    features = autoencoder.activate(pre_activations)
    error = (rows - autoencoder.decode(features)) * autoencoder.scale
    loss = error.square().sum(dim=1).mean()
    if autoencoder.top_k is None:
        loss = loss + options.l1 * features.sum(dim=1).mean()
    elif dead.any():
        loss = loss + AUXILIARY_WEIGHT * _auxiliary_loss(autoencoder, pre_activations, error.detach(), dead)
    optimizer.zero_grad()
    loss.backward()
    directions, gradient = autoencoder.decoder_weight, autoencoder.decoder_weight.grad
    with torch.no_grad():
        if gradient is not None:
            gradient -= (gradient * directions).sum(dim=1, keepdim=True) * directions
        optimizer.step()
        directions.copy_(F.normalize(directions, dim=1))
    return (features > 0).any(dim=0)


def _auxiliary_loss(autoencoder: SparseAutoencoder, pre_activations: Tensor, error: Tensor, dead: Tensor) -> Tensor:
    """AuxK: how far the C/2 strongest dead features of each row are from its error."""
    living_as_none = pre_activations.masked_fill(~dead, -torch.inf)
    values, indices = living_as_none.topk(min(int(dead.sum()), max(1, autoencoder.width // 2)), dim=1)
    features = torch.zeros_like(pre_activations).scatter(1, indices, F.relu(values))
    return (error - features @ autoencoder.decoder_weight).square().sum(dim=1).mean()


@torch.no_grad()
def _standardise(autoencoder: SparseAutoencoder, rows: Tensor) -> None:
    """Set mean, pre-bias and scale, so that an entry's root mean square about the mean is 1."""
    autoencoder.mean.copy_(rows.mean(dim=0))
    spread = (rows - autoencoder.mean).square().mean().sqrt()
    if (rows == rows[0]).all():
        raise ValueError(f"all activations of {autoencoder.point} are equal in these texts; there is nothing to learn")
    autoencoder.scale.copy_(1 / spread)
    autoencoder.pre_bias.copy_(autoencoder.mean * autoencoder.scale)


@torch.no_grad()
def _resample(
    autoencoder: SparseAutoencoder, optimizer: torch.optim.Adam, dead: Tensor, rows: Tensor, generator: torch.Generator
) -> None:
    """Start dead features anew at activations drawn in proportion to their squared loss (Bricken et al., 2023).

    A direction becomes the activation's, the encoder's a fifth as long as the living features' on average.
    """
    num_dead = int(dead.sum())
    if num_dead in (0, autoencoder.num_features):
        return
    rows = rows[torch.randperm(len(rows), generator=generator)[:8192].to(rows.device)]
    losses = (rows - autoencoder(rows)).square().sum(dim=1)
    drawn = torch.multinomial(losses.square().cpu(), num_dead, replacement=True, generator=generator).to(rows.device)
    directions = F.normalize(rows[drawn] * autoencoder.scale - autoencoder.pre_bias, dim=1)
    length = 0.2 * autoencoder.encoder_weight[~dead].norm(dim=1).mean()
    autoencoder.decoder_weight[dead] = directions
    autoencoder.encoder_weight[dead] = directions * length
    autoencoder.encoder_bias[dead] = 0
    for parameter in (autoencoder.decoder_weight, autoencoder.encoder_weight, autoencoder.encoder_bias):
        for moment in ("exp_avg", "exp_avg_sq"):
            optimizer.state[parameter][moment][dead] = 0


def _plan_blocks(
    encoder: SentenceEncoder, texts: Sequence[str], point: Point, buffer_rows: int, seed: int
) -> list[tuple[list[str], int]]:
    """Shuffle texts and divide them into blocks of at most so many rows (but at least one text), with their numbers."""
    counts = [1] * len(texts)
    if point.rows != VECTOR:
        counts = [min(count, encoder.max_seq_length) for count in encoder.token_counts(texts)]
    blocks: list[list[int]] = []
    room = 0
    for index in torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist():
        if not blocks or counts[index] > room:
            blocks.append([])
            room = buffer_rows
        blocks[-1].append(index)
        room -= counts[index]
    return [([texts[index] for index in block], sum(counts[index] for index in block)) for block in blocks]


def _capture_rows(encoder: SentenceEncoder, texts: Sequence[str], point: Point, on_truncate: str) -> Tensor:
    """Return a point's rows of some texts, float32 `[n, C]`."""
    kept: list[Tensor] = []

    def keep(value: Tensor, site: Site) -> None:
        kept.append(as_rows(value, site))

    stream(encoder, texts, {point.name: [keep]}, on_truncate=on_truncate, show_progress_bar=False)
    return torch.cat(kept)
