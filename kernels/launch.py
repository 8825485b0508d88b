"""A Triton kernel with all it is called with: to launch it, or to compile it ahead of time for a GPU that isn't here.

Each kernel file turns its operands into a `Launch`; the tests, the report and the GPU run the same one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETED: bool = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run on the CPU, slowly, in numpy


@dataclass(frozen=True)
class Hardware:
    """What a kernel's block sizes depend on.

    Attributes:
        architecture: `sm_90` and the like for NVIDIA, `gfx942` and the like for AMD.
        shared_memory: bytes that one program may use.
    """

    architecture: str
    shared_memory: int

    @property
    def has_descriptors(self) -> bool:
        """Whether tiles travel by the copy engine (NVIDIA's Hopper and later)."""
        return self.architecture.startswith("sm_") and int(self.architecture[3:]) >= 90

    @property
    def target(self) -> GPUTarget:
        """The same, in Triton's terms."""
        if self.architecture.startswith("sm_"):
            return GPUTarget("cuda", int(self.architecture[3:]), 32)
        return GPUTarget("hip", self.architecture, 64)


KIB = 1024
SM_80 = Hardware("sm_80", 163 * KIB)  # A100
SM_89 = Hardware("sm_89", 99 * KIB)  # L4, L40S, GeForce 40
SM_90 = Hardware("sm_90", 227 * KIB)  # H100, H200
GFX_942 = Hardware("gfx942", 64 * KIB)  # MI300


def hardware(device: torch.device) -> Hardware:
    """Return what `device` is; the CPU, where only the interpreter runs kernels, stands in for an H100."""
    return _cuda_hardware(device.index or 0) if device.type == "cuda" else SM_90


@functools.cache
def _cuda_hardware(index: int) -> Hardware:
    """Ask the driver."""
    properties: Any = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return Hardware(properties.gcnArchName.split(":")[0], 64 * KIB)
    shared_memory = properties.shared_memory_per_block_optin
    return Hardware(f"sm_{properties.major}{properties.minor}", shared_memory)


@dataclass(frozen=True)
class Launch:
    """One call of a kernel.

    Attributes:
        kernel: a `triton.jit` function.
        grid: how many programs, in up to three dimensions.
        arguments: the kernel's arguments by name, its compile-time constants among them.
        num_warps: warps (of 32 threads; 64 on AMD) a program.
        num_stages: depth of software pipelining.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2

    def __call__(self) -> None:
        """Run the kernel on its tensors' device; nothing to do if the grid is empty."""
        if 0 in self.grid:
            return
        device = next(x.device for x in self.arguments.values() if isinstance(x, Tensor))
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):  # Triton launches on the current device
                self._run()
        else:
            self._run()

    def _run(self) -> None:
        self.kernel[self.grid](
            **self.arguments, num_warps=self.num_warps, num_stages=self.num_stages, enable_fp_fusion=True
        )

    def compile(self, hardware: Hardware) -> Any:
        """Compile for `hardware`, which need not be here, as a launch with these arguments would: no tensor is read.

        Returns:
            Triton's compiled kernel: `.asm` (by stage: ptx, cubin, amdgcn ...) and `.metadata`.

        Raises:
            RuntimeError: kernels are being interpreted in this process (TRITON_INTERPRET=1).
        """
        if INTERPRETED:
            raise RuntimeError("kernels can't be compiled under TRITON_INTERPRET=1: unset it")
        names = list(self.kernel.arg_names)
        signature, constants, attributes = {}, {}, {}
        for index, (name, parameter) in enumerate(zip(names, self.kernel.params, strict=True)):
            value = self.arguments[name]
            special = type(value) is int and not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (special and value == 1):
                signature[name], constants[(index,)] = "constexpr", value
            else:
                signature[name] = _type_name(value)
                if isinstance(value, Tensor) or (special and value % 16 == 0):
                    attributes[(index,)] = [["tt.divisibility", 16]]
        source = triton.compiler.ASTSource(self.kernel, signature, constants, attributes)
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return triton.compile(source, target=hardware.target, options=options)


_DTYPE_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}


def _type_name(value: Any) -> str:
    """Return the Triton type of an argument."""
    if isinstance(value, TensorDescriptor):
        shape = ",".join(map(str, value.block_shape))
        return f"tensordesc<{_DTYPE_NAMES[value.base.dtype]}[{shape}]>"
    if isinstance(value, Tensor):
        return f"*{_DTYPE_NAMES[value.dtype]}"
    if isinstance(value, bool):
        return "u1"
    return "i32" if isinstance(value, int) else "fp32"


def cpu_kernel(launcher: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    """Return what an operation does on the CPU: its kernel where kernels are interpreted, plain torch elsewhere."""
    return launcher if INTERPRETED else reference


def dot_precision(dtype: torch.dtype) -> str:
    """Return how `tl.dot` multiplies float32: exactly, unless torch is told that TF32 will do."""
    if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "tf32"


def block_size(width: int) -> int:
    """Return the smallest power of two that holds `width` columns: Triton's blocks have no other widths."""
    size: int = triton.next_power_of_2(width)
    return size


def row_blocks(width: int) -> dict[str, int]:
    """Return the constants of a kernel that takes whole rows: a program holds about 2,048 numbers at once."""
    return {"C": width, "BLOCK_C": block_size(width), "BLOCK_T": max(1, 2048 // block_size(width))}


def expect_shapes(operation: str, **tensors: tuple[Tensor | None, str]) -> None:
    """Check operands against one another, as in `expect_shapes("linear", x=(x, "T K"), weight=(weight, "N K"))`.

    Equal letters are equal sizes; a number is that size. A tensor that is None is left out. The first tensor gives
    the device that all must be on.

    Raises:
        ValueError: a tensor has another shape, or is on another device; the message gives all shapes.
    """
    sizes: dict[str, int] = {}
    present = {name: (x, shape.split()) for name, (x, shape) in tensors.items() if x is not None}
    devices = {x.device for x, _ in present.values()}
    fits = len(devices) == 1 and all(
        x.dim() == len(shape)
        and all(
            size == (int(letter) if letter.isdecimal() else sizes.setdefault(letter, size))
            for letter, size in zip(shape, x.shape, strict=True)
        )
        for x, shape in present.values()
    )
    if not fits:
        wanted = ", ".join(f"{name} [{', '.join(shape)}]" for name, (_, shape) in present.items())
        got = ", ".join(f"{name} {list(x.shape)} on {x.device}" for name, (x, _) in present.items())
        raise ValueError(f"{operation} expected {wanted} on one device; got {got}")
