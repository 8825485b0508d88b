"""What a model is (`MiniLMConfig`) and how its hidden states become a sentence vector (`EncodingConfig`).

Both are frozen, validated on construction, and round-trip through plain dictionaries, so they can live in the
metadata of a weights file. This module imports nothing but the standard library: `kernels` and `weights` may use it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

POOLINGS = ("mean", "cls", "max", "mean_sqrt_len", "avg_top2", "avg_first_last")
FIRST_HIDDEN_STATES = ("embeddings", "first_layer")
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
PRECISIONS = ("float32", "int8", "uint8", "binary", "ubinary")
ON_TRUNCATE = ("warn", "ignore", "error", "chunk")

Config = TypeVar("Config", "MiniLMConfig", "EncodingConfig")


@dataclass(frozen=True)
class MiniLMConfig:
    """Sizes and constants of a BERT-style post-LayerNorm encoder; the defaults are MiniLM-L6-H384.

    Attributes:
        vocab_size: rows of the word embedding table.
        hidden_size: C, the width of a token vector.
        num_layers: transformer layers.
        num_heads: H attention heads of width D = hidden_size / num_heads.
        feed_forward_size: F, the inner width of the feed-forward block.
        max_positions: rows of the position embedding table; no sequence can be longer.
        num_token_types: rows of the token type (segment) embedding table.
        layer_norm_eps: added to the variance in every LayerNorm.
        hidden_dropout: dropout on the embeddings and on each block's output, in training only.
        attention_dropout: dropout on the attention probabilities, in training only.
        pad_token_id: the word id used to fill padded views; never seen by the encoder itself.

    Raises:
        ValueError: a size is not a positive integer, a rate is out of range, or the heads do not divide the width.
    """

    vocab_size: int = 30_522
    hidden_size: int = 384
    num_layers: int = 6
    num_heads: int = 12
    feed_forward_size: int = 1_536
    max_positions: int = 512
    num_token_types: int = 2
    layer_norm_eps: float = 1e-12
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        """Check every field."""
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "feed_forward_size", "max_positions")
        for name in (*sizes, "num_token_types"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads must divide hidden_size, got {self.num_heads} heads for {self.hidden_size}")
        for name in ("layer_norm_eps", "hidden_dropout", "attention_dropout"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < 1:
                raise ValueError(f"{name} must be a number in [0, 1), got {value!r}")
        if self.layer_norm_eps == 0:
            raise ValueError("layer_norm_eps must be positive, got 0")
        if not isinstance(self.pad_token_id, int) or not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id must be a row of the vocabulary, got {self.pad_token_id!r}")

    @property
    def head_size(self) -> int:
        """D, the width of one attention head."""
        return self.hidden_size // self.num_heads

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MiniLMConfig:
        """Build from `to_dict`'s dictionary; an unknown field is a `ValueError`."""
        return _from_dict(cls, values)


@dataclass(frozen=True)
class EncodingConfig:
    """How token vectors become one sentence vector, and how texts are cut before that.

    Attributes:
        pooling: `mean` (also called avg), `cls`, `max`, `mean_sqrt_len` (sum / sqrt(length)), `avg_top2` (mean over
            tokens of the last two layers' average) or `avg_first_last` (the same of the first and last).
        first_hidden_state: what "first" means in `avg_first_last`: `embeddings`, the embeddings' output, as in SimCSE
            and the IBKD paper's code; or `first_layer`, the first transformer layer's output, as in ModelScope.
        normalize: scale each vector to length 1.
        max_seq_length: tokens kept of a text, special tokens included.
        similarity: the model's preferred score: `cosine`, `dot`, `euclidean` or `manhattan` (the last two negated).
        prompts: named prefixes that `encode(prompt_name=...)` puts before each text.
        default_prompt_name: the prompt used when none is asked for.

    Raises:
        ValueError: an unknown name, a limit below 3 tokens, or a default prompt that is not in `prompts`.
    """

    pooling: str = "mean"
    first_hidden_state: str = "embeddings"
    normalize: bool = True
    max_seq_length: int = 128
    similarity: str = "cosine"
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        choices = {"pooling": POOLINGS, "first_hidden_state": FIRST_HIDDEN_STATES, "similarity": SIMILARITIES}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        limit = self.max_seq_length
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 3:
            raise ValueError(f"max_seq_length must be an integer of at least 3 ([CLS], a token, [SEP]), got {limit!r}")
        if self.default_prompt_name is not None and self.default_prompt_name not in self.prompts:
            known = ", ".join(sorted(self.prompts)) or "none"
            raise ValueError(f"default_prompt_name {self.default_prompt_name!r} is not a known prompt ({known})")

    @property
    def first_hidden_index(self) -> int:
        """Which hidden state is the first: 0, the embeddings' output, or 1, the first layer's."""
        return FIRST_HIDDEN_STATES.index(self.first_hidden_state)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary that JSON can hold."""
        return {**asdict(self), "prompts": dict(self.prompts)}

    def prompt(self, prompt: str | None = None, prompt_name: str | None = None) -> str:
        """Return the text to put before each text: `prompt` if given, else that of the name, else the default's.

        Raises:
            ValueError: there is no prompt of this name.
        """
        if prompt is not None:
            return prompt
        name = self.default_prompt_name if prompt_name is None else prompt_name
        if name is None or name in self.prompts:
            return "" if name is None else self.prompts[name]
        if name in ("query", "document"):  # known to every model in sentence-transformers, and empty by default
            return ""
        known = ", ".join(sorted({"query", "document", *self.prompts}))
        raise ValueError(f"this model has no prompt named {name!r}; it has: {known}")

    def known_prompt(self, *names: str) -> str | None:
        """Return the first of these names that a prompt has."""
        return next((name for name in names if name in self.prompts), None)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EncodingConfig:
        """Build from `to_dict`'s dictionary; an unknown field is a `ValueError`."""
        return _from_dict(cls, values)


def _from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """Construct `cls` from a dictionary, naming the fields it does not know."""
    unknown = sorted(set(values) - {f.name for f in fields(cls)})
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}")
    return cls(**values)
