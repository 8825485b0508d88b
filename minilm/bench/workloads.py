"""What is encoded: real texts, batches of tokens, and attention alone, each described by its name.

    text-short-256        256 short sentences          text-128-96        96 texts of 128 tokens
    text-mixed-192        192 texts from one sentence to several, cut at 128 tokens
    tokens-128-64k        64k tokens in sequences of 128, as ids: the model alone
    tokens-mixed-64k      64k tokens in sequences of the lengths that text-mixed has
    attention-64-64k      attention alone, on 64k tokens in sequences of 64

FLOPs are those of the model's formula, whatever an engine computes besides (padding, say): for a token, two for each
weight of the linear maps, and 4·C a layer for each token it attends to.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count, cycle, islice
from typing import TYPE_CHECKING, Any

from minilm.config import MiniLMConfig

if TYPE_CHECKING:
    from numpy.typing import NDArray

KINDS = ("texts", "tokens", "attention")
PREFIXES = {"text": "texts", "tokens": "tokens", "attention": "attention"}
KIBI = 1_024
PRIORITY = (128, "mixed", 32, 512, 16, 256, 64)
LOOKED_INTO = ((128, 64 * KIBI), ("mixed", 64 * KIBI))
FORMS = (16, 32, 64, 128, 256, 512, "mixed")
SHORT = range(10, 15)  # tokens of a short sentence
MIXED_LIMIT = 128
MOST_SENTENCES = 1_000_000
MIXED_SAMPLE = 512  # texts whose lengths token batches of mixed length repeat

DEFAULTS = {
    "cpu": {
        "texts": ("short-1", "128-1", "short-256", "mixed-192", "128-96", "512-32"),
        "tokens": tuple(f"{form}-8k" for form in FORMS),
        "attention": tuple(f"{form}-8k" for form in FORMS),
    },
    "cuda": {
        "texts": ("short-1", "short-256", "mixed-4096", "128-1024"),
        "tokens": tuple(
            f"{form}-{size}"
            for form in FORMS
            for size in (*([form] if form != "mixed" else []), "1k", "4k", "16k", "64k", "256k")
        ),
        "attention": tuple(f"{form}-64k" for form in FORMS),
    },
}


@dataclass(frozen=True)
class Workload:
    """One job that engines are timed at.

    Attributes:
        name: as in this module's description.
        kind: `texts`, `tokens` or `attention` (`ceiling` for what the machine can do at most).
        title: the same for people.
        lengths: each sequence's tokens, after any cut.
        texts: what to encode, for `texts`.
        limit: tokens that the encoder is to keep of a text.
    """

    name: str
    kind: str
    title: str
    lengths: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()
    limit: int = MIXED_LIMIT

    @property
    def num_tokens(self) -> int:
        """T."""
        return sum(self.lengths)

    @property
    def is_headline(self) -> bool:
        """Whether it is among the few that even an engine which compiles for each shape is measured at."""
        if self.kind != "tokens":
            return True
        _, form, size = parse(self.name)
        return size == 64 * KIBI or (size == form and form in (32, 128))

    @property
    def priority(self) -> int:
        """When it is made ready: the smaller, the earlier."""
        form = parse(self.name)[1]
        return PRIORITY.index(form) if self.is_headline and form in PRIORITY else len(PRIORITY)

    @property
    def is_looked_into(self) -> bool:
        """Whether its kernel launches are counted, and for a single sequence its latency taken."""
        return self.kind == "tokens" and (len(self.lengths) == 1 or parse(self.name)[1:] in LOOKED_INTO)

    def flops(self, config: MiniLMConfig) -> float:
        """Return what the formula takes."""
        pairs = sum(length * length for length in self.lengths)
        if self.kind == "attention":
            return 4.0 * config.hidden_size * pairs
        matrices = 4 * config.hidden_size**2 + 2 * config.hidden_size * config.feed_forward_size
        return config.num_layers * (2.0 * matrices * self.num_tokens + 4.0 * config.hidden_size * pairs)

    def least_bytes(self, config: MiniLMConfig, width: int) -> float:
        """Return the bytes that cannot but be moved, at `width` bytes a number: weights once, inputs, results."""
        if self.kind == "attention":
            return 4.0 * width * config.hidden_size * self.num_tokens
        matrices = 4 * config.hidden_size**2 + 2 * config.hidden_size * config.feed_forward_size
        rows = config.hidden_size * (self.num_tokens + len(self.lengths))  # of the embedding table, and the vectors
        return float(width * (config.num_layers * matrices + rows))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary that JSON can hold."""
        return dict(vars(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Workload:
        """Build from `to_dict`'s dictionary."""
        return cls(**{**values, "lengths": tuple(values["lengths"]), "texts": tuple(values["texts"])})


def parse(name: str) -> tuple[str, int | str, int]:
    """Split a workload's name into kind, form (`short`, `mixed` or a length) and size.

    Raises:
        ValueError: there is no such workload.
    """
    match = re.fullmatch(r"(text|tokens|attention)-(short|mixed|\d+)-(\d+)(k?)", name)
    if not match or (match[1] != "text" and match[2] == "short"):
        raise ValueError(
            f"unknown workload {name!r}: expected texts, tokens or attention, or one such as text-short-256, "
            f"text-mixed-192, text-128-96, tokens-128-64k, tokens-mixed-4k or attention-64-64k"
        )
    form: int | str = int(match[2]) if match[2].isdecimal() else match[2]
    size = int(match[3]) * (KIBI if match[4] else 1)
    if size < 1 or (isinstance(form, int) and (form < 3 or (match[1] != "text" and form > size))):
        raise ValueError(f"workload {name!r}: expected sequences of at least 3 tokens, and at least one of them")
    return PREFIXES[match[1]], form, size


def choose(wanted: Sequence[str], device: str) -> list[str]:
    """Return the names of the workloads wanted; `texts`, `tokens` and `attention` are all usual ones of that kind.

    Raises:
        ValueError: there is no such workload.
    """
    defaults = DEFAULTS["cuda" if device.startswith("cuda") else "cpu"]
    names: dict[str, None] = {}
    for name in wanted:
        if name in KINDS:
            prefix = next(prefix for prefix, kind in PREFIXES.items() if kind == name)
            names.update(dict.fromkeys(f"{prefix}-{rest}" for rest in defaults[name]))
        else:
            parse(name)
            names[name] = None
    return list(names)


def build(names: Sequence[str], texts: Texts, max_positions: int) -> tuple[list[Workload], dict[str, str]]:
    """Return the workloads with their texts and lengths, and why others can't be had."""
    made, refused = [], {}
    for name in names:
        kind, form, size = parse(name)
        if isinstance(form, int) and form > max_positions and kind != "attention":
            refused[name] = f"the model takes at most {max_positions} tokens"
        elif kind == "texts":
            made.append(_text_workload(name, texts, form, size))
        else:
            made.append(Workload(name, kind, _title(kind, form, size), tuple(_token_lengths(texts, form, size))))
    return made, refused


def _text_workload(name: str, texts: Texts, form: int | str, number: int) -> Workload:
    limit = form if isinstance(form, int) else MIXED_LIMIT
    chosen = texts.make(form, number)
    lengths = tuple(min(texts.count_tokens(text), limit) for text in chosen)
    return Workload(name, "texts", _title("texts", form, number), lengths, tuple(chosen), limit)


def _token_lengths(texts: Texts, form: int | str, size: int) -> Iterator[int]:
    """Yield lengths that sum to `size` where they can: a rest too short for a sequence of its own is left out."""
    sample = [form] if isinstance(form, int) else texts.mixed_lengths()
    left = size
    for wanted in cycle(sample):
        length = min(wanted, left)
        if length < 3 or (isinstance(form, int) and length < form):
            return
        yield length
        left -= length


def _title(kind: str, form: int | str, size: int) -> str:
    """Return a workload's name for people."""
    if kind == "texts":
        noun = {"short": "short sentence", "mixed": "text of mixed length"}.get(str(form), f"text of {form} tokens")
        if size == 1:
            return f"1 {noun}"
        return f"{size:,} {noun.replace('sentence', 'sentences').replace('text', 'texts')}"
    amount = f"{size // KIBI}k" if size % KIBI == 0 else f"{size:,}"
    shape = "of mixed length" if form == "mixed" else f"of {form}"
    if size == form:
        return f"{'attention, ' if kind == 'attention' else ''}1 sequence of {form} tokens"
    return f"{'attention, ' if kind == 'attention' else ''}{amount} tokens in sequences {shape}"


class Texts:
    """Distinct texts of a wanted length, made of real sentences.

    Args:
        sentences: the sentences.
        count_tokens: counts a text's tokens, the two special ones included.
    """

    def __init__(self, sentences: Sequence[str], count_tokens: Callable[[str], int]) -> None:
        self.sentences = list(dict.fromkeys(sentence.strip() for sentence in sentences if sentence.strip()))
        if not self.sentences:
            raise ValueError("expected sentences to make texts of, got none")
        self.count_tokens = count_tokens

    def make(self, form: int | str, number: int) -> list[str]:
        """Return `number` distinct texts: `short`, `mixed`, or of exactly so many tokens.

        Raises:
            ValueError: there are too few sentences for so many.
        """
        candidates = {"short": self._short, "mixed": self._mixed}.get(str(form), lambda: self._exact(int(form)))()
        made: dict[str, None] = {}
        for text in candidates:
            made[text] = None
            if len(made) == number:
                return list(made)
        raise ValueError(f"{len(self.sentences)} sentences are too few for {number} such texts: give more with --data")

    def mixed_lengths(self) -> list[int]:
        """Return the token counts that texts of mixed length have."""
        return [min(self.count_tokens(text), MIXED_LIMIT) for text in islice(self._mixed(), MIXED_SAMPLE)]

    def _many(self) -> Iterator[str]:
        """Yield the sentences, then the first half of one with the second half of another, up to a large number."""
        yield from self.sentences
        halves = [(words[: len(words) // 2], words[len(words) // 2 :]) for words in map(str.split, self.sentences)]
        for number in range(min(4 * len(halves) ** 2, MOST_SENTENCES)):
            shift, index = divmod(number, len(halves))
            yield " ".join(halves[index][0] + halves[(index + shift + 1) % len(halves)][1])

    def _short(self) -> Iterator[str]:
        """Yield sentences of 10 to 14 tokens."""
        return (text for text in self._many() if self.count_tokens(text) in SHORT)

    def _mixed(self) -> Iterator[str]:
        """Yield, in random order, single sentences, two or three, and four to eight: a third each."""
        generator, sentences = random.Random(0), self._many()
        sizes = (generator.choice((1, generator.randint(2, 3), generator.randint(4, 8))) for _ in count())
        return iter(lambda: " ".join(islice(sentences, next(sizes))), "")

    def _exact(self, length: int) -> Iterator[str]:
        """Yield texts of exactly `length` tokens: words in the order they come, leaving out those that don't fit."""
        frame = self.count_tokens("")
        size_of = cache(lambda word: self.count_tokens(word) - frame)
        chosen: list[str] = []
        left = length - frame
        for word in (word for sentence in self._many() for word in sentence.split()):
            if size_of(word) <= left:
                chosen.append(word)
                left -= size_of(word)
            if left == 0:
                yield " ".join(chosen)
                chosen, left = [], length - frame


def token_sequences(
    lengths: Sequence[int], corpus: NDArray[Any], frame: Sequence[int], rotation: int
) -> list[list[int]]:
    """Return sequences of word ids as they follow one another in real text, each between [CLS] and [SEP].

    Args:
        lengths: tokens of each sequence.
        corpus: word ids of running text; it is read over and over.
        frame: the ids of [CLS] and [SEP].
        rotation: another one starts elsewhere in the text.
    """
    import numpy as np

    cls_id, sep_id = frame
    place, sequences = rotation * 7_919, []
    for length in lengths:
        content = np.take(corpus, range(place, place + length - 2), mode="wrap")
        sequences.append([cls_id, *content.tolist(), sep_id])
        place += length - 2
    return sequences
