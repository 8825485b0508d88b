"""From texts to vectors: fitting them into the length limit, planning batches, running the model, normalising.

`SentenceEncoder` is the public face of this; here are its inner steps. Texts are tokenised in the thread that computes:
it takes a few microseconds a text, and in a thread of its own it would hold the interpreter's lock when the model wants
to go on, which gains nothing.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from numbers import Integral

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from minilm import threads
from minilm.activations import ensure_input_ranges
from minilm.batch import PackedBatch
from minilm.config import ON_TRUNCATE, PRECISIONS, EncodingConfig
from minilm.model import MiniLM
from minilm.progress import progress_bar
from minilm.texts import Text
from minilm.tokenizer import TokenizedText, Tokenizer

BLOCK_TOKENS = 131_072  # texts are tokenised up to as many tokens, sorted by length, and encoded together


class TruncationWarning(UserWarning):
    """Some texts were longer than the limit, and only their beginnings were encoded."""


@dataclass(frozen=True)
class EncodeOptions:
    """What one call of `SentenceEncoder.encode` asks for; the attributes are its arguments.

    Raises:
        ValueError: one of them is out of range.
    """

    prompt: str = ""
    batch_size: int = 32
    show_progress_bar: bool | None = None
    precision: str = "float32"
    normalize_embeddings: bool = False
    truncate_dim: int | None = None
    on_truncate: str = "warn"
    deterministic: bool = False

    def __post_init__(self) -> None:
        """Check every field."""
        for name, allowed in (("precision", PRECISIONS), ("on_truncate", ON_TRUNCATE)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        for name in ("batch_size", "truncate_dim"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, Integral) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} must be a positive integer, got {value!r}")


@dataclass
class Embedder:
    """One call's work: a model, the settings that turn its hidden states into vectors, and a count of texts cut.

    Attributes:
        model: the encoder; put into evaluation mode.
        tokenizer: its tokenizer.
        encoding: pooling, normalisation and length limit.
        options: what the call asks for.
        truncated: texts cut so far.
        longest: the longest of them, in tokens.
    """

    model: MiniLM
    tokenizer: Tokenizer
    encoding: EncodingConfig
    options: EncodeOptions
    truncated: int = field(default=0, init=False)
    longest: int = field(default=0, init=False)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.embeddings.word.weight.device

    def vectors(self, texts: Sequence[Text], first_index: int = 0) -> Tensor:
        """Return each text's vector, float32 `[n, C]` (D or `truncate_dim` wide); equal texts are computed once.

        Args:
            texts: checked texts.
            first_index: the first one's place in the caller's input, for messages.
        """
        first_seen: dict[Text, int] = {}
        for index, text in enumerate(texts, first_index):
            first_seen.setdefault(text, index)
        copies = Counter(texts) if len(first_seen) < len(texts) else None
        width = self.options.truncate_dim or self.model.vector_size
        vectors = torch.empty(len(first_seen), width, dtype=torch.float32, device=self.device)
        done = 0
        with progress_bar(self.options.show_progress_bar, len(first_seen), "encode", "text") as advance:
            for block in self._blocks(first_seen, copies):
                self._fill(vectors[done : done + len(block)], block, advance)
                done += len(block)
        if copies is None:
            return vectors
        rows = {text: row for row, text in enumerate(first_seen)}
        return vectors[torch.tensor([rows[text] for text in texts], device=vectors.device)]

    def token_vectors(self, texts: Sequence[Text]) -> list[Tensor]:
        """Return each text's last hidden state, special tokens included: float32 `[L, C]` each.

        Raises:
            ValueError: `on_truncate` is `chunk`, which has no single row for a token.
        """
        if self.options.on_truncate == "chunk":
            raise ValueError('token embeddings can\'t be had with on_truncate="chunk"')
        pieces = [self.fit(text, index)[0] for index, text in enumerate(texts)]
        vectors: list[Tensor] = [torch.empty(0)] * len(pieces)

        def place(indices: list[int]) -> None:
            batch = self._pack([pieces[i] for i in indices])
            hidden = self.model(batch).last_hidden_state.float()
            for index, rows in zip(indices, hidden.split(batch.lengths), strict=True):
                vectors[index] = rows

        self._for_each_batch(place, [len(piece) for piece in pieces])
        return vectors

    def fit(self, text: Text, index: int, copies: int = 1) -> list[TokenizedText]:
        """Tokenise a text into pieces within the length limit: one, or several windows of it with `chunk`.

        Raises:
            ValueError: the text is too long and `on_truncate` is `error`.
        """
        limit, on_truncate = self.encoding.max_seq_length, self.options.on_truncate
        tokenized = self.tokenizer(_with_prompt(self.options.prompt, text))
        if len(tokenized) <= limit:
            return [tokenized]
        if on_truncate == "error":
            raise ValueError(
                f"text {index} has {len(tokenized)} tokens, more than the limit of {limit}; shorten it, raise "
                f'max_seq_length, or choose on_truncate="warn", "ignore" or "chunk"'
            )
        if on_truncate == "chunk":
            return self.tokenizer.chunk(tokenized, limit)
        self.truncated += copies
        self.longest = max(self.longest, len(tokenized))
        return [self.tokenizer.truncate(tokenized, limit)]

    def report_truncation(self) -> None:
        """Warn, once, if texts were cut and `on_truncate` is `warn`."""
        if self.truncated and self.options.on_truncate == "warn":
            texts = "1 text was" if self.truncated == 1 else f"{self.truncated} texts were"
            warnings.warn(
                f"{texts} longer than {self.encoding.max_seq_length} tokens and cut there (the longest has "
                f'{self.longest}); raise max_seq_length, or pass on_truncate="chunk" to encode all of it, '
                f'"ignore" to silence this',
                TruncationWarning,
                stacklevel=level_outside(),
            )

    def _blocks(
        self, first_seen: Mapping[Text, int], copies: Mapping[Text, int] | None
    ) -> Iterator[list[list[TokenizedText]]]:
        """Give texts as the pieces of each, in blocks that bound what is in memory however long the texts are."""
        block: list[list[TokenizedText]] = []
        room = BLOCK_TOKENS
        for text, index in first_seen.items():
            pieces = self.fit(text, index, copies[text] if copies else 1)
            block.append(pieces)
            room -= sum(map(len, pieces))
            if room <= 0:
                yield block
                block, room = [], BLOCK_TOKENS
        if block:
            yield block

    def _fill(self, vectors: Tensor, fitted: list[list[TokenizedText]], advance: Callable[[int], object]) -> None:
        """Write the vectors of texts, given as one or more pieces each, to `vectors [n, C]` (or narrower)."""
        pieces = list(chain.from_iterable(fitted))
        one_piece_each = len(pieces) == len(fitted)
        normalize = self.encoding.normalize and one_piece_each
        pooled = vectors if one_piece_each else vectors.new_empty(len(pieces), self.model.vector_size)

        def place(indices: list[int]) -> None:
            batch = self._pack([pieces[i] for i in indices])
            rows = pooled_vectors(self.model, batch, self.encoding, normalize).float()
            pooled[indices] = self._scaled(rows) if one_piece_each else rows
            advance(len(indices) if one_piece_each else 0)

        self._for_each_batch(place, [len(piece) for piece in pieces])
        if not one_piece_each:
            merged = _merge_windows(pooled, fitted)
            vectors.copy_(self._scaled(F.normalize(merged, dim=-1) if self.encoding.normalize else merged))
            advance(len(fitted))

    def _scaled(self, vectors: Tensor) -> Tensor:
        """Keep the dimensions asked for, and scale to length 1 if asked to."""
        if self.options.truncate_dim:
            vectors = vectors[:, : self.options.truncate_dim]
        return F.normalize(vectors, dim=-1) if self.options.normalize_embeddings else vectors

    def _for_each_batch(self, place: Callable[[list[int]], None], lengths: list[int]) -> None:
        """Call `place` with the indices of each planned batch, without gradients or dropout."""
        model = self.model
        if any(part.training for part in (model, model.embeddings, *model.layers)):  # eval() takes as long as a text
            model.eval()
        ensure_input_ranges(model, self.tokenizer)

        def run(batches: list[list[int]]) -> None:
            with torch.inference_mode():
                for indices in batches:
                    place(indices)

        on_cpu = self.device.type == "cpu"
        if self.options.deterministic and on_cpu:
            threads.map_single_threaded(run, [[[i]] for i in range(len(lengths))])
        elif self.options.deterministic or len(lengths) == 1:
            run([[i] for i in range(len(lengths))])
        else:
            token_budget = self.options.batch_size * self.encoding.max_seq_length
            if on_cpu and model.backend.best_batch_tokens:  # what is small stays in the cache
                token_budget = min(token_budget, model.backend.best_batch_tokens)
            run(plan_batches(lengths, token_budget))

    def _pack(self, pieces: list[TokenizedText]) -> PackedBatch:
        """Pack pieces on the model's device."""
        type_ids = [piece.type_ids for piece in pieces] if any(piece.second for piece in pieces) else None
        return PackedBatch.from_sequences([piece.ids for piece in pieces], type_ids, self.device)


def pooled_vectors(model: MiniLM, batch: PackedBatch, encoding: EncodingConfig, normalize: bool) -> Tensor:
    """Return the vectors of a packed batch, `[B, C]`, pooled as `encoding` says, scaled to length 1 if `normalize`.

    Where the model has an output layer W, they are W·(what was pooled), `[B, D]`, scaled after that.
    """
    output = model(batch, hidden_states=encoding.pooling in ("avg_top2", "avg_first_last"))
    states, first = output.hidden_states or (output.last_hidden_state,), encoding.first_hidden_index
    if model.output_layer is None:
        return model.backend.pool(states, batch, encoding.pooling, first, normalize)
    pooled = model.backend.pool(states, batch, encoding.pooling, first)  # float32 at least
    vectors = F.linear(pooled, model.output_layer.weight.to(pooled.dtype))
    return F.normalize(vectors, dim=-1) if normalize else vectors


def plan_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Split sequences into batches of at most `token_budget` tokens (but at least one sequence), longest first.

    Neighbours in length share a batch, so that operations on sequences of equal length stay large.
    """
    batches: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if not batches or lengths[index] > room:
            batches.append([])
            room = token_budget
        batches[-1].append(index)
        room -= lengths[index]
    return batches


def _merge_windows(pooled: Tensor, fitted: list[list[TokenizedText]]) -> Tensor:
    """Average the windows of each text, weighted by their lengths: `[windows, C]` -> `[n, C]`."""
    owners = torch.tensor([i for i, text in enumerate(fitted) for _ in text], device=pooled.device)
    lengths = pooled.new_tensor([len(piece) for text in fitted for piece in text])
    share = lengths / pooled.new_zeros(len(fitted)).index_add_(0, owners, lengths)[owners]
    return pooled.new_zeros(len(fitted), pooled.shape[1]).index_add_(0, owners, pooled * share.unsqueeze(1))


def level_outside() -> int:
    """Return the `stacklevel` at which a warning of this function's caller points out of this package."""
    level, frame = 1, sys._getframe(1)
    inside = ("minilm", "contextlib")  # `with` blocks of ours are entered by way of contextlib
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in inside:
        level, frame = level + 1, frame.f_back
    return level


def _with_prompt(prompt: str, text: Text) -> Text:
    """Put the prompt before a text, or before the first text of a pair."""
    return prompt + text if isinstance(text, str) else (prompt + text[0], text[1])
