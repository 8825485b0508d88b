"""ModelScope's fine-tuning example, for code that was written against it: rows of a query with its passages.

    trainer = build_trainer(Trainers.nlp_sentence_embedding_trainer, default_args={
        "model": model_id, "train_dataset": rows, "eval_dataset": rows, "work_dir": "out", "cfg_modify_fn": modify,
    })
    trainer.train()
    trainer.evaluate()

A row is `{"query": text, "positive_passages": [{"text": ...}], "negative_passages": [{"text": ...}]}`; the names of its
fields are `cfg.dataset.train`'s. Batches, losses and weights follow ModelScope 1.40.2's trainer, random draws included
(those of dropout aside). Where that passes over `train.neg_samples` and `train.train_batch_size`, and fails in
`evaluate`, this does what they say.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilm.encoder import SentenceEncoder, load
from minilm.evaluate.retrieval import score_run
from minilm.train.objectives import Ranking
from minilm.train.rows import DataError
from minilm.train.settings import TrainingSettings
from minilm.train.trainer import Trainer, TrainingResult
from minilm.weights.export import export_modelscope
from minilm.weights.sources import locate

CONFIGURATION = "configuration.json"
DATASET = {
    "query_sequence": "query",
    "pos_sequence": "positive_passages",
    "neg_sequence": "negative_passages",
    "text_fileds": ["title", "text"],
    "qid_field": "query_id",
}
"""Field names of a row, under ModelScope's own keys (its spelling)."""


class Trainers:
    """The names of `modelscope.metainfo.Trainers` that are known here."""

    nlp_sentence_embedding_trainer = "nlp-sentence-embedding-trainer"


class Config(dict[str, Any]):
    """A nested dictionary whose entries are attributes too, as ModelScope's configuration is.

    Args:
        values: entries; dictionaries in them become `Config`s.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__()
        for name, value in values.items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        """Set an entry."""
        super().__setitem__(name, Config(value) if isinstance(value, Mapping) else value)

    def __getattr__(self, name: str) -> Any:
        """Return an entry."""
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the configuration has no {name!r}; it has {', '.join(self) or 'nothing'}") from None

    __setattr__ = __setitem__

    def find(self, path: str, default: Any) -> Any:
        """Return the entry at a dotted path, or the default where there is none."""
        here: Any = self
        for name in path.split("."):
            if not isinstance(here, Mapping) or here.get(name) is None:
                return default
            here = here[name]
        return here


def build_trainer(name: str, default_args: Mapping[str, Any]) -> SentenceEmbeddingTrainer:
    """Build a trainer, as `modelscope.trainers.build_trainer` does.

    Raises:
        ValueError: another trainer.
    """
    if name != Trainers.nlp_sentence_embedding_trainer:
        raise ValueError(f"expected {Trainers.nlp_sentence_embedding_trainer!r}, got {name!r}")
    return SentenceEmbeddingTrainer(**default_args)


class SentenceEmbeddingTrainer:
    """ModelScope's sentence-embedding trainer.

    Args:
        model: a folder or a model's name, or an encoder.
        cfg_file: a `configuration.json`; the model folder's own by default.
        cfg_modify_fn: takes the configuration, and returns it changed.
        train_dataset: rows to train on.
        eval_dataset: rows to evaluate on.
        work_dir: where the run's files go, and `output/`, a ModelScope folder of the result; by default
            `train.work_dir` of the configuration.
        seed: of the order of rows and the draw of passages.
        device: of `minilm.load`.

    Attributes:
        cfg: the configuration.
        encoder: the model.

    Raises:
        DataError: a row can't be used; it is named by its number.
        ValueError: a setting that can't be followed.
    """

    def __init__(
        self,
        model: str | SentenceEncoder | None = None,
        cfg_file: str | None = None,
        cfg_modify_fn: Callable[[Config], Config] | None = None,
        train_dataset: Iterable[Mapping[str, Any]] | None = None,
        eval_dataset: Iterable[Mapping[str, Any]] | None = None,
        work_dir: str | None = None,
        seed: int = 42,
        device: str | None = None,
    ) -> None:
        cfg = Config(_configuration(cfg_file, model))
        self.cfg = cfg = Config(cfg_modify_fn(cfg)) if cfg_modify_fn else cfg
        limit = cfg.find("preprocessor.max_length", None)
        if isinstance(model, SentenceEncoder):
            self.encoder = model
            self.encoder.max_seq_length = limit or model.max_seq_length
        else:
            device = None if device == "gpu" else device
            self.encoder = load(model, device=device, dtype="float32", max_seq_length=limit)
        self.seed = seed
        self.work_dir = Path(work_dir or cfg.find("train.work_dir", "work_dir"))
        self.train_rows = _rows(train_dataset, Config({**DATASET, **cfg.find("dataset.train", {})}), "train_dataset")
        fields = cfg.find("dataset.val", cfg.find("dataset.train", {}))
        self.eval_rows = _rows(eval_dataset, Config({**DATASET, **fields}), "eval_dataset")
        self.last_loss: list[float] = []

    def train(self, show_progress_bar: bool | None = None) -> TrainingResult:
        """Train as the configuration says, and write the result.

        Raises:
            ValueError: there is no training data, or a setting that can't be followed.
        """
        if not self.train_rows:
            raise ValueError("there is nothing to train on: give rows as train_dataset")
        find = self.cfg.find
        batch_size = find("train.train_batch_size", find("train.dataloader.batch_size_per_gpu", 1))
        data = PassageBatches(self.train_rows, batch_size, find("train.neg_samples", 4), self.seed)
        trainer = Trainer(self.encoder, Ranking(), data, self._settings(), schedule=_schedule(self.cfg, len(data)))
        result = trainer.run(show_progress_bar=show_progress_bar)
        output = self.work_dir / "output"
        if not output.exists():
            export_modelscope(self.encoder.to_checkpoint(), output)
        return result

    def evaluate(self, recall_at: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
        """Order each evaluation row's passages by their score: MRR@10, nDCG@10, MAP and Recall@k, from 0 to 1.

        The score is what the model is trained by: the inner product of the vectors.

        Raises:
            ValueError: there is no evaluation data.
        """
        if not self.eval_rows:
            raise ValueError("there is nothing to evaluate on: give rows as eval_dataset")
        run, qrels = {}, {}
        for number, row in enumerate(self.eval_rows):
            passages = list(dict.fromkeys((*row.positives, *row.negatives)))
            query, *vectors = torch.from_numpy(self.encoder.encode([row.query, *passages]))
            run[str(number)] = {str(i): float(vector @ query) for i, vector in enumerate(vectors)}
            qrels[str(number)] = {str(i): int(passage in row.positives) for i, passage in enumerate(passages)}
        return {name: float(values.mean()) for name, values in score_run(run, qrels, recall_at).items()}

    def _settings(self) -> TrainingSettings:
        """Return what the configuration says of the run."""
        find = self.cfg.find
        kind = find("train.optimizer.type", "AdamW")
        if kind != "AdamW":
            raise ValueError(f"train.optimizer.type must be AdamW, got {kind!r}")
        return TrainingSettings(
            str(self.work_dir),
            epochs=find("train.max_epochs", 1),
            learning_rate=find("train.optimizer.lr", 2e-5),
            weight_decay=find("train.optimizer.weight_decay", 0.01),
            decay_all=True,
            max_gradient_norm=find("train.optimizer.options.grad_clip.max_norm", 0.0),
            log_every=1,
            plot=False,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Row:
    """A query with passages that answer it and passages that do not."""

    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]


@dataclass(frozen=True)
class PassageBatch:
    """Queries with a positive and some negatives each, as the trainer takes them."""

    texts: dict[str, list[Any]]
    targets: dict[str, Tensor]
    total: int


class PassageBatches:
    """Rows in batches, shuffled, with a positive and negatives drawn for each: in the order that ModelScope draws them.

    An epoch's order comes from two draws of torch's generator, as its `DataLoader` with a `RandomSampler` makes them; a
    row takes a positive, then negatives: without replacement if there are enough of them, else with.

    Args:
        rows: what to train on.
        batch_size: rows of a batch; an epoch's last may have fewer.
        negatives: negatives of each query.
        seed: of both draws.
    """

    def __init__(self, rows: Sequence[Row], batch_size: int, negatives: int, seed: int) -> None:
        for name, value in (("batch size", batch_size), ("neg_samples", negatives)):
            if value < 1:
                raise ValueError(f"the {name} must be at least 1, got {value}")
        self.rows, self.batch_size, self.negatives = rows, batch_size, negatives
        self._order = torch.Generator().manual_seed(seed)
        self._draw = random.Random(seed)
        self._left: list[int] = []

    def __len__(self) -> int:
        """Count the batches of an epoch."""
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[PassageBatch]:
        """Give what is left of an epoch; the next call gives the next."""
        if not self._left:
            self._left = self._epoch()
        while self._left:
            indices, self._left = self._left[: self.batch_size], self._left[self.batch_size :]
            yield self._batch([self.rows[index] for index in indices])

    def state_dict(self) -> dict[str, Any]:
        """Say where it stands."""
        version, numbers, following = self._draw.getstate()
        draw = [version, list(numbers), following]
        return {"left": self._left, "order": self._order.get_state(), "draw": draw}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where it stood."""
        version, numbers, following = state["draw"]
        self._draw.setstate((version, tuple(numbers), following))
        self._order.set_state(state["order"])
        self._left = list(state["left"])

    def _epoch(self) -> list[int]:
        """Return the order of an epoch's rows."""
        torch.empty((), dtype=torch.int64).random_(generator=self._order)  # the loader's, for its workers
        seed = int(torch.empty((), dtype=torch.int64).random_(generator=self._order))
        return torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(seed)).tolist()

    def _batch(self, rows: Sequence[Row]) -> PassageBatch:
        """Draw the passages of some rows."""
        texts: dict[str, list[Any]] = {"query": [], "positive": [], "negatives": []}
        for row in rows:
            texts["query"].append(row.query)
            texts["positive"].append(self._draw.choice(row.positives))
            enough = len(row.negatives) >= self.negatives
            draw = self._draw.sample if enough else self._draw.choices
            texts["negatives"].append(draw(row.negatives, k=self.negatives))
        return PassageBatch(texts, {}, len(rows))


def _rows(dataset: Iterable[Mapping[str, Any]] | None, fields: Config, name: str) -> list[Row]:
    """Check the rows of a dataset."""
    return [_row(row, fields, f"{name}, row {number}") for number, row in enumerate(dataset or ())]


def _row(row: Mapping[str, Any], fields: Config, where: str) -> Row:
    """Check a row."""

    def passages(name: str) -> tuple[str, ...]:
        found = row.get(name)
        if not isinstance(found, Sequence) or isinstance(found, str) or not found:
            raise DataError(f"{where}: expected a list of passages in {name!r}, got {found!r}")
        return tuple(_passage(passage, fields.text_fileds, f"{where}, {name}") for passage in found)

    query = row.get(fields.query_sequence)
    if not isinstance(query, str) or not query.strip():
        raise DataError(f"{where}: expected a text in {fields.query_sequence!r}, got {query!r}")
    return Row(query, passages(fields.pos_sequence), passages(fields.neg_sequence))


def _passage(passage: Any, fields: Sequence[str], where: str) -> str:
    """Join a passage's text fields by a space."""
    if isinstance(passage, str):
        return passage
    missing = [name for name in fields if not isinstance(passage.get(name), str)]
    if missing:
        raise DataError(f"{where}: a passage lacks {', '.join(missing)} (see text_fileds); it has {', '.join(passage)}")
    return " ".join(passage[name] for name in fields)


def _schedule(cfg: Config, batches: int) -> Callable[[int], float]:
    """Return what the learning rate is multiplied by in a step.

    Raises:
        ValueError: another scheduler than LinearLR.
    """
    settings = cfg.find("train.lr_scheduler", None)
    if settings is None:
        return lambda _: 1.0
    if settings.get("type") != "LinearLR":
        raise ValueError(f"train.lr_scheduler.type must be LinearLR, got {settings.get('type')!r}")
    start, end = settings.get("start_factor", 1 / 3), settings.get("end_factor", 1.0)
    total, by_epoch = settings.get("total_iters", 5), settings.find("options.by_epoch", True)

    def factor(step: int) -> float:
        passed = step // batches if by_epoch else step
        return float(start + (end - start) * min(passed, total) / total)

    return factor


def _configuration(cfg_file: str | None, model: str | SentenceEncoder | None) -> dict[str, Any]:
    """Read the configuration given, or the model folder's; nothing where there is none."""
    if cfg_file is not None:
        path = Path(cfg_file)
    elif isinstance(model, SentenceEncoder) or not (path := locate(model) / CONFIGURATION).exists():
        return {}
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values
