"""How kernels are judged: against float64, beside plain torch at the same dtype, in memory full of NaN."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# What an error may be where plain torch happens to make none: a few roundings of the largest entry.
FLOORS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture
def device() -> str:
    """Where kernels run: a GPU where there is one, else the CPU, interpreted."""
    return DEVICE


@pytest.fixture(params=[torch.float16, torch.float32], ids=["float16", "float32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """The dtypes that can be interpreted (Triton's interpreter multiplies bfloat16 wrongly)."""
    return request.param


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what `torch.empty` and its kin return with NaN, so that an entry no kernel writes shows."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoning(getattr(owner, name)))


def _poisoning(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def poisoned(*args: object, **kwargs: object) -> Tensor:
        made = allocate(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() and type(made) is Tensor else made

    return poisoned


@pytest.fixture
def judge() -> Callable[..., None]:
    """flash-attention's tolerance rule: no error above twice plain torch's at the same dtype, plus a floor.

    `judge(ours, plain, exact)` takes a tensor or a sequence of tensors each: ours, plain torch's at the same dtype, and
    the float64 truth. Errors are the largest difference over the largest entry of the truth.
    """

    def check(ours: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor], names: str = "") -> None:
        if isinstance(ours, Tensor):
            ours, plain, exact = [ours], [plain], [exact]
        labels = names.split() or [f"output {index}" for index in range(len(exact))]
        for label, mine, theirs, truth in zip(labels, ours, plain, exact, strict=True):
            assert mine.dtype == theirs.dtype, label
            assert mine.shape == truth.shape, label
            assert torch.isfinite(mine).all(), f"{label} has entries that are not finite, or were never written"
            scale = truth.abs().max().clamp(min=1e-30)
            error, allowed = (float((x.double() - truth).abs().max() / scale) for x in (mine, theirs))
            assert error <= 2 * allowed + FLOORS[mine.dtype], f"{label}: error {error:.2e}, plain torch {allowed:.2e}"

    return check


@pytest.fixture
def overriding() -> Callable[[type, str], tuple[type, list[str]]]:
    """`overriding(backend, operation)`: a subclass with an operation of its own, and a list of the calls to it."""

    def make(backend: type, operation: str) -> tuple[type, list[str]]:
        called: list[str] = []

        def own(self: object, *args: object) -> object:
            called.append(operation)
            return getattr(super(made, self), operation)(*args)

        made = type("Own", (backend,), {operation: own})
        return made, called

    return make
