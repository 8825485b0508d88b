"""What follows a gradient: AdamW over two groups, the learning rate's schedule, and a moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

SCHEDULES = ("linear", "cosine", "constant")


def adamw(
    modules: dict[nn.Module, float], weight_decay: float, *, decay_all: bool = False, epsilon: float = 1e-8
) -> torch.optim.AdamW:
    """Make AdamW (Loshchilov and Hutter 2019) for modules, each with its learning rate.

    Args:
        modules: peak learning rate of each module; what needs no gradient is left out.
        weight_decay: decoupled weight decay.
        decay_all: decay biases and LayerNorms too, which by default (as in BERT) are not.
        epsilon: added to the root of the second moment.
    """
    groups = []
    for module, rate in modules.items():
        trained = [p for p in module.parameters() if p.requires_grad]
        for decays in (True, False):
            parameters = [p for p in trained if (decay_all or p.dim() > 1) == decays]
            if parameters:
                decay = weight_decay if decays else 0.0
                groups.append({"params": parameters, "lr": rate, "peak": rate, "weight_decay": decay})
    return torch.optim.AdamW(groups, eps=epsilon, fused=True)


def schedule_factor(step: int, total_steps: int, warmup_steps: int, schedule: str) -> float:
    """Return what the peak learning rate is multiplied by in a step, counted from 0.

    It rises linearly over `warmup_steps` steps, reaching 1 in the last of them, and then falls to 0 (reached after the
    last step): linearly, or along half a cosine (Loshchilov and Hutter 2017); or it stays at 1 (`constant`).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return (1 + math.cos(math.pi * progress)) / 2 if schedule == "cosine" else 1 - progress


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each group's learning rate to its peak times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


class MovingAverage:
    """An exponential moving average of a module's parameters: a ← d·a + (1 - d)·w after every step.

    d is `decay`, but at most (1 + t) / (10 + t) after t steps, so that the average soon leaves the start behind (as in
    TensorFlow's ExponentialMovingAverage).

    Attributes:
        average: the averaged parameters by name.
        steps: t.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self._parameters.items()}
        self.decay, self.steps = decay, 0

    @torch.no_grad()
    def update(self) -> None:
        """Take up the parameters of now."""
        self.steps += 1
        weight = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, parameter in self._parameters.items():
            self.average[name].lerp_(parameter, weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the module the averaged parameters until the block ends."""
        own = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._put(self.average)
        try:
            yield
        finally:
            self._put(own)

    def state_dict(self) -> dict[str, Any]:
        """Return the average and the step count."""
        return {"average": self.average, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.steps = state["steps"]
        for name, tensor in self.average.items():
            tensor.copy_(state["average"][name])

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])
