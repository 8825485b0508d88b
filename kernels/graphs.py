"""CUDA graphs: what runs the same kernels on the same memory again and again is launched as one.

A graph fixes shapes and addresses, so batches are padded to one of a few token counts ("buckets") with tokens that
belong to no sequence, and copied into tensors of the graph's own. All graphs share one memory pool, so that together
they take about what the largest needs.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minilm.kernels.operands import Packed

BUCKETS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)  # tokens

Compute = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass
class _Recorded:
    """One graph, what it reads and what it writes."""

    replay: Callable[[], object]
    ids: Tensor
    type_ids: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    out: Tensor


class EncoderGraphs:
    """The whole encoder as CUDA graphs, one for each bucket, recorded on first use.

    Safe to use from many threads and streams: one batch at a time goes through a graph.

    Args:
        limit: the largest number of tokens that goes through a graph; more are worth their launches.
    """

    def __init__(self, limit: int = BUCKETS[-1]) -> None:
        self.buckets = tuple(bucket for bucket in BUCKETS if bucket <= limit)
        self._recorded: dict[int, _Recorded] = {}
        self._read: tuple[int, ...] = ()
        self._pool: Any = None  # what torch.cuda.graph_pool_handle returns
        self._done: torch.cuda.Event | None = None  # of the latest replay: the graphs share memory, whatever the stream
        self._lock = threading.Lock()

    def covers(self, num_tokens: int) -> bool:
        """Whether a batch of so many tokens goes through a graph, here and now."""
        return (
            bool(self.buckets)
            and num_tokens <= self.buckets[-1]
            and not torch.compiler.is_compiling()
            and not torch.cuda.is_current_stream_capturing()
        )

    def run(self, batch: Packed, weights: Sequence[Tensor], compute: Compute) -> Tensor:
        """Return `compute(ids, type_ids, positions, cu_seqlens)`, `[T, C]`, through a graph.

        Args:
            batch: what to compute on.
            weights: what `compute` reads besides; where one has moved in memory, all graphs are recorded anew.
            compute: launches kernels only; rows beyond `cu_seqlens[-1]` of its result are dropped.
        """
        with self._lock:
            self._forget_if_moved(weights)
            bucket = self.buckets[bisect_left(self.buckets, batch.num_tokens)]
            recorded = self._recorded.get(bucket)
            if recorded is None:
                recorded = self._recorded[bucket] = self._record(bucket, batch.ids.device, compute)
            return self._replay(recorded, batch)

    def warm_up(self, device: torch.device, weights: Sequence[Tensor], compute: Compute) -> None:
        """Record the graphs of all buckets now, the largest first, so that no batch waits for it."""
        with self._lock:
            self._forget_if_moved(weights)
            for bucket in reversed(self.buckets):
                if bucket not in self._recorded:
                    self._recorded[bucket] = self._record(bucket, device, compute)

    def _forget_if_moved(self, weights: Sequence[Tensor]) -> None:
        """Drop graphs that would read the weights where they were."""
        now = tuple(weight.data_ptr() for weight in weights)
        if now != self._read:
            self._recorded.clear()
            self._read, self._pool, self._done = now, None, None

    @torch.inference_mode(False)  # tensors made in that mode could not be written to outside it
    @torch.no_grad()
    def _record(self, bucket: int, device: torch.device, compute: Compute) -> _Recorded:
        """Run once (kernels are compiled then), and record."""
        ids, type_ids, positions = torch.zeros(3, bucket, dtype=torch.int64, device=device).unbind()
        cu_seqlens = torch.full((bucket + 1,), bucket, dtype=torch.int32, device=device)
        cu_seqlens[0] = 0
        with torch.cuda.device(device):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                out = torch.empty_like(compute(ids, type_ids, positions, cu_seqlens))
            torch.cuda.current_stream().wait_stream(side)
            replay = capture(lambda: out.copy_(compute(ids, type_ids, positions, cu_seqlens)), self._pool)
        return _Recorded(replay, ids, type_ids, positions, cu_seqlens, out)

    def _replay(self, recorded: _Recorded, batch: Packed) -> Tensor:
        """Copy the batch in, run, copy the result out."""
        num_tokens, num_bounds = batch.num_tokens, len(batch.lengths) + 1
        with torch.cuda.device(batch.ids.device):
            if self._done is not None:
                torch.cuda.current_stream().wait_event(self._done)
            recorded.ids[:num_tokens].copy_(batch.ids)
            recorded.type_ids[:num_tokens].copy_(batch.type_ids)
            recorded.positions[:num_tokens].copy_(batch.positions)
            recorded.cu_seqlens[:num_bounds].copy_(batch.cu_seqlens)
            recorded.cu_seqlens[num_bounds:].fill_(num_tokens)
            recorded.replay()
            result = recorded.out[:num_tokens].clone()
            self._done = torch.cuda.Event()
            self._done.record()
        return result


def capture(step: Callable[[], object], pool: Any) -> Callable[[], object]:
    """Record what `step` launches, its memory from `pool`, and return what launches it again."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        step()
    replay: Callable[[], object] = graph.replay
    return replay
