"""What this machine can do at most, measured in the same run: matrix products, and on a GPU moving bytes.

It takes its turns like any engine; the largest of the matrix products is the peak that engines are held against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

from minilm.bench.engines import Engine
from minilm.bench.workloads import Workload

if TYPE_CHECKING:
    from torch import Tensor

GPU_SIZE = 8_192  # of the square matrices
CPU_ROWS = (512, 4_096)  # times the matrices of the feed-forward block
CPU_PRECISIONS = ("float32", "bfloat16", "int8")
LARGEST_ERROR = 0.05  # of a product in int8, relative to its norm
COPY_BYTES = 1 << 30
L2_SHARE = 0.3  # of the L2 cache, read and written over and over
L2_REPEATS = 50  # in one CUDA graph, so that launches cost little

FLOPS, BYTES = "FLOP/s", "B/s"


class Machine(Engine):
    """The machine itself; its dtypes are those to measure, joined by commas.

    Attributes:
        ceilings: by name: the call, the work in it, the unit of its rate, the dtype.
    """

    kinds = ("ceiling",)
    ceilings: dict[str, tuple[Callable[[], Any], float, str, str]]

    def imports(self) -> None:
        """See `Engine`."""
        import torch  # noqa: F401

    def load(self) -> None:
        """Make the operands."""
        on_gpu = self.choice.device.startswith("cuda")
        self.ceilings = dict(self._gpu() if on_gpu else self._cpu())

    def call(self, workload: Workload, rotation: int) -> Callable[[], Any]:  # noqa: ARG002
        """See `Engine`."""
        return self.ceilings[workload.name][0]

    def own_workloads(self) -> list[Workload]:
        """See `Engine`."""
        return [Workload(name, "ceiling", name) for name in self.ceilings]

    def facts(self) -> dict[str, Any]:
        """Return each ceiling's amount of work a call, unit and dtype."""
        return {
            name: {"amount": amount, "unit": unit, "dtype": dtype}
            for name, (_, amount, unit, dtype) in self.ceilings.items()
        }

    def _cpu(self) -> Iterator[tuple[str, tuple[Callable[[], Any], float, str, str]]]:
        """Matrix products by the shapes of the model: plain torch's, and oneDNN's with weights packed ahead."""
        import torch

        width, inner = self.plan["config"]["hidden_size"], self.plan["config"]["feed_forward_size"]
        for precision in self.choice.dtype.split(","):
            methods = (
                {"oneDNN in int8": _int8} if precision == "int8" else {"F.linear": _linear, "oneDNN packed": _packed}
            )
            for (method, make), rows, (k, n) in product(methods.items(), CPU_ROWS, ((width, inner), (inner, width))):
                x, weight = torch.randn(rows, k), torch.randn(n, k)
                try:
                    call = make(x, weight, precision)
                    error = float((call().float() - x @ weight.T).norm() / (x @ weight.T).norm())
                except (AttributeError, RuntimeError):  # this torch, or this CPU, has no such thing
                    continue
                if error < LARGEST_ERROR:
                    yield f"{method}, {rows}x{k}x{n} {precision}", (call, 2.0 * rows * k * n, FLOPS, precision)

    def _gpu(self) -> Iterator[tuple[str, tuple[Callable[[], Any], float, str, str]]]:
        """Square matrix products of random numbers (zeros are faster), a large copy, and one within the L2 cache."""
        import torch

        from minilm.bench.gpu import graphed

        device = self.choice.device
        for dtype in self.choice.dtype.split(","):
            a, b = (torch.randn(GPU_SIZE, GPU_SIZE, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
            yield (
                f"matrix product {GPU_SIZE}^3 {dtype}",
                (partial(torch.matmul, a, b), 2.0 * GPU_SIZE**3, FLOPS, dtype),
            )
        source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device).random_()
        target = torch.empty_like(source)
        yield f"copy of {COPY_BYTES >> 20} MiB", (lambda: target.copy_(source), 2.0 * COPY_BYTES, BYTES, "")
        properties: Any = torch.cuda.get_device_properties(device)
        size = int(getattr(properties, "L2_cache_size", 40 << 20) * L2_SHARE) // 2 // 4
        x = torch.randn(size, device=device)
        y = torch.empty_like(x)

        def repeat() -> None:
            for _ in range(L2_REPEATS):
                torch.neg(x, out=y)

        yield f"L2 cache, {size * 8 >> 20} MiB", (graphed(repeat), 8.0 * size * L2_REPEATS, BYTES, "")


def _linear(x: Tensor, weight: Tensor, dtype: str) -> Callable[[], Tensor]:
    """Return plain torch's `x @ weight.T`."""
    import torch
    import torch.nn.functional as F  # noqa: N812 - torch's own convention

    return partial(F.linear, *(operand.to(getattr(torch, dtype)) for operand in (x, weight)))


def _packed(x: Tensor, weight: Tensor, dtype: str) -> Callable[[], Tensor]:
    """Return the same by oneDNN, with weights packed ahead; RuntimeError or AttributeError where there is no such."""
    import torch

    operations: Any = torch.ops.mkldnn
    x, weight = (operand.to(getattr(torch, dtype)) for operand in (x, weight))
    weight = operations._reorder_linear_weight(weight, x.shape[0])
    return partial(operations._linear_pointwise, x, weight, None, "none", [], "")


def _int8(x: Tensor, weight: Tensor, _: str) -> Callable[[], Tensor]:
    """Return the same by oneDNN in 8 bits: one scale for `x`, one an output of `weight`; float32 comes out.

    `x` has its zero where the int8 backend's activations have it: CPUs multiply unsigned by signed integers, and for
    signed ones oneDNN may have no more than its reference, thousands of times slower.
    """
    import torch

    from minilm.kernels.int8_linear import zero_point

    operations: Any = torch.ops.onednn
    zero = zero_point()
    scale, scales = float(x.abs().max()) / (zero - 1), weight.abs().amax(dim=1) / 127
    small_x = ((x / scale).round() + zero).to(torch.uint8)
    small_weight = (weight / scales[:, None]).round().to(torch.int8)
    packed = operations.qlinear_prepack(small_weight, list(x.shape))
    zeros = torch.zeros(len(weight), dtype=torch.int64)
    operands = (small_x, scale, zero, packed, scales, zeros, None)
    return partial(operations.qlinear_pointwise, *operands, 1.0, 0, torch.float32, "none", [], "")
