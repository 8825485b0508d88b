"""A product with its weights laid out ahead of time, for a CPU: y = gelu(W·x + b), or residual + W·x + b.

oneDNN blocks a weight matrix to suit its kernels; torch's `F.linear` does that, or goes without, in every call. Here it
is done once, and the GELU or the sum that follows is computed while a block of the product is still in registers. The
operations are the ones that torch.compile's CPU code calls (`torch.ops.mkldnn`), which are not public: where they are
missing, or do not work, plain torch computes the same, and `missing()` says why.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cache, cached_property
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

Owner = TypeVar("Owner")
Form = TypeVar("Form")

TYPICAL_ROWS = 512  # what the layout is chosen for; any number of rows can be multiplied
FEW_ROWS = 32  # so many, in float32, are multiplied by a plain GEMM with transposed weights, which starts sooner


def reference(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool = False, residual: Tensor | None = None) -> Tensor:
    """The same in plain torch."""
    y = F.linear(x, weight, bias)
    if gelu:
        y = F.gelu(y)
    return y if residual is None else y + residual


class PackedLinear:
    """One linear map, laid out.

    Args:
        weight: `[N, K]`, on a CPU.
        bias: `[N]`.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.dtype = weight.dtype if is_native(weight.dtype) else torch.float32
        self._weight, self._bias = weight.detach().to(self.dtype), bias.detach().to(self.dtype)

    def __call__(self, x: Tensor, residual: Tensor | None = None, *, gelu: bool = False) -> Tensor:
        """Return gelu(W·x + b), or residual + W·x + b, in x's dtype: `[T, K]` -> `[T, N]`."""
        if x.dtype is not self.dtype:  # the CPU does not multiply such numbers: float32 does it
            wide = None if residual is None else residual.to(self.dtype)
            return self(x.to(self.dtype), wide, gelu=gelu).to(x.dtype)
        if x.shape[0] <= FEW_ROWS and self.dtype is torch.float32:
            y = torch.addmm(self._bias, x, self._transposed)
            y = F.gelu(y) if gelu else y
            return y if residual is None else y.add_(residual)
        if missing() is not None:
            return reference(x, self._weight, self._bias, gelu, residual)
        if residual is None:
            return _multiply(x, self._packed, self._bias, "gelu" if gelu else "none", [], "none")
        return _multiply_add(x, residual, self._packed, self._bias, "add")

    @cached_property
    def _transposed(self) -> Tensor:
        """The weight as `[K, N]`."""
        with torch.inference_mode(False), torch.no_grad():
            return self._weight.t().contiguous()

    @cached_property
    def _packed(self) -> Tensor:
        """The weight in oneDNN's layout."""
        with torch.inference_mode(False), torch.no_grad():
            packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(self._weight, TYPICAL_ROWS)
        return packed


def _count_fused_writes(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Move the version counters of what a fused optimizer has just written to; torch's fused steps don't."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            for parameter in group["params"]:
                torch.autograd.graph.increment_version(parameter)


register_optimizer_step_post_hook(_count_fused_writes)


class PackedWeights(Generic[Owner, Form]):
    """Modules' weights laid out (by `pack`) when first asked for, and again when they have changed.

    A change is seen by the tensors' version counters, which a write through `.data` or numpy does not move.
    """

    def __init__(self, pack: Callable[[Owner], Form]) -> None:
        self._pack = pack
        self._packed: dict[int, tuple[list[int], Form]] = {}  # by the owner's id, for as long as the owner lives

    def __call__(self, owner: Owner, *parts: nn.Module) -> Form:
        """Return the packed form of a module as it is now; `parts` are those whose tensors are in it."""
        state: list[int] = []
        for part in parts:
            for tensor in (*part._parameters.values(), part._buffers.get("input_range")):
                if tensor is not None:  # where it is, and how often it was written to (unknown of inference tensors)
                    state += tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
        found = self._packed.get(id(owner))
        if found is not None and found[0] == state:
            return found[1]
        if found is None:
            weakref.finalize(owner, self._packed.pop, id(owner), None)
        form = self._pack(owner)
        self._packed[id(owner)] = state, form
        return form


@cache
def missing() -> str | None:
    """Return why weights can't be laid out here; None if they can."""
    try:
        x, weight, bias = torch.randn(3, 32), torch.randn(64, 32), torch.randn(64)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, TYPICAL_ROWS)
        with torch.inference_mode():
            ours = _multiply(x, packed, bias, "gelu", [], "none"), _multiply_add(x, x @ weight.T, packed, bias, "add")
            plain = reference(x, weight, bias, gelu=True), reference(x, weight, bias, residual=x @ weight.T)
        if not all(torch.allclose(mine, theirs, atol=1e-4) for mine, theirs in zip(ours, plain, strict=True)):
            return f"oneDNN's packed products of torch {torch.__version__} give other results than plain torch here"
    except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
        return (
            f"torch {torch.__version__} has no oneDNN products with packed weights here ({str(error).splitlines()[0]})"
        )
    return None


@cache
def is_native(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies such numbers faster than float32: bfloat16 only with instructions for it."""
    if dtype is torch.bfloat16:
        checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
        return missing() is None and any(check is not None and check() for check in checks)
    return dtype is torch.float32


def _multiply(*operands: Any) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise.default(*operands)
    return y


def _multiply_add(*operands: Any) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(*operands)
    return y
