"""What this machine can do at most, measured in the same run: matrix products, and on a GPU moving bytes.

It takes its turns like any engine; the largest of the matrix products is the peak that engines are held against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from minilm.bench.engines import Engine
from minilm.bench.workloads import Workload

if TYPE_CHECKING:
    from torch import Tensor

GPU_SIZE = 8_192  # of the square matrices
CPU_ROWS = (512, 4_096)  # times the feed-forward's first matrix
COPY_BYTES = 1 << 30
L2_SHARE = 0.3  # of the L2 cache, read and written over and over
L2_REPEATS = 50  # in one CUDA graph, so that launches cost little

FLOPS, BYTES = "FLOP/s", "B/s"


class Machine(Engine):
    """The machine itself; its dtypes are those of all engines, joined by commas.

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
        """Matrix products by the shapes of the model, in plain torch and, in float32, with prepacked weights."""
        import torch
        import torch.nn.functional as F  # noqa: N812 - torch's own convention

        width, inner = self.plan["config"]["hidden_size"], self.plan["config"]["feed_forward_size"]
        for dtype in self.choice.dtype.split(","):
            for rows in CPU_ROWS:
                x, weight = (torch.randn(n, width, dtype=getattr(torch, dtype)) for n in (rows, inner))
                amount, shape = 2.0 * rows * width * inner, f"{rows}x{width}x{inner} {dtype}"
                yield f"F.linear {shape}", (partial(F.linear, x, weight), amount, FLOPS, dtype)
                prepacked = _prepacked(x, weight) if dtype == "float32" else None
                if prepacked:
                    yield f"oneDNN prepacked {shape}", (prepacked, amount, FLOPS, dtype)

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


def _prepacked(x: Tensor, weight: Tensor) -> Callable[[], Any] | None:
    """Return the same product by oneDNN with its weights packed ahead, None where this torch has no such thing."""
    import torch

    operations: Any = torch.ops.mkldnn
    try:
        packed = operations._reorder_linear_weight(weight, x.shape[0])

        def product() -> Tensor:
            result: Tensor = operations._linear_pointwise(x, packed, None, "none", [], "")
            return result

        same = torch.allclose(product(), x @ weight.T, atol=1e-2)
    except (AttributeError, RuntimeError):
        return None
    return product if same else None
