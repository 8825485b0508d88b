"""What the kernels become on GPUs that need not be here: registers, spills, shared memory.

Triton compiles for any GPU on any machine. Two faults can be seen without running anything: values that don't fit the
registers are spilled to memory, which costs more than most mistakes in an algorithm; and a program that wants more
shared memory than there is can't be launched. Both make a row fail.

On NVIDIA the figures are from the log of the very `ptxas` call that made the machine code, so every report compiles
afresh: a second call would need Triton's own options, and other options spill otherwise. A thread's stack frame is what
counts as spilled. It is the memory that the driver sets aside for each thread, the same that Triton calls `n_spills`
once a kernel is loaded; ptxas's "spill stores" count a slot as often as it is written, and leave out arrays that were
never in registers. On AMD the figures are in the assembly's own metadata, and the memory set aside is the private
segment; scalars that move to unused lanes of vector registers stay on the chip, and are only noted.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import multiprocessing
import os
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton

from minilm.kernels.backend import module_of_file
from minilm.kernels.launch import GFX_942, SM_80, SM_89, SM_90, Hardware, Launch

KERNELS = (
    "attention",
    "attention_backward",
    "embedding",
    "feed_forward",
    "layer_norm",
    "linear",
    "linear_layer_norm",
    "pooling",
)
HARDWARE = {hardware.architecture: hardware for hardware in (SM_80, SM_89, SM_90, GFX_942)}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

# What shows in the code how a kernel multiplies and moves its tiles.
INSTRUCTIONS = {
    "wgmma": "wgmma.mma_async",
    "mma": "mma.sync",
    "mfma": "v_mfma_",
    "TMA": "cp.async.bulk.tensor",
    "ldmatrix": "ldmatrix.sync",
}

_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SERIALIZED = re.compile(r"wgmma\.mma_async instructions are serialized due to (.+?) in the function")


@dataclass(frozen=True)
class Row:
    """One launch, compiled for one GPU at one dtype.

    Attributes:
        kernel: the file in kernels/, or the file it was found in.
        launch: its name among the file's `examples`.
        hardware: the architecture.
        dtype: of the tensors.
        function: the Triton function, with its module.
        tile: the block sizes.
        num_warps: warps a program.
        num_stages: depth of software pipelining.
        registers: a thread's.
        spilled: bytes of a thread's values that are kept in memory for want of registers.
        shared_memory: bytes a program uses.
        shared_memory_limit: bytes it may use.
        instructions: those of `INSTRUCTIONS` that occur.
        seconds: what the compilation took.
        note: what is worth knowing, though no fault.
        failure: why this can't stay as it is, if so.
    """

    kernel: str
    launch: str
    hardware: str
    dtype: str
    function: str = ""
    tile: str = ""
    num_warps: int = 0
    num_stages: int = 0
    registers: int | None = None
    spilled: int | None = None
    shared_memory: int | None = None
    shared_memory_limit: int = 0
    instructions: str = ""
    seconds: float = 0.0
    note: str | None = None
    failure: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the kernel compiles, spills nothing and fits the shared memory."""
        return self.failure is None


def compile_rows(
    kernels: Sequence[str] = KERNELS,
    hardware: Sequence[str] = tuple(HARDWARE),
    dtypes: Sequence[str] = tuple(DTYPES),
    jobs: int | None = None,
) -> tuple[int, Iterator[Row]]:
    """Compile every launch that the kernels give as an example, in processes of their own.

    Args:
        kernels: names in `KERNELS`, or paths of Python files that have a function `examples(dtype, hardware)`.
        hardware: names in `HARDWARE`.
        dtypes: names in `DTYPES`.
        jobs: how many processes; by default one a processor, at most 8.

    Returns:
        How many rows there will be, and the rows in order, each once it is ready.

    Raises:
        ValueError: a kernel that is neither, or gives no examples.
        ImportError, OSError: a file that can't be imported.
    """
    tasks = [task for kernel in kernels for task in _tasks(kernel, hardware, dtypes)]
    useful = min(math.ceil(len(tasks) / 4), 8)  # a process starts in the time of a few compilations
    return len(tasks), _run(tasks, jobs or max(1, min(useful, len(os.sched_getaffinity(0)))))


def compile_row(row: Row, launch: Launch, hardware: Hardware) -> Row:
    """Compile one launch, here and now, and fill in the rest of its row."""
    tile = " ".join(f"{name[6:]}{size}" for name, size in launch.arguments.items() if name.startswith("BLOCK_"))
    row = replace(
        row,
        function=f"{launch.kernel.__module__}.{launch.kernel.__name__}",
        tile=tile,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        shared_memory_limit=hardware.shared_memory,
    )
    start = time.perf_counter()
    try:
        compiled, log = _compile(launch, hardware)
        on_nvidia = "ptx" in compiled.asm
        registers, spilled, note = _nvidia_usage(log) if on_nvidia else _amd_usage(compiled.asm["amdgcn"])
    except Exception as error:  # whatever stops a compilation is the row's result
        seconds = time.perf_counter() - start
        return replace(row, seconds=seconds, failure=f"{type(error).__name__}: {' '.join(str(error).split())}")
    row = replace(
        row,
        registers=registers,
        spilled=spilled,
        seconds=time.perf_counter() - start,
        shared_memory=compiled.metadata.shared,
        instructions=_instructions(compiled.asm["ptx" if on_nvidia else "amdgcn"]),
        note=note,
    )
    return replace(row, failure=_fault(row))


def _compile(launch: Launch, hardware: Hardware) -> tuple[Any, str]:
    """Compile afresh, and return the kernel and what `ptxas` said of it."""
    with (
        triton.knobs.compilation.scope(),
        triton.knobs.nvidia.scope(),
        contextlib.redirect_stdout(io.StringIO()) as log,  # where Triton shows it
    ):
        triton.knobs.compilation.always_compile = True
        triton.knobs.nvidia.dump_ptxas_log = True
        compiled = launch.compile(hardware)
    return compiled, log.getvalue()


def _nvidia_usage(log: str) -> tuple[int, int, str | None]:
    """Read registers and spilled bytes from the log of ptxas, and whether products on tensor cores wait for others."""
    registers, frames = _REGISTERS.findall(log), _FRAME.findall(log)
    if not (registers and frames):
        raise RuntimeError(f"the log of ptxas doesn't tell the registers and the stack frame: {log!r}")
    reasons = "; ".join(dict.fromkeys(_SERIALIZED.findall(log)))
    note = f"each wgmma waits for the one before: {reasons}" if reasons else None
    return max(map(int, registers)), max(int(frame) or int(stores) for frame, stores in frames), note


def _amd_usage(assembly: str) -> tuple[int, int, str | None]:
    """Read registers and spilled bytes from the metadata at the end of AMD's assembly."""
    numbers = {name: int(number) for name, number in re.findall(r"^[ -]+\.(\w+): +(\d+)$", assembly, re.MULTILINE)}
    scalars = numbers["sgpr_spill_count"]
    note = f"{scalars} scalars are kept in vector registers" if scalars else None
    return numbers["vgpr_count"], numbers["private_segment_fixed_size"], note


def _instructions(code: str) -> str:
    """Name the instructions of `INSTRUCTIONS` that occur."""
    return " ".join(name for name, text in INSTRUCTIONS.items() if text in code)


def _fault(row: Row) -> str | None:
    """Say what is wrong with a kernel that was compiled."""
    faults = []
    if row.spilled:
        faults.append(f"spills {row.spilled} bytes")
    if row.shared_memory is not None and row.shared_memory > row.shared_memory_limit:
        faults.append(f"wants {row.shared_memory} bytes of shared memory, {row.hardware} has {row.shared_memory_limit}")
    return "; ".join(faults) or None


# Which launches there are, and the processes that compile them. A launch can't be sent to another process, so a row
# that is still to be filled in names it, and that process makes it anew.


def _examples(row: Row) -> dict[str, Launch]:
    """Return the launches of a row's kernel, for its hardware and dtype."""
    if row.kernel in KERNELS:
        module = importlib.import_module(f"minilm.kernels.{row.kernel}")
    else:
        module = module_of_file(Path(row.kernel).resolve())
    if not hasattr(module, "examples"):
        raise ValueError(f"{row.kernel} has no function examples(dtype, hardware)")
    examples: dict[str, Launch] = module.examples(DTYPES[row.dtype], HARDWARE[row.hardware])
    return examples


def _tasks(kernel: str, hardware: Sequence[str], dtypes: Sequence[str]) -> list[Row]:
    """Return a row to be filled in for each of a kernel's launches; those of one launch are neighbours."""
    if kernel not in KERNELS and not kernel.endswith(".py"):
        raise ValueError(f"unknown kernel {kernel!r}: expected {', '.join(KERNELS)}, or path/to/file.py")
    rows = [Row(kernel, "", name, dtype) for name in hardware for dtype in dtypes]
    tasks = [replace(row, launch=launch) for row in rows for launch in _examples(row)]
    launches = list(dict.fromkeys(task.launch for task in tasks))
    return sorted(tasks, key=lambda task: launches.index(task.launch))


def _fill_in(task: Row) -> Row:
    """Make a row's launch, and compile it."""
    return compile_row(task, _examples(task)[task.launch], HARDWARE[task.hardware])


def _pool(jobs: int) -> ProcessPoolExecutor:
    """Return processes that start afresh: where there are threads, a fork's child may wait for them forever."""
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))


def _run(tasks: Sequence[Row], jobs: int) -> Iterator[Row]:
    """Fill in rows, in order; a compilation that crashes its process, and the others' with it, costs one row."""
    waiting = list(tasks)
    while waiting:
        pool = _pool(jobs)
        try:
            for future in [pool.submit(_fill_in, task) for task in waiting]:
                row = future.result()
                del waiting[0]
                yield row
        except BrokenProcessPool:
            yield _run_alone(waiting.pop(0))  # either it crashes again, or it was another one
        finally:
            pool.shutdown(cancel_futures=True)


def _run_alone(task: Row) -> Row:
    """Fill in a row in a process of its own, which may crash."""
    with _pool(1) as pool:
        try:
            return pool.submit(_fill_in, task).result()
        except BrokenProcessPool:
            return replace(task, failure="the compiler crashed")
