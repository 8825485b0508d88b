"""`PackedBatch`: the one form in which sequences travel through the encoder: real tokens only, end to end.

Dimensions: B sequences, S padded length, T tokens in all. A padded `[B, S]` form exists only at the edge, for those
who bring or want one: `PackedBatch.from_padded` and `PackedBatch.pad`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """B sequences of tokens laid one after the other, without padding.

    Attributes:
        ids: word ids, int64 `[T]`.
        positions: the position of each token in its own sequence, int64 `[T]`.
        type_ids: token types (0, or 1 for the second text of a pair), int64 `[T]`.
        cu_seqlens: where each sequence starts, then T: int32 `[B + 1]`, as variable-length attention kernels take it.
        lengths: the same as B token counts on the host, so that no kernel waits for the device to learn a shape.
    """

    ids: Tensor
    positions: Tensor
    type_ids: Tensor
    cu_seqlens: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def from_sequences(
        cls,
        sequences: Sequence[Sequence[int]],
        type_ids: Sequence[Sequence[int]] | None = None,
        device: torch.device | str | None = None,
    ) -> PackedBatch:
        """Pack lists of word ids, one a sequence; `type_ids` has the same shape and defaults to zeros.

        Raises:
            ValueError: there is no sequence, a sequence is empty, or `type_ids` has other lengths.
        """
        lengths = tuple(map(len, sequences))
        if not lengths or min(lengths) == 0:
            raise ValueError(f"expected at least one sequence and a token in each, got lengths {list(lengths)}")
        if type_ids is not None and tuple(map(len, type_ids)) != lengths:
            raise ValueError("type_ids must have one entry for each token, in sequences of the same lengths")
        starts = _starts(lengths)
        tokens = np.zeros((3, sum(lengths)), dtype=np.int64)
        tokens[0] = np.fromiter(chain.from_iterable(sequences), np.int64, tokens.shape[1])
        tokens[1] = np.arange(tokens.shape[1]) - starts[:-1].repeat(lengths)
        if type_ids is not None:
            tokens[2] = np.fromiter(chain.from_iterable(type_ids), np.int64, tokens.shape[1])
        device = device or "cpu"
        ids, positions, types = torch.from_numpy(tokens).to(device)
        return cls(ids, positions, types, torch.from_numpy(starts).to(device), lengths)

    @classmethod
    def from_padded(
        cls, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> PackedBatch:
        """Pack the tokens where `attention_mask [B, S]` is not 0 of `input_ids [B, S]`.

        A token's position is its column, as in BERT, wherever the padding is.

        Raises:
            ValueError: the shapes differ, or a row has no token.
        """
        if input_ids.dim() != 2 or attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"expected input_ids and attention_mask of one shape [B, S], "
                f"got {list(input_ids.shape)} and {list(attention_mask.shape)}"
            )
        if token_type_ids is not None and token_type_ids.shape != input_ids.shape:
            raise ValueError(f"expected token_type_ids {list(input_ids.shape)}, got {list(token_type_ids.shape)}")
        mask = attention_mask.bool()
        lengths = tuple(mask.sum(dim=1).tolist())
        if not lengths or min(lengths) == 0:
            raise ValueError(f"expected a token in every row of attention_mask, got lengths {list(lengths)}")
        ids = input_ids[mask].long()
        types = torch.zeros_like(ids) if token_type_ids is None else token_type_ids[mask].long()
        starts = torch.from_numpy(_starts(lengths)).to(input_ids.device)
        return cls(ids, mask.nonzero()[:, 1], types, starts, lengths)

    @property
    def num_sequences(self) -> int:
        """B."""
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.ids.shape[0]

    @property
    def max_seqlen(self) -> int:
        """The longest sequence's token count."""
        return max(self.lengths)

    @cached_property
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """Neighbouring sequences of equal length, as (first token row, number of sequences, length): host integers.

        The tokens of a run lie together: `x[row : row + n * L].view(n, L, ...)` is rectangular without a copy.
        """
        runs, row = [], 0
        for length, neighbours in groupby(self.lengths):
            count = sum(1 for _ in neighbours)
            runs.append((row, count, length))
            row += count * length
        return tuple(runs)

    @cached_property
    @torch.inference_mode(False)  # kept for later calls, which may want gradients
    def length_groups(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Sequences of equal length, together: for each length L, (their indices `[n]`, their token rows `[n, L]`).

        Within a group every tensor is rectangular, so plain operations need neither padding nor a mask.
        """
        by_length: dict[int, list[int]] = {}
        for index, length in enumerate(self.lengths):
            by_length.setdefault(length, []).append(index)
        starts = self.cu_seqlens.long()
        groups = []
        for length, members in by_length.items():
            indices = torch.tensor(members, device=self.ids.device)
            rows = starts[indices].unsqueeze(1) + torch.arange(length, device=self.ids.device)
            groups.append((indices, rows))
        return tuple(groups)

    def sequence(self, packed: Tensor, index: int) -> Tensor:
        """The rows `[L, ...]` of sequence `index` in a packed tensor `[T, ...]` (a view)."""
        start = sum(self.lengths[:index])
        return packed[start : start + self.lengths[index]]

    def pad(self, packed: Tensor, value: float = 0) -> tuple[Tensor, Tensor]:
        """Lay a packed tensor `[T, ...]` out as `[B, S, ...]`, filled with `value`; also the bool mask `[B, S]`."""
        mask = torch.arange(self.max_seqlen, device=packed.device) < self.cu_seqlens.diff().unsqueeze(1)
        padded = packed.new_full((*mask.shape, *packed.shape[1:]), value)
        padded[mask] = packed
        return padded, mask

    def to(self, device: torch.device | str) -> PackedBatch:
        """Return the batch with its tensors on `device`."""
        ids, positions, type_ids = self.ids.to(device), self.positions.to(device), self.type_ids.to(device)
        return PackedBatch(ids, positions, type_ids, self.cu_seqlens.to(device), self.lengths)


def _starts(lengths: Sequence[int]) -> NDArray[np.int32]:
    """Cumulative lengths from 0 to T, int32 `[B + 1]`."""
    return np.fromiter(accumulate(lengths, initial=0), np.int32, len(lengths) + 1)
