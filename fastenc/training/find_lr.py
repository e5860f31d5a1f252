"""A look at learning rates: the loss while the rate grows from step to step, and the rate to take."""

from __future__ import annotations

import copy
import math
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastenc.data.extras import require

from .sources import Rows
from .steps import train_rows
from .update import StepCount
from .weights import Snapshot

if TYPE_CHECKING:
    from .trainer import Trainer

EXPLODED = 4.0  # times the lowest smoothed loss: nothing is learned beyond
SMOOTHING = 0.9


@dataclass(frozen=True)
class LearningRates:
    """What `Trainer.find_lr` found: the loss before the step at each rate.

    rates     the rates that were tried, growing
    losses    the batches' losses
    smoothed  their running mean
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]

    @property
    def suggestion(self) -> float:
        """The rate at which the smoothed loss falls fastest per factor of the rate, before its lowest point.

        After L. N. Smith, "Cyclical Learning Rates for Training Neural Networks" (2017), as fast.ai reads it.
        """
        lowest = min(range(len(self.smoothed)), key=self.smoothed.__getitem__)
        if lowest < 2:
            return self.rates[lowest] / 10.0
        return self.rates[min(range(1, lowest), key=lambda i: self.smoothed[i + 1] - self.smoothed[i - 1])]

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw loss against rate to a picture file; its ending tells the format."""
        figure = require("matplotlib.figure", "a plot").Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
        axes.plot(self.rates, self.losses, color="#bbbbbb", label="loss of a batch")
        axes.plot(self.rates, self.smoothed, color="#1f77b4", label="smoothed")
        axes.axvline(self.suggestion, color="#d62728", linestyle="--", label=f"suggestion: {self.suggestion:.2g}")
        axes.set_xscale("log")
        axes.set_ylim(top=1.5 * max(self.losses[0], self.smoothed[0]))
        axes.set_xlabel("learning rate")
        axes.set_ylabel("loss")
        axes.legend()
        figure.savefig(path, dpi=150)


def find_rates(
    trainer: Trainer, train: Rows, batch_size: int, lowest: float, highest: float, steps: int
) -> LearningRates:
    """The work of `Trainer.find_lr`."""
    if not 0.0 < lowest < highest < math.inf:
        raise ValueError(f"lowest is {lowest} and highest {highest}; give 0 < lowest < highest")
    if steps < 10:
        raise ValueError(f"steps is {steps}; give at least 10")
    rates = [lowest * (highest / lowest) ** (step / (steps - 1)) for step in range(steps)]
    weights, state = Snapshot(trainer.model), copy.deepcopy(trainer.optimizer.state_dict())
    random, device = trainer.random_numbers.state(train.x.device), train.x.device
    losses: list[float] = []
    smoothed: list[float] = []
    mean = 0.0

    def after_step(step: int, value: Tensor) -> bool:
        nonlocal mean
        loss = value.item()
        if not math.isfinite(loss):
            return True
        losses.append(loss)
        mean = SMOOTHING * mean + (1.0 - SMOOTHING) * loss
        smoothed.append(mean / (1.0 - SMOOTHING ** len(losses)))
        return len(losses) == steps or smoothed[-1] > EXPLODED * min(smoothed)

    def rate(step: int) -> float:
        return rates[min(step, steps - 1)]

    update = replace(
        trainer.update, optimizer=trainer.optimizer, rate=rate, factor=None, accumulate=1, steps=StepCount()
    )
    try:
        taken = 0
        while update.steps.taken < steps and taken == len(losses):  # the last step's loss was good
            order = torch.randperm(len(train), device="cpu").to(device)
            left = order[: (steps - update.steps.taken) * batch_size]
            values, _ = train_rows(trainer.model, trainer.loss_function, update, train, left, batch_size, after_step)
            taken += len(values)
            if smoothed and smoothed[-1] > EXPLODED * min(smoothed):
                break
    finally:
        weights.restore()
        trainer.optimizer.load_state_dict(state)
        for parameter in trainer.model.parameters():
            parameter.grad = None
        trainer.random_numbers.load(random, device)
    if len(losses) < 3:
        raise ValueError(
            f"the loss is not finite from step {len(losses) + 1} on; give a smaller lowest, or scale the data"
        )
    return LearningRates(rates[: len(losses)], losses, smoothed)
