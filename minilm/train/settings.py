"""What a run does beyond model, data and objective: `TrainingSettings`, a recipe's `[training]` table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from minilm.train.optimization import SCHEDULES

PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class TrainingSettings:
    """How to train.

    Attributes:
        output: the run's folder.
        epochs: passes over the data, in parts too.
        max_steps: steps to take instead; 0 to go by epochs.
        accumulation: batches a step, their gradients averaged.
        piece_tokens: encode a batch in pieces of at most so many tokens, with cached gradients: the memory is that of a
            piece, the result that of the whole; 0 for all at once.
        learning_rate: its peak.
        objective_learning_rate: the same for parameters of the objective; 0 for the encoder's.
        schedule: `linear`, `cosine` or `constant`, after the warm-up.
        warmup: steps in which the learning rate rises, if 1 or more; below that, as a part of all steps.
        weight_decay: AdamW's, on matrices and tables.
        decay_all: decay biases and LayerNorms too.
        max_gradient_norm: gradients are scaled down to it; 0 to leave them.
        freeze: parameters to leave as they are, by the beginnings of their names, such as `embeddings.word`.
        precision: `float32`, or what autocast computes in: `bfloat16`, `float16` (on a GPU).
        backend: who computes the operations in training; `auto` for plain torch on neighbours of equal length, and
            on a GPU the Triton kernels unless attention has dropout.
        ema: decay of a moving average of the weights, which is what is evaluated and kept; 0 for none.
        evaluate_every: steps between dev scores; 0 for none.
        keep_best: keep the weights with the best dev score, not the last.
        log_every: steps between lines of the log.
        checkpoint_every: steps between checkpoints; 0 for none.
        tensorboard: write TensorBoard's files too.
        plot: draw the log at the end, where matplotlib is there.
        seed: of dropout and whatever else is random.

    Raises:
        ValueError: a value out of range.
    """

    output: str
    epochs: float = 1.0
    max_steps: int = 0
    accumulation: int = 1
    piece_tokens: int = 0
    learning_rate: float = 2e-5
    objective_learning_rate: float = 0.0
    schedule: str = "linear"
    warmup: float = 0.1
    weight_decay: float = 0.01
    decay_all: bool = False
    max_gradient_norm: float = 1.0
    freeze: tuple[str, ...] = ()
    precision: str = "float32"
    backend: str = "auto"
    ema: float = 0.0
    evaluate_every: int = 0
    keep_best: bool = True
    log_every: int = 10
    checkpoint_every: int = 500
    tensorboard: bool = False
    plot: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field."""
        object.__setattr__(self, "freeze", tuple(self.freeze))
        for name, allowed in (("schedule", SCHEDULES), ("precision", PRECISIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        for name in ("epochs", "learning_rate", "accumulation"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")
        at_least_0 = ("max_steps", "piece_tokens", "objective_learning_rate", "warmup", "weight_decay", "seed")
        for name in (*at_least_0, "max_gradient_norm", "ema", "evaluate_every", "log_every", "checkpoint_every"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
        if self.ema >= 1:
            raise ValueError(f"ema must be below 1, got {self.ema!r}")

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.output).expanduser()

    def warmup_steps(self, total_steps: int) -> int:
        """Count the steps of the warm-up."""
        return int(self.warmup if self.warmup >= 1 else self.warmup * total_steps)
