"""Data parallel training under `torchrun`: each process encodes its share of a batch, and all see the whole loss.

A batch is cut into consecutive shares. Vectors are gathered, so that every process computes the loss of the whole
batch, with all its negatives; the gradient flows back into its own rows. Summed over processes, these are the gradients
of one process with the whole batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn


@contextmanager
def process_group(device: torch.device | str) -> Iterator[None]:
    """Join the other processes that `torchrun` started, if it did, until the block ends.

    Communication is by NCCL between GPUs, else by gloo. A group that exists already is used, and left as it is.
    """
    if dist.is_initialized() or started_with() == 1:
        yield
        return
    dist.init_process_group("nccl" if torch.device(device).type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def local_device() -> str | None:
    """Return the GPU that `torchrun` means for this process; None without `torchrun` or without GPUs."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if local is not None and torch.cuda.is_available() else None


def started_as() -> int:
    """Return the number that `torchrun` gave this process, in a group or not; 0 without `torchrun`."""
    return int(os.environ.get("RANK", "0"))


def started_with() -> int:
    """Count the processes that `torchrun` started, in a group or not; 1 without `torchrun`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return this process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Count the processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(rows: int, process: int | None = None) -> slice:
    """Return which rows of a batch are a process's own (this one's, by default): all of them if there is only one."""
    process, count = rank() if process is None else process, world_size()
    return slice(rows * process // count, rows * (process + 1) // count)


def gather(own: Tensor, rows: int) -> Tensor:
    """Put the shares of all processes together: `own [share, ...]` -> `[rows, ...]`, with a gradient in `own`."""
    if world_size() == 1:
        return own
    places = [share(rows, process) for process in range(world_size())]
    sizes = [place.stop - place.start for place in places]
    padded = own.new_zeros(max(sizes), *own.shape[1:])
    padded[: len(own)] = own.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    shares = [part[:size] for part, size in zip(parts, sizes, strict=True)]
    shares[rank()] = own
    return torch.cat(shares)


def reduce_gradients(encoder: Iterable[nn.Parameter], objective: Iterable[nn.Parameter]) -> None:
    """Bring every process's `.grad` to that of the whole batch.

    The encoder's are summed, as each process has its own rows' part. The objective saw all rows everywhere: its
    gradients are equal but for rounding, and are averaged so that they stay equal to the bit.
    """
    if world_size() == 1:
        return
    for parameters, divisor in ((encoder, 1), (objective, world_size())):
        wanted = [parameter for parameter in parameters if parameter.requires_grad]
        if not wanted:
            continue
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in wanted]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= divisor
        parts = flat.split([p.numel() for p in wanted])
        for parameter, part in zip(wanted, parts, strict=True):
            parameter.grad = part.view_as(parameter)


def wait_for_all() -> None:
    """Return when every process has come this far."""
    if dist.is_initialized():
        dist.barrier()
