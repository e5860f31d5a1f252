"""What a training step does with its gradients: penalise, clip, and update by an optimiser at the step's rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .optimizers import Schedule, rate_at


@dataclass
class StepCount:
    """How many steps a Trainer has taken over its life, those undone after a NaN too."""

    taken: int = 0


@dataclass(frozen=True)
class Update:
    """The update of every step.

    Args:
        optimizer: takes the step.
        l1: times the sign of a weight, added to its gradient: of parameters with at least 2 dimensions that have a
            gradient, so neither of biases nor of frozen weights. The loss that is reported leaves it out.
        clip_norm: scales all gradients by one number so that their norm, all together, is at most this. After l1.
        clip_value: brings each element of a gradient into -clip_value..clip_value. After l1.
        rate: from the step's number, 0 for a Trainer's first, to the learning rate of every group. It replaces what
            `optimizer.param_groups` holds. None: the groups' own rates.
        steps: counts the steps.

    Raises:
        ValueError: l1 is negative or not finite, a limit is not positive and finite, or both limits are given.
    """

    optimizer: Optimizer
    l1: float = 0.0
    clip_norm: float | None = None
    clip_value: float | None = None
    rate: Schedule | None = None
    steps: StepCount = field(default_factory=StepCount)

    def __post_init__(self) -> None:
        if not (isinstance(self.l1, Real) and 0.0 <= self.l1 < math.inf):
            raise ValueError(f"l1 is {self.l1!r}; give a finite number of at least 0")
        for name, limit in (("clip_norm", self.clip_norm), ("clip_value", self.clip_value)):
            if limit is not None and not (isinstance(limit, Real) and 0.0 < limit < math.inf):
                raise ValueError(f"{name} is {limit!r}; give a finite number above 0, or None for no limit")
        if self.clip_norm is not None and self.clip_value is not None:
            raise ValueError("clip_norm and clip_value are both given; leave one of them out")

    def begin(self) -> None:
        """What the host does before each step, a replayed one too: set the step's rate, and count the step.

        Raises:
            ValueError: `rate` gives no number of at least 0.
        """
        if self.rate is not None:
            rate = rate_at(self.rate, self.steps.taken)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
        self.steps.taken += 1

    def rates(self, count: int) -> Tensor:
        """The learning rates of the next `count` steps: float64 [count, groups]. For steps taken as a whole."""
        groups = self.optimizer.param_groups
        if self.rate is None:
            rates = torch.tensor([[float(group["lr"]) for group in groups]], dtype=torch.float64, device="cpu")
            return rates.expand(count, -1).contiguous()
        values = [[rate_at(self.rate, self.steps.taken + step)] * len(groups) for step in range(count)]
        return torch.tensor(values, dtype=torch.float64, device="cpu")

    def advance(self, count: int) -> None:
        """What `begin` does, for `count` steps that were taken at `rates`."""
        if self.rate is not None and count > 0:
            rate = rate_at(self.rate, self.steps.taken + count - 1)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
        self.steps.taken += count

    def apply(self, parameters: Sequence[nn.Parameter]) -> None:
        """Penalise, clip and update, by what `parameters`, all of the model, have for gradients.

        Nothing waits for the device, so that it can be recorded.
        """
        if self.l1 != 0.0:
            _penalise(parameters, self.l1)
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        elif self.clip_value is not None:
            nn.utils.clip_grad_value_(parameters, self.clip_value)
        self.optimizer.step()


@torch.no_grad()
def _penalise(parameters: Sequence[nn.Parameter], l1: float) -> None:
    weights: list[Tensor] = []
    gradients: list[Tensor] = []
    for parameter in parameters:
        if parameter.ndim >= 2 and parameter.grad is not None:
            weights.append(parameter)
            gradients.append(parameter.grad)
    if weights:
        torch._foreach_add_(gradients, torch._foreach_sign(weights), alpha=l1)
