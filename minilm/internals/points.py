"""The names of the encoder's tensors: which there are, what shape they have, and what others call them.

    embeddings.word, .position, .token_type ─ sum, LayerNorm ─> embeddings
    layers.K, from the output before it:
      attention.query, .key, .value ─> attention.scores ─ softmax ─> attention.pattern ─> attention.head_outputs
      ─> attention.output ─ + input ─> attention_residual ─ LayerNorm ─> attention_norm
      ─> feed_forward.pre_activation ─ GELU ─> feed_forward.activation ─> feed_forward.output
      ─ + attention_norm ─> feed_forward_residual ─ LayerNorm ─> output
    pooled ─ normalised if the model does so ─> embedding

Dimensions: L tokens of a text, H heads, D head width, C hidden, F feed-forward. TransformerLens' names (of its
HookedEncoder, the same architecture) are understood as aliases.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import NamedTuple

from minilm.config import MiniLMConfig

TOKENS, HEADS, PATTERN, VECTOR = "token", "token and head", "head", "text"  # what a tensor has one row for


class Point(NamedTuple):
    """A tensor on the way from text to vector.

    Attributes:
        name: its dotted name.
        rows: what it has one row for: `TOKENS [L, width]`, `HEADS [L, H, D]`, `PATTERN [H, L, L]` or `VECTOR [C]`.
        shape: its shape for one text, in letters.
        what: what it is.
    """

    name: str
    rows: str
    shape: str
    what: str


_EMBEDDINGS = (
    Point("embeddings.word", TOKENS, "L C", "the word's row of the embedding table"),
    Point("embeddings.position", TOKENS, "L C", "the position's row"),
    Point("embeddings.token_type", TOKENS, "L C", "the token type's row"),
    Point("embeddings", TOKENS, "L C", "LayerNorm of their sum: the first layer's input"),
)
_LAYER = (
    Point("attention.query", HEADS, "L H D", "W_q·x + b_q"),
    Point("attention.key", HEADS, "L H D", "W_k·x + b_k"),
    Point("attention.value", HEADS, "L H D", "W_v·x + b_v"),
    Point("attention.scores", PATTERN, "H L L", "query·key / sqrt(D)"),
    Point("attention.pattern", PATTERN, "H L L", "softmax of the scores: who (row) looks at whom (column)"),
    Point("attention.head_outputs", HEADS, "L H D", "pattern·value"),
    Point("attention.output", TOKENS, "L C", "W_o·(all heads) + b_o"),
    Point("attention_residual", TOKENS, "L C", "attention.output + the layer's input"),
    Point("attention_norm", TOKENS, "L C", "LayerNorm of that"),
    Point("feed_forward.pre_activation", TOKENS, "L F", "W_1·x + b_1"),
    Point("feed_forward.activation", TOKENS, "L F", "GELU of that"),
    Point("feed_forward.output", TOKENS, "L C", "W_2·activation + b_2"),
    Point("feed_forward_residual", TOKENS, "L C", "feed_forward.output + attention_norm"),
    Point("output", TOKENS, "L C", "LayerNorm of that: the layer's output"),
)
_TEXT = (
    Point("pooled", VECTOR, "C", "token vectors reduced to one"),
    Point("embedding", VECTOR, "C", "what `encode` returns: pooled, scaled to length 1 if the model does so"),
)
_TRANSFORMER_LENS = {
    "embed.hook_embed": "embeddings.word",
    "embed.hook_pos_embed": "embeddings.position",
    "embed.hook_token_type_embed": "embeddings.token_type",
    "hook_embed": "embeddings.word",
    "hook_pos_embed": "embeddings.position",
    "hook_token_type_embed": "embeddings.token_type",
    "hook_full_embed": "embeddings",
    "attn.hook_q": "attention.query",
    "attn.hook_k": "attention.key",
    "attn.hook_v": "attention.value",
    "attn.hook_attn_scores": "attention.scores",
    "attn.hook_pattern": "attention.pattern",
    "attn.hook_z": "attention.head_outputs",
    "hook_attn_out": "attention.output",
    "hook_resid_mid": "attention_residual",
    "ln1.hook_normalized": "attention_norm",
    "ln2.hook_normalized": "output",
    "mlp.hook_pre": "feed_forward.pre_activation",
    "mlp.hook_post": "feed_forward.activation",
    "hook_mlp_out": "feed_forward.output",
    "hook_resid_post": "feed_forward_residual",
    "hook_normalized_resid_post": "output",
}


class UnknownPointError(ValueError):
    """There is no tensor of this name."""


def points_of(config: MiniLMConfig) -> dict[str, Point]:
    """Return every point of a model of these sizes by its name, in the order of computation."""
    layers = (
        point._replace(name=f"layers.{index}.{point.name}") for index in range(config.num_layers) for point in _LAYER
    )
    return {point.name: point for point in (*_EMBEDDINGS, *layers, *_TEXT)}


def hidden_states(config: MiniLMConfig) -> list[str]:
    """Return the names of the hidden states: the embeddings' output and each layer's."""
    return ["embeddings", *(f"layers.{layer}.output" for layer in range(config.num_layers))]


def hidden_state_labels(config: MiniLMConfig) -> list[str]:
    """Return what pictures call the hidden states."""
    return ["embeddings", *(f"layer {layer}" for layer in range(config.num_layers))]


def resolve(names: str | Iterable[str], config: MiniLMConfig) -> list[Point]:
    """Return the points that names mean, each once, in the order of computation.

    Args:
        names: one or more dotted names, in which `*` stands for a part between dots and `**` for anything
            (`layers.*.output`, `layers.3.**`), or `*` for all of them; TransformerLens' names will do.
        config: the model's sizes.

    Raises:
        UnknownPointError: a name that means none; the nearest names are suggested.
    """
    known = points_of(config)
    chosen: set[str] = set()
    for name in [names] if isinstance(names, str) else names:
        ours = from_transformer_lens(name)
        found = [point for point in known if matches(point, ours)]
        if not found:
            near = get_close_matches(ours, known, n=3, cutoff=0.5)
            suggestion = f"did you mean {' or '.join(near)}?" if near else "`minilm internals points` lists them"
            raise UnknownPointError(f"no point of this model is called {name!r}; {suggestion}")
        chosen.update(found)
    return [point for name, point in known.items() if name in chosen]


def matches(name: str, pattern: str) -> bool:
    """Whether a dotted name is one that a pattern means.

    `*` stands for a part between dots, `[135]` for one of these characters, `**` (and `*` alone) for anything.
    """
    special = {"*": "[^.]*", "**": ".*"}
    parts = re.split(r"(\*\*|\*|\[[\w-]+\])", pattern)
    expression = "".join(special.get(part) or (part if part.startswith("[") else re.escape(part)) for part in parts)
    return pattern == "*" or re.fullmatch(expression, name) is not None


def from_transformer_lens(name: str) -> str:
    """Return our name of a point that may be called by TransformerLens' name (`blocks.3.attn.hook_q`)."""
    block = re.fullmatch(r"blocks\.(\d+|\*)\.(.+)", name)
    if block is None:
        return _TRANSFORMER_LENS.get(name, name)
    layer, rest = block.groups()
    if rest == "hook_resid_pre" and layer != "*":
        return "embeddings" if int(layer) == 0 else f"layers.{int(layer) - 1}.output"
    return f"layers.{layer}.{_TRANSFORMER_LENS.get(rest, rest)}"
