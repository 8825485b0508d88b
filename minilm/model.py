"""MiniLM: a BERT-style post-LayerNorm encoder over packed tokens.

    x = LN(word + position + token type)
    six times:  x = LN(x + attention(x));  x = LN(x + feed_forward(x))

Dimensions: T tokens, B sequences, C hidden, F feed-forward, H heads. The parameters live here; what is computed with
them is the backend's (`minilm.kernels.torch_backend` holds the formulas). Sources: Devlin et al. 2019 (BERT), Wang et
al. 2020 (MiniLM); sizes of `nreimers/MiniLM-L6-H384-uncased`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minilm.batch import PackedBatch
from minilm.config import MiniLMConfig
from minilm.kernels.backend import make_backend
from minilm.kernels.torch_backend import TorchBackend


class Embeddings(nn.Module):
    """LN(word + position + token type)."""

    def __init__(self, config: MiniLMConfig) -> None:
        super().__init__()
        self.word = _table(config.vocab_size, config.hidden_size)
        self.position = _table(config.max_positions, config.hidden_size)
        self.token_type = _table(config.num_token_types, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, batch: PackedBatch, backend: TorchBackend) -> Tensor:
        """`[T]` ids -> `[T, C]`."""
        return backend.embed(batch, self)


class Attention(nn.Module):
    """Multi-head self-attention: query, key and value in one projection, and the output projection."""

    def __init__(self, config: MiniLMConfig) -> None:
        super().__init__()
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)


class FeedForward(nn.Module):
    """Two linear maps, C -> F -> C, with a GELU between."""

    def __init__(self, config: MiniLMConfig) -> None:
        super().__init__()
        self.intermediate = nn.Linear(config.hidden_size, config.feed_forward_size)
        self.output = nn.Linear(config.feed_forward_size, config.hidden_size)


class Layer(nn.Module):
    """Attention with residual and norm, then feed-forward with residual and norm."""

    def __init__(self, config: MiniLMConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x: Tensor, batch: PackedBatch, backend: TorchBackend) -> Tensor:
        """`[T, C]` -> `[T, C]`."""
        x = backend.attention_block(x, self, batch)
        return backend.feed_forward_block(x, self)


@dataclass(frozen=True, eq=False)
class MiniLMOutput:
    """What the encoder returns.

    Attributes:
        last_hidden_state: the last layer's output `[T, C]`.
        hidden_states: the embeddings' output and each layer's, `[T, C]` each (`None` unless asked for).
        attentions: for each layer, each sequence's attention probabilities `[H, L, L]` (`None` unless asked for).
    """

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[list[Tensor], ...] | None = None


class MiniLM(nn.Module):
    """The encoder: a packed batch in, token vectors out.

    Args:
        config: the sizes; the defaults are MiniLM-L6-H384's.
        backend: who computes the operations; see `minilm.kernels.backend.make_backend`.
    """

    layers: Sequence[Layer]

    def __init__(self, config: MiniLMConfig | None = None, backend: str | type[TorchBackend] = "auto") -> None:
        super().__init__()
        self.config = config or MiniLMConfig()
        self.backend = make_backend(backend, self.config)
        self.embeddings = Embeddings(self.config)
        self.layers = nn.ModuleList(Layer(self.config) for _ in range(self.config.num_layers))  # type: ignore[assignment]
        self.apply(_initialise)

    def forward(self, batch: PackedBatch, *, hidden_states: bool = False, attentions: bool = False) -> MiniLMOutput:
        """Token vectors of a packed batch; on request every layer's hidden states and attention probabilities.

        Raises:
            ValueError: a sequence is longer than the position table.
        """
        if batch.max_seqlen > self.config.max_positions:
            raise ValueError(f"expected at most {self.config.max_positions} tokens a sequence, got {batch.max_seqlen}")
        x = self.embeddings(batch, self.backend)
        states, patterns = [x], []
        for layer in self.layers:
            if attentions:
                patterns.append(self.attention_probabilities(layer, x, batch))
            x = layer(x, batch, self.backend)
            if hidden_states:
                states.append(x)
        return MiniLMOutput(x, tuple(states) if hidden_states else None, tuple(patterns) if attentions else None)

    def attention_probabilities(self, layer: Layer, x: Tensor, batch: PackedBatch) -> list[Tensor]:
        """How much each token of each sequence looks at each other in `layer`, given its input x: `[H, L, L]` each."""
        query, key, _ = self.backend.project_heads(x, layer.attention)
        return self.backend.attention_probabilities(query, key, batch)


def _table(rows: int, width: int) -> nn.Embedding:
    """Make an embedding table without initialising it (on the meta device that alone would import torch._dynamo)."""
    table: nn.Embedding = nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)
    return table


def _initialise(module: nn.Module) -> None:
    """BERT's initialisation: weights from N(0, 0.02²), biases 0; LayerNorm is the identity already."""
    if isinstance(module, nn.Linear | nn.Embedding) and not module.weight.is_meta:
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
