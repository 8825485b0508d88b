"""The training loop: batches in, a better encoder out, with every step on record and nothing lost if it is killed.

    for each step:  gradients of the objective over one batch or several  ->  clip  ->  AdamW  ->  moving average

A run lives in one folder: `log.csv`, `log.png`, `checkpoint.pt` (what it resumes from), `best/` (while it runs) and
`model/` (what it gives).
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from minilm.encoder import SentenceEncoder
from minilm.train import distributed
from minilm.train.checkpoints import load_checkpoint, save_checkpoint
from minilm.train.gradients import Batch, Gradients
from minilm.train.log import RunLog, plot_log, training_bar
from minilm.train.objectives import Objective
from minilm.train.optimization import MovingAverage, adamw, schedule_factor, set_learning_rate
from minilm.train.settings import TrainingSettings
from minilm.weights.sources import read_model

logger = logging.getLogger(__name__)

PREPARED_ROWS = 4_096
"""Rows that an objective sees before the first step, if there are so many, and at most a batch more."""


class Batches(Protocol):
    """The training data in its order, such as `minilm.train.batches.Batches`."""

    def __len__(self) -> int:
        """Count the batches of an epoch."""

    def __iter__(self) -> Iterator[Batch]:
        """Give what is left of an epoch; the next call gives the next."""

    def state_dict(self) -> dict[str, Any]:
        """Say where it stands, in tensors and plain values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where it stood."""


@dataclass(frozen=True)
class TrainingResult:
    """What a run ended with.

    Attributes:
        model: the folder of the trained model, as `minilm.load` reads it.
        steps: steps done.
        first_score: the dev score before the first step; nan without evaluation.
        score: the dev score of the model; nan without evaluation.
        best_step: the step that the model is from.
    """

    model: Path
    steps: int
    first_score: float
    score: float
    best_step: int


class Trainer:
    """Trains an encoder in place, and writes it to the run's folder.

    Args:
        encoder: the start, in float32; its own pooling, normalisation and length limit hold.
        objective: what to minimise.
        data: the batches; under `torchrun`, this process's share of each.
        settings: everything else.
        evaluate: a dev score, the higher the better, of anything with `encode`; such as STS-B dev's.
        schedule: what the learning rate is multiplied by in a step, in place of what the settings say.

    Attributes:
        encoder: after `run`, the trained one, with the objective's output layer if that has one.
        last_loss, last_gradient_norm: of the last step, the norm before it was clipped.

    Raises:
        ValueError: the encoder is not in float32 or has an output layer, or a setting or state does not fit it.
    """

    def __init__(
        self,
        encoder: SentenceEncoder,
        objective: Objective,
        data: Batches,
        settings: TrainingSettings,
        evaluate: Callable[[Any], float] | None = None,
        schedule: Callable[[int], float] | None = None,
    ) -> None:
        if encoder.model.embeddings.word.weight.dtype != torch.float32:
            raise ValueError('training needs weights in float32: load the model with dtype="float32"')
        if encoder.model.output_layer is not None:
            raise ValueError(
                "the model to start from has an output layer, which no objective goes on training; take it away with "
                "encoder.model.output_layer = None, or start from another model"
            )
        if settings.precision == "float16" and encoder.device.type != "cuda":
            raise ValueError('precision "float16" needs a GPU; on a CPU choose "bfloat16" or "float32"')
        if settings.evaluate_every and evaluate is None:
            raise ValueError("evaluate_every is set, and there is nothing to evaluate with")
        self.encoder, self.data, self.settings, self.evaluate = encoder, data, settings, evaluate
        self.objective = objective.to(encoder.device).train()
        self.gradients = Gradients(encoder, self.objective, settings)
        self.total_steps = settings.max_steps or max(1, int(settings.epochs * len(data)) // settings.accumulation)
        self.last_loss = self.last_gradient_norm = math.nan
        self._schedule = schedule or self._scheduled
        self._identity = {
            **asdict(replace(settings, output="")),
            "total_steps": self.total_steps,
            "model": encoder.fingerprint(),
            "objective": [type(objective).__name__, *_plain_attributes(objective)],
        }
        self._step, self._first_score, self._best_score, self._best_step = 0, math.nan, -math.inf, 0

    def run(self, *, resume: bool = True, show_progress_bar: bool | None = None) -> TrainingResult:
        """Train to the end, from the checkpoint in the output folder if there is one.

        Args:
            resume: go on from such a checkpoint; if false, it is an error that there is one.
            show_progress_bar: by default, if the `minilm` logger is at level INFO or below.

        Raises:
            CheckpointError: the checkpoint can't be read, or was made with other settings.
            TrainingError: the loss is no longer a finite number.
            ValueError: there is a checkpoint, and `resume` is false.
        """
        with distributed.process_group(self.encoder.device), self._trainable():
            self._prepare(resume)
            writes = _is_main()
            log = RunLog(self.settings.folder, self._step, tensorboard=self.settings.tensorboard) if writes else None
            try:
                self._loop(log, show_progress_bar)
            finally:
                self.encoder.model.eval()
                if log is not None:
                    log.close()
            return self._finish()

    # The loop.

    def _loop(self, log: RunLog | None, show: bool | None) -> None:
        """Take the steps that are left."""
        settings, batches = self.settings, _endless(self.data)
        if self._step == 0 and settings.evaluate_every:
            self._first_score = self._score()
            _write(log, {"step": 0, "epoch": 0, "score": self._first_score})
        losses: list[float] = []
        began = last = time.perf_counter()
        before = log.seconds if log else 0.0
        with training_bar(show if _is_main() else False, self.total_steps, self._step) as advance:
            while self._step < self.total_steps:
                losses.append(self._take_step(batches))
                text, now = "", time.perf_counter()
                if self._is_due(settings.log_every):
                    figures = self._figures(losses, now - last) | {"seconds": before + now - began}
                    _write(log, figures)
                    text = f"loss {figures['loss']:.4f}, {figures['texts_per_second']:.0f} texts/s"
                    losses, last = [], now
                if self._is_due(settings.evaluate_every):
                    score = self._score()
                    self._keep_if_best(score)
                    _write(log, {"step": self._step, "score": score})
                    last += time.perf_counter() - now  # no part of the throughput
                advance(text)
                if self._is_due(settings.checkpoint_every):
                    self._save_checkpoint()

    def _take_step(self, batches: Iterator[Batch]) -> float:
        """Do one step, and return its loss."""
        settings, scaler = self.settings, self.gradients.scaler
        set_learning_rate(self.optimizer, self._schedule(self._step))
        first = self._step * settings.accumulation
        losses = [self.gradients.add(next(batches), first + i) for i in range(settings.accumulation)]
        self.last_loss = float(torch.stack(losses).mean())
        scaler.unscale_(self.optimizer)
        encoder, objective = list(self.encoder.model.parameters()), list(self.objective.parameters())
        distributed.reduce_gradients(encoder, objective)
        trained = [p for p in (*encoder, *objective) if p.requires_grad]
        self.last_gradient_norm = float(nn.utils.clip_grad_norm_(trained, settings.max_gradient_norm or math.inf))
        scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update()
        self._step += 1
        return self.last_loss

    def _figures(self, losses: list[float], seconds: float) -> dict[str, float]:
        """Return what a line of the log says of the last steps."""
        texts, self.gradients.texts = self.gradients.texts, 0
        return {
            "step": self._step,
            "epoch": self._step * self.settings.accumulation / len(self.data),
            "loss": sum(losses) / len(losses),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "gradient_norm": self.last_gradient_norm,
            "texts_per_second": texts / seconds,
        }

    # Around the loop.

    @contextmanager
    def _trainable(self) -> Iterator[None]:
        """Freeze what is to stay as it is, until the block ends."""
        before = {p: p.requires_grad for p in self.encoder.model.parameters()}
        for name, parameter in self.encoder.model.named_parameters():
            parameter.requires_grad_(not name.startswith(self.settings.freeze))
        try:
            yield
        finally:
            for parameter, wanted in before.items():
                parameter.requires_grad_(wanted)

    def _prepare(self, resume: bool) -> None:
        """Make optimiser and average, and bring everything to where the run stands."""
        settings = self.settings
        self.encoder.model.output_layer = None  # while it is trained, it is the objective's
        objective_rate = settings.objective_learning_rate or settings.learning_rate
        peaks = {self.encoder.model: settings.learning_rate, self.objective: objective_rate}
        self.optimizer = adamw(peaks, settings.weight_decay, decay_all=settings.decay_all)
        self.optimizer.zero_grad(set_to_none=True)
        self.average = MovingAverage(self.encoder.model, settings.ema) if settings.ema else None
        settings.folder.mkdir(parents=True, exist_ok=True)
        state = load_checkpoint(settings.folder / "checkpoint.pt", self._identity)
        if state is not None and not resume:
            raise ValueError(f"{settings.folder} holds a run already; resume it, or choose another output")
        if state is not None:
            self._restore(state)
        elif type(self.objective).prepare is not Objective.prepare:
            self.objective.prepare(*self._sample())
        if _is_main():
            for leftover in (*settings.folder.glob(".best.*"), *settings.folder.glob(".model.*")):
                shutil.rmtree(leftover, ignore_errors=True)  # of a run that was killed while it wrote

    def _sample(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """Return what the objective gets of the first batches of an epoch; the data is put back to where it was."""
        before, rows = self.data.state_dict(), 0
        states: list[dict[str, dict[str, Tensor]]] = []
        targets: list[dict[str, Tensor]] = []
        for batch in self.data:
            states.append(self.gradients.states(batch))
            targets.append(self.gradients.targets(batch))
            rows += batch.total
            if rows >= PREPARED_ROWS:
                break
        self.data.load_state_dict(before)
        return (
            {c: {s: torch.cat([x[c][s] for x in states]) for s in own} for c, own in states[0].items()},
            {name: torch.cat([x[name] for x in targets]) for name in targets[0]},
        )

    def _save_checkpoint(self) -> None:
        """Write everything that the rest of the run depends on."""
        if _is_main():
            state = {
                "settings": self._identity,
                "progress": [self._step, self._first_score, self._best_score, self._best_step],
                "encoder": self.encoder.model.state_dict(),
                "objective": self.objective.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.gradients.scaler.state_dict(),
                "average": self.average.state_dict() if self.average else None,
                "data": self.data.state_dict(),
            }
            save_checkpoint(self.settings.folder / "checkpoint.pt", state)
        distributed.wait_for_all()

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Take up what `_save_checkpoint` wrote."""
        self._step, self._first_score, self._best_score, self._best_step = state["progress"]
        self.encoder.model.load_state_dict(state["encoder"])
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.gradients.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.data.load_state_dict(state["data"])

    def _score(self) -> float:
        """Evaluate the model as it would be written now; nan in all processes but the first."""
        score = math.nan
        if _is_main() and self.evaluate is not None:
            with self._as_written():
                score = float(self.evaluate(self.encoder))
        distributed.wait_for_all()
        return score

    def _keep_if_best(self, score: float) -> None:
        """Write the model if none was better."""
        if self.settings.keep_best and score > self._best_score:
            self._best_score, self._best_step = score, self._step
            self._save_model("best")

    def _save_model(self, name: str) -> None:
        """Write the model as it is now into the run's folder."""
        training = {name: self._identity[name] for name in ("model", "objective", "learning_rate", "seed")}
        training["step"] = self._step
        with self._as_written():  # the checkpoint shares its memory with the model
            checkpoint = self.encoder.to_checkpoint()
            start = checkpoint.provenance
            provenance = {
                **start,
                "source": f"trained from {start.get('source', 'unknown weights').removeprefix('trained from ')}",
                "training": training,
            }
            replace(checkpoint, provenance=provenance).save(self.settings.folder / name)

    def _finish(self) -> TrainingResult:
        """Write what is left to write, and put the resulting weights into the encoder."""
        folder = self.settings.folder
        if _is_main() and self._best_step == 0:
            self._best_step = self._step
            self._save_model("model")
        elif _is_main() and (folder / "best").exists():  # else this run had ended before
            read_model(folder / "best").save(folder / "model")
            shutil.rmtree(folder / "best")
        distributed.wait_for_all()
        self.encoder.model.output_layer = self.objective.output_layer
        self.encoder.model.load_state_dict(read_model(folder / "model").model_tensors)
        if not self.settings.keep_best and self.settings.evaluate_every:
            self._best_score = self._score()
        if self.settings.plot and _is_main():
            try:
                plot_log(folder / "log.csv", folder / "log.png")
            except ImportError as error:
                logger.warning("there is no picture of the log: %s", error)
        if truncated := self.gradients.pooler.truncated:
            limit = self.encoder.max_seq_length
            logger.warning("training texts were longer than %d tokens and cut there %d times", limit, truncated)
        score = self._best_score if math.isfinite(self._best_score) else math.nan
        return TrainingResult(folder / "model", self._step, self._first_score, score, self._best_step)

    # Small things.

    @contextmanager
    def _as_written(self) -> Iterator[None]:
        """Give the encoder what it is written with, for the time of a block: averaged weights, the output layer."""
        model = self.encoder.model
        with nullcontext() if self.average is None else self.average.applied():
            before, model.output_layer = model.output_layer, self.objective.output_layer
            try:
                yield
            finally:
                model.output_layer = before

    def _scheduled(self, step: int) -> float:
        """The learning rate's factor, as the settings have it."""
        warmup = self.settings.warmup_steps(self.total_steps)
        return schedule_factor(step, self.total_steps, warmup, self.settings.schedule)

    def _is_due(self, every: int) -> bool:
        """Whether something is to happen after this step: every so many steps, and after the last; never for 0."""
        return every > 0 and (self._step % every == 0 or self._step == self.total_steps)


def _endless(data: Batches) -> Iterator[Batch]:
    """Give epoch after epoch."""
    while True:
        yield from data


def _plain_attributes(objective: Objective) -> list[str]:
    """Return an objective's numbers, words and switches, as `name=value`."""
    plain = (int, float, str, tuple, list)
    return [f"{name}={value!r}" for name, value in sorted(vars(objective).items()) if isinstance(value, plain)]


def _is_main() -> bool:
    """Whether this process writes, evaluates and reports."""
    return distributed.rank() == 0


def _write(log: RunLog | None, figures: Mapping[str, float]) -> None:
    """Write a line, in the process that has a log."""
    if log is not None:
        log.write(figures)
