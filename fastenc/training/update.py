"""What a training step does with its gradients: penalise, clip, and update by an optimiser at the step's rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Real

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from .optimizers import RateFunction, rate_at


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
        factor: from the step's number to what the rate that each group had before its first step is times. Not together
            with rate.
        accumulate: how many batches give their gradients to one update.
        scaler: scales the loss up before the backward pass, for gradients in float16, and the gradients down after it.
        steps: counts the steps; with accumulate, the updates.

    Raises:
        ValueError: l1 is negative or not finite, a limit is not positive and finite, both limits are given, or
            accumulate is no whole number of at least 1.
    """

    optimizer: Optimizer
    l1: float = 0.0
    clip_norm: float | None = None
    clip_value: float | None = None
    rate: RateFunction | None = None
    factor: Callable[[int], float] | None = None
    accumulate: int = 1
    scaler: GradScaler | None = None
    steps: StepCount = field(default_factory=StepCount)

    def __post_init__(self) -> None:
        if not (isinstance(self.l1, Real) and 0.0 <= self.l1 < math.inf):
            raise ValueError(f"l1 is {self.l1!r}; give a finite number of at least 0")
        for name, limit in (("clip_norm", self.clip_norm), ("clip_value", self.clip_value)):
            if limit is not None and not (isinstance(limit, Real) and 0.0 < limit < math.inf):
                raise ValueError(f"{name} is {limit!r}; give a finite number above 0, or None for no limit")
        if self.clip_norm is not None and self.clip_value is not None:
            raise ValueError("clip_norm and clip_value are both given; leave one of them out")
        if not isinstance(self.accumulate, int) or self.accumulate < 1:
            raise ValueError(f"accumulate is {self.accumulate!r}; it must be a whole number of at least 1")

    @property
    def changing(self) -> bool:
        """Whether the rates are those of `rate` or `factor`, and not the groups' own."""
        return self.rate is not None or self.factor is not None

    @property
    def ordinary(self) -> str | None:
        """Why these updates need steps taken one operation after another, in words; None if they do not."""
        if self.accumulate > 1:
            return f"the gradients of {self.accumulate} batches make one update"
        return "the loss is scaled for gradients in float16" if self.scaler is not None else None

    def begin(self) -> None:
        """What the host does before each step, a replayed one too: set the step's rate, and count the step.

        Raises:
            ValueError: `rate` gives no number of at least 0.
        """
        self._set_rates(self.steps.taken)
        self.steps.taken += 1

    def rates(self, count: int) -> Tensor:
        """The learning rates of the next `count` steps: float64 [count, groups]. For steps taken as a whole."""
        if self.changing:
            values = [self._rates_at(self.steps.taken + step) for step in range(count)]
        else:
            values = [[float(group["lr"]) for group in self.optimizer.param_groups]] * count
        return torch.tensor(values, dtype=torch.float64, device="cpu")

    def advance(self, count: int) -> None:
        """What `begin` does, for `count` steps that were taken at `rates`."""
        if count > 0:
            self._set_rates(self.steps.taken + count - 1)
        self.steps.taken += count

    def backward(self, value: Tensor) -> None:
        """The gradients of a loss, scaled up if they are to be."""
        (value if self.scaler is None else self.scaler.scale(value)).backward()

    def apply(self, parameters: Sequence[nn.Parameter]) -> None:
        """Penalise, clip and update, by what `parameters`, all of the model, have for gradients.

        Nothing waits for the device, so that it can be recorded.
        """
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self.l1 != 0.0:
            _penalise(parameters, self.l1)
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        elif self.clip_value is not None:
            nn.utils.clip_grad_value_(parameters, self.clip_value)
        if self.scaler is None:
            self.optimizer.step()
            return
        self.scaler.step(self.optimizer)  # but not where a gradient is NaN or Inf: the scale was too large
        self.scaler.update()

    def _rates_at(self, step: int) -> list[float]:
        """The rate of each group in a step, by `rate` or `factor`."""
        groups = self.optimizer.param_groups
        if self.factor is None:
            assert self.rate is not None
            return [rate_at(self.rate, step)] * len(groups)
        factor = self.factor(step)
        return [group.setdefault("initial_lr", float(group["lr"])) * factor for group in groups]

    def _set_rates(self, step: int) -> None:
        if self.changing:
            for group, rate in zip(self.optimizer.param_groups, self._rates_at(step), strict=True):
                group["lr"] = rate


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
