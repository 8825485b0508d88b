"""MiniLM: a BERT-style post-LayerNorm encoder over packed tokens.

    x = LN(word + position + token type)
    six times:  x = LN(x + attention(x));  x = LN(x + feed_forward(x))

Dimensions: T tokens, B sequences, C hidden, F feed-forward, H heads. The parameters live here; what is computed with
them is the backend's (`minilm.kernels.torch_backend` holds the formulas). Sources: Devlin et al. 2019 (BERT), Wang et
al. 2020 (MiniLM); sizes of `nreimers/MiniLM-L6-H384-uncased`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minilm.batch import PackedBatch
from minilm.config import MiniLMConfig
from minilm.kernels.backend import BackendChoice, BackendError, backend_class, make_backend
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


class Linear(nn.Linear):
    """W·x + b, and what range each channel of x takes on ordinary text, which 8-bit arithmetic goes by.

    Attributes:
        input_range: the least and greatest value of each input channel, float32 `[2, K]`; None where never measured.
    """

    input_range: Tensor | None

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("input_range", None, persistent=False)


class Attention(nn.Module):
    """Multi-head self-attention: query, key and value in one projection, and the output projection."""

    def __init__(self, config: MiniLMConfig) -> None:
        super().__init__()
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size)
        self.output = Linear(config.hidden_size, config.hidden_size)


class FeedForward(nn.Module):
    """Two linear maps, C -> F -> C, with a GELU between."""

    def __init__(self, config: MiniLMConfig) -> None:
        super().__init__()
        self.intermediate = Linear(config.hidden_size, config.feed_forward_size)
        self.output = Linear(config.feed_forward_size, config.hidden_size)


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
        output_width: D, of the output layer; None, as most models have it, for none.

    Attributes:
        output_layer: a linear map without bias `[D, C]` from a text's pooled vector to the one that is given, or None.
            `minilm.embed.pooled_vectors` applies it; token vectors don't depend on it.
    """

    layers: Sequence[Layer]
    output_layer: nn.Linear | None

    def __init__(
        self, config: MiniLMConfig | None = None, backend: BackendChoice = "auto", output_width: int | None = None
    ) -> None:
        super().__init__()
        self.config = config or MiniLMConfig()
        if backend != "auto":
            backend_class(backend)  # what is no backend at all is an error now; whether it runs, where it is to run
        self._choices: dict[object, BackendChoice | TorchBackend] = {None: backend}  # and those of `with` blocks
        self._backends: dict[tuple[BackendChoice, str], TorchBackend] = {}
        self.embeddings = Embeddings(self.config)
        self.layers = nn.ModuleList(Layer(self.config) for _ in range(self.config.num_layers))  # type: ignore[assignment]
        self.output_layer = None if output_width is None else nn.Linear(self.config.hidden_size, output_width, False)
        self.apply(_initialise)
        if not self.embeddings.word.weight.is_meta:
            with suppress(BackendError):  # made now if it runs here, as torch.compile can't trace its making
                self.backend_on(self.embeddings.word.weight.device.type)

    def forward(self, batch: PackedBatch, *, hidden_states: bool = False, attentions: bool = False) -> MiniLMOutput:
        """Token vectors of a packed batch; on request every layer's hidden states and attention probabilities.

        Raises:
            ValueError: a sequence is longer than the position table.
        """
        if batch.max_seqlen > self.config.max_positions:
            raise ValueError(f"expected at most {self.config.max_positions} tokens a sequence, got {batch.max_seqlen}")
        backend = self.backend
        whole = None if hidden_states or attentions else backend.whole(batch, self)
        if whole is not None:
            return MiniLMOutput(whole)
        x = self.embeddings(batch, backend)
        states, patterns = [x], []
        for layer in self.layers:
            if attentions:
                patterns.append(self.attention_probabilities(layer, x, batch))
            x = layer(x, batch, backend)
            if hidden_states:
                states.append(x)
        return MiniLMOutput(x, tuple(states) if hidden_states else None, tuple(patterns) if attentions else None)

    @property
    def vector_size(self) -> int:
        """The width of a text's vector: D with an output layer, else C."""
        return self.config.hidden_size if self.output_layer is None else self.output_layer.out_features

    @property
    def backend(self) -> TorchBackend:
        """Who computes the operations, on the device that the parameters are on."""
        return self.backend_on(self.embeddings.word.weight.device.type)

    def backend_on(self, device: str) -> TorchBackend:
        """Return who would compute the operations on a kind of device.

        Raises:
            BackendError: the backend asked for can't run there.
        """
        choice = self.backend_choices[-1]
        if isinstance(choice, TorchBackend):
            return choice
        made = self._backends.get((choice, device))
        return made or self._backends.setdefault((choice, device), make_backend(choice, self.config, device))

    @property
    def backend_choices(self) -> tuple[BackendChoice | TorchBackend, ...]:
        """What was asked for when it was made, then in each `use_backend` block it is in: the last one holds."""
        return tuple(self._choices.values())

    @contextmanager
    def use_backend(self, choice: BackendChoice | TorchBackend) -> Iterator[TorchBackend]:
        """Compute with another backend within a `with` block; other threads that use this model do so as well.

        Args:
            choice: as `make_backend` takes it, or a backend made already.

        Raises:
            BackendError: it can't run here; the block is not entered.
        """
        block = object()
        self._choices[block] = choice
        try:
            yield self.backend
        finally:
            del self._choices[block]

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles make backends of their own: some hold what can't leave the process."""
        choices = {key: choice for key, choice in self._choices.items() if not isinstance(choice, TorchBackend)}
        return {**super().__getstate__(), "_backends": {}, "_choices": choices}  # type: ignore[no-untyped-call]

    def attention_probabilities(self, layer: Layer, x: Tensor, batch: PackedBatch) -> list[Tensor]:
        """How much each token of each sequence looks at each other in `layer`, given its input x: `[H, L, L]` each."""
        query, key, _ = self.backend.project_heads(x, layer.attention)
        return self.backend.attention_probabilities(query, key, batch)


def floating_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return the dtype of a name such as `bfloat16`.

    Raises:
        ValueError: it is no floating point type.
    """
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not (isinstance(chosen, torch.dtype) and chosen.is_floating_point):
        raise ValueError(f"dtype must be a floating point type such as 'float32' or 'bfloat16', got {dtype!r}")
    return chosen


def _table(rows: int, width: int) -> nn.Embedding:
    """Make an embedding table without initialising it (on the meta device that alone would import torch._dynamo)."""
    table: nn.Embedding = nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)
    return table


def _initialise(module: nn.Module) -> None:
    """BERT's initialisation: weights from N(0, 0.02²), biases 0; LayerNorm is the identity already."""
    if isinstance(module, nn.Linear | nn.Embedding) and not module.weight.is_meta:
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
