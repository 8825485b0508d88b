"""Plain torch for training: the same formulas, on batches whose sequences of equal length lie together.

Where plain torch gathers the tokens of each length and scatters the results, this takes them as they lie: a fifth
faster, forward and backward, on a CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from minilm.config import MiniLMConfig
from minilm.kernels.backend import AUTOMATIC, BackendError, backend_class
from minilm.kernels.operands import Packed
from minilm.kernels.torch_backend import REDUCTIONS, TorchBackend

logger = logging.getLogger(__name__)


class ContiguousBackend(TorchBackend):
    """Plain torch, with attention and pooling on views of each run of equal lengths. Differentiable; any device."""

    name = "contiguous"

    def attention(self, query: Tensor, key: Tensor, value: Tensor, batch: Packed, dropout: float = 0.0) -> Tensor:
        """softmax(q·kᵀ / √D)·v within each sequence: three of `[T, H, D]` -> `[T, H, D]`.

        On a CPU in float32 whatever the precision: the backward pass of torch's own there takes several times as long
        in bfloat16.
        """
        contexts, dtype = [], query.dtype
        if query.device.type == "cpu":
            query, key, value = (x.to(torch.promote_types(dtype, torch.float32)) for x in (query, key, value))
        for q, k, v in zip(*(_runs(x, batch) for x in (query, key, value)), strict=True):  # [n, L, H, D]
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [n, H, L, D]
            with torch.autocast(q.device.type, enabled=False):
                context = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
            contexts.append(context.transpose(1, 2).flatten(0, 1))
        return torch.cat(contexts).to(dtype)

    def pool(
        self, hidden_states: Sequence[Tensor], batch: Packed, pooling: str, first: int = 0, normalize: bool = False
    ) -> Tensor:
        """Token vectors -> one vector a sequence: `[B, C]`, float32 at least."""
        if pooling not in REDUCTIONS:
            return super().pool(hidden_states, batch, pooling, first, normalize)  # which says so
        x, other = hidden_states[-1], self.second_state(hidden_states, pooling, first)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        x = x if other is None else (x + other) / 2
        pooled = torch.cat([REDUCTIONS[pooling](run) for run in _runs(x, batch)])
        return F.normalize(pooled, dim=-1) if normalize else pooled


def training_backend(config: MiniLMConfig, device: str) -> type[TorchBackend]:
    """Return who computes in training: on a GPU the kernels that `auto` takes there, else plain torch.

    Where a GPU is to do without the kernels, a warning says why: plain torch takes many times as long there.
    """
    if device == "cpu" or device not in AUTOMATIC:
        return ContiguousBackend
    if config.attention_dropout:
        reason = "they leave out attention dropout, which this model has (a recipe's model.dropout = 0.0 turns it off)"
    else:
        try:
            found = backend_class(AUTOMATIC[device])
        except BackendError as error:
            reason = str(error)
        else:
            missing = found.unavailable(config, device) or (None if found.differentiable else "they have no gradients")
            if missing is None:
                return found
            reason = missing
    logger.warning("training on %s without the kernels, in plain torch: %s", device, reason)
    return ContiguousBackend


def _runs(x: Tensor, batch: Packed) -> list[Tensor]:
    """Views of `[T, ...]`, one for each run of n sequences of length L: `[n, L, ...]`."""
    rows = x.split([n * length for _, n, length in batch.runs])
    return [part.unflatten(0, (n, length)) for part, (_, n, length) in zip(rows, batch.runs, strict=True)]
