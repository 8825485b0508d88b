"""The one table of tensor names: Hugging Face BERT's and ours, read in both directions.

Theirs are those of `transformers.BertModel` (without a prefix); ours are those of `MiniLM.state_dict()`, where the
query, key and value projections are one, stacked in that order. `plain_name` first undoes what training wrappers and
old converters do to a name, so the table itself holds every tensor once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from minilm.config import MiniLMConfig

_NORM = {"weight": "C", "bias": "C"}
_SQUARE = {"weight": "CC", "bias": "C"}

# Ours, theirs (several are stacked into ours), and the shape of each of theirs in letters:
# V vocabulary, P positions, N token types, C hidden, F feed-forward.
_EMBEDDINGS = (
    ("embeddings.word", ("embeddings.word_embeddings",), {"weight": "VC"}),
    ("embeddings.position", ("embeddings.position_embeddings",), {"weight": "PC"}),
    ("embeddings.token_type", ("embeddings.token_type_embeddings",), {"weight": "NC"}),
    ("embeddings.norm", ("embeddings.LayerNorm",), _NORM),
)
_LAYER = (
    ("attention.qkv", ("attention.self.query", "attention.self.key", "attention.self.value"), _SQUARE),
    ("attention.output", ("attention.output.dense",), _SQUARE),
    ("attention_norm", ("attention.output.LayerNorm",), _NORM),
    ("feed_forward.intermediate", ("intermediate.dense",), {"weight": "FC", "bias": "F"}),
    ("feed_forward.output", ("output.dense",), {"weight": "CF", "bias": "C"}),
    ("feed_forward_norm", ("output.LayerNorm",), _NORM),
)
_POOLER = ("pooler", ("pooler.dense",), _SQUARE)
POSITION_IDS = "embeddings.position_ids"

# Kept so that an export is exact; no part of the model: BERT's unused pooler, and the numbers 0 .. P-1.
OPTIONAL = frozenset({"pooler.weight", "pooler.bias", POSITION_IDS})

# In the table of no model of BERT's: a linear map without bias, [D, C], from pooled vectors to those that are given.
OUTPUT_LAYER = "output_layer.weight"

# What wrappers put before a name, in any order and number; BERT's own `encoder.layer.` is not one of them.
_WRAPPERS = ("module.", "model.", "auto_model.", "0.", "bert.", "encoder.")
# Training leftovers: masked-language-model heads, and the distillation modules of the IBKD checkpoints.
_LEFTOVERS = ("cls.", "decoder", "encoder_ln1", "encoder_ln2", "mlp")


class TensorName(NamedTuple):
    """One row of the table: `ours` is `theirs` stacked along the first axis, and has `shape`."""

    ours: str
    theirs: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def their_shape(self) -> tuple[int, ...]:
        """The shape of each of `theirs`."""
        return (self.shape[0] // len(self.theirs), *self.shape[1:])


def tensor_names(config: MiniLMConfig) -> list[TensorName]:
    """Return the whole table for a model of this size, optional tensors (`OPTIONAL`) included."""
    sizes = {"V": config.vocab_size, "P": config.max_positions, "N": config.num_token_types}
    sizes |= {"C": config.hidden_size, "F": config.feed_forward_size}
    table = [
        TensorName(f"{ours}.{part}", tuple(f"{name}.{part}" for name in theirs), shape)
        for ours, theirs, parts in _modules(config.num_layers)
        for part, letters in parts.items()
        for shape in [(len(theirs) * sizes[letters[0]], *(sizes[letter] for letter in letters[1:]))]
    ]
    return [*table, TensorName(POSITION_IDS, (POSITION_IDS,), (1, config.max_positions))]


def _modules(num_layers: int) -> Iterator[tuple[str, tuple[str, ...], dict[str, str]]]:
    """Yield the modules of the table, each layer's under its own number."""
    yield from _EMBEDDINGS
    for layer in range(num_layers):
        for ours, theirs, parts in _LAYER:
            yield f"layers.{layer}.{ours}", tuple(f"encoder.layer.{layer}.{name}" for name in theirs), parts
    yield _POOLER


def plain_name(name: str) -> str:
    """Return a BERT tensor's name without wrapper prefixes, and with LayerNorm's gamma and beta spelled today's way."""
    while not name.startswith("encoder.layer."):
        wrapper = next((prefix for prefix in _WRAPPERS if name.startswith(prefix)), "")
        if not wrapper:
            break
        name = name.removeprefix(wrapper)
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def is_leftover(name: str) -> bool:
    """Whether a plain name belongs to a known training leftover, which no sentence vector depends on."""
    return name.startswith(_LEFTOVERS)
