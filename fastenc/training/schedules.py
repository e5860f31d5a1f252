"""Schedules: learning rates that change while a fit goes on, as callbacks that are multiplied with each other."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from .callbacks import Callback, larger_is_better, monitored

MakeScheduler = Callable[[Optimizer], LRScheduler]


class Schedule(Callback):
    """The rate of every parameter group is what it was at first, times `factor` of each schedule of a fit.

    Steps count from 0 in each fit. The rates are known before the steps are taken, so that an engine can take many.
    """

    def __init__(self) -> None:
        self._steps_per_epoch: int | None = None
        self._epochs = 1

    def begin(self, steps_per_epoch: int | None, epochs: int) -> None:
        """Told before a fit; None: the data does not tell how many steps it has.

        Raises:
            ValueError: this schedule needs to know how many steps there are.
        """
        self._steps_per_epoch, self._epochs = steps_per_epoch, epochs

    def factor(self, step: int) -> float:
        """What the rates of a step are multiplied by."""
        raise NotImplementedError(f"{type(self).__name__} needs a factor(step)")

    @property
    def _total(self) -> int:
        """The steps of the fit."""
        if self._steps_per_epoch is None:
            raise ValueError(
                f"{type(self).__name__} needs to know how many steps an epoch has, and x does not tell its length; "
                "give a Dataset or DataLoader with a length"
            )
        return self._steps_per_epoch * self._epochs


class StepDecay(Schedule):
    """The rate times `gamma` after every `every` epochs, as torch's StepLR."""

    def __init__(self, every: int = 10, gamma: float = 0.1) -> None:
        super().__init__()
        _check_positive(every=every, gamma=gamma)
        self.every, self.gamma = every, gamma
        self._epoch = 0

    def on_epoch_begin(self, epoch: int) -> None:
        self._epoch = epoch

    def factor(self, step: int) -> float:
        return self.gamma ** (self._epoch // self.every)


class WarmUp(Schedule):
    """The rate grows from one `steps`-th of it to the whole in `steps` steps, and stays; None: those of an epoch."""

    def __init__(self, steps: int | None = None) -> None:
        super().__init__()
        if steps is not None:
            _check_positive(steps=steps)
        self.steps = steps

    def begin(self, steps_per_epoch: int | None, epochs: int) -> None:
        super().begin(steps_per_epoch, epochs)
        self._grows = self.steps or self._total // epochs

    def factor(self, step: int) -> float:
        return min(1.0, (step + 1) / self._grows)


class Cosine(Schedule):
    """The rate falls along half a cosine over all steps of the fit, as torch's CosineAnnealingLR, to `final` times it.

    Args:
        warm_up: the share of the steps, at first, in which the rate grows in a line from nearly nothing to the whole.
    """

    def __init__(self, warm_up: float = 0.0, final: float = 0.0) -> None:
        super().__init__()
        _check_share(warm_up=warm_up, final=final)
        self.warm_up, self.final = warm_up, final

    def begin(self, steps_per_epoch: int | None, epochs: int) -> None:
        super().begin(steps_per_epoch, epochs)
        self._grows = int(self.warm_up * self._total)

    def factor(self, step: int) -> float:
        if step < self._grows:
            return (step + 1) / self._grows
        done = min(1.0, (step - self._grows) / (self._total - self._grows))
        return _cosine(1.0, self.final, done)


class OneCycle(Schedule):
    """From `start` times the rate up to the whole and down to `final` times it, as torch's OneCycleLR by default.

    Momentum stays as it is; torch's own OneCycleLR, given as the schedule, changes that too.

    Args:
        warm_up: the share of the steps in which the rate grows.
    """

    def __init__(self, warm_up: float = 0.3, start: float = 1 / 25, final: float = 1 / 250_000) -> None:
        super().__init__()
        _check_share(warm_up=warm_up, start=start, final=final)
        self.warm_up, self.start, self.final = warm_up, start, final

    def begin(self, steps_per_epoch: int | None, epochs: int) -> None:
        super().begin(steps_per_epoch, epochs)
        self._last = float(self._total - 1)
        self._top = max(0.0, self.warm_up * self._total - 1)

    def factor(self, step: int) -> float:
        if step < self._top:
            return _cosine(self.start, 1.0, step / self._top)
        down = max(self._last - self._top, 1.0)
        return _cosine(1.0, self.final, min(1.0, (step - self._top) / down))


class Plateau(Schedule):
    """The rate times `gamma` where a number got no better for `patience` epochs in a row.

    Args:
        monitor: a name in `History.history`; None is "val_loss" where there is one, else "loss".
        min_delta: better is a change by more than this.
        mode: as of EarlyStopping.
        lowest: what the rate is never multiplied below.
    """

    def __init__(
        self,
        monitor: str | None = None,
        gamma: float = 0.1,
        patience: int = 10,
        min_delta: float = 0.0,
        mode: str = "auto",
        lowest: float = 0.0,
    ) -> None:
        super().__init__()
        _check_positive(gamma=gamma, patience=patience)
        _check_share(lowest=lowest)
        self.monitor, self.gamma, self.patience, self.min_delta = monitor, gamma, patience, min_delta
        self.sign = -1.0 if larger_is_better(mode, monitor or "") else 1.0
        self.lowest = lowest
        self.on_train_begin()

    def on_train_begin(self) -> None:
        self._factor, self._best, self._waited = 1.0, math.inf, 0

    def factor(self, step: int) -> float:
        return self._factor

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        value = self.sign * monitored(self, self.monitor or ("val_loss" if "val_loss" in logs else "loss"), logs)
        if value < self._best - self.min_delta:
            self._best, self._waited = value, 0
            return
        self._waited += 1
        if self._waited >= self.patience:
            self._factor, self._waited = max(self.lowest, self._factor * self.gamma), 0

    def state_dict(self) -> dict[str, Any]:
        return {"factor": self._factor, "best": self._best, "waited": self._waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._factor, self._best, self._waited = state["factor"], state["best"], state["waited"]


class TorchSchedule(Callback):
    """A scheduler of `torch.optim.lr_scheduler`, which takes a step after each epoch.

    Args:
        scheduler: one of the Trainer's optimiser, or a function that makes one from it, at the first fit.
        monitor: what ReduceLROnPlateau is told; None is "val_loss" where there is one, else "loss".

    A scheduler goes on from fit to fit. What it counts is what it was made for: nothing starts again.
    """

    def __init__(self, scheduler: LRScheduler | MakeScheduler, monitor: str | None = None) -> None:
        self.scheduler = scheduler
        self.monitor = monitor

    def on_train_begin(self) -> None:
        optimizer = self.trainer.optimizer
        made = self.scheduler if isinstance(self.scheduler, LRScheduler) else self.scheduler(optimizer)
        if not isinstance(made, LRScheduler):
            raise TypeError(
                f"the schedule's function gives a {type(made).__name__}; make it give a scheduler of "
                "torch.optim.lr_scheduler"
            )
        if made.optimizer is not optimizer:
            raise ValueError(
                "the schedule changes the rates of another optimiser than the Trainer's; make it from the one that "
                "the Trainer is given"
            )
        self.scheduler = made

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        self._step(monitored(self, self.monitor or ("val_loss" if "val_loss" in logs else "loss"), logs))

    def state_dict(self) -> dict[str, Any]:
        return self.scheduler.state_dict() if isinstance(self.scheduler, LRScheduler) else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert isinstance(self.scheduler, LRScheduler)
        self.scheduler.load_state_dict(state)

    def _step(self, value: float) -> None:
        with warnings.catch_warnings():  # an engine has taken the optimiser's steps, and torch has not seen them
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            if isinstance(self.scheduler, ReduceLROnPlateau):
                self.scheduler.step(value)
            else:
                assert isinstance(self.scheduler, LRScheduler)
                self.scheduler.step()


class StepwiseTorchSchedule(TorchSchedule):
    """A scheduler of `torch.optim.lr_scheduler` that takes a step after each of the Trainer's: a call for each step."""

    def on_train_begin(self) -> None:
        super().on_train_begin()
        if self.trainer.accumulate > 1:
            raise ValueError(
                "a torch scheduler that steps with each batch does not know of accumulate; use the schedule "
                "'one_cycle' or 'cosine', or accumulate=1"
            )

    def on_train_batch_end(self, batch: int, logs: dict[str, float]) -> None:
        self._step(logs["loss"])

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        """Its steps are the batches'."""


SCHEDULES: dict[str, Callable[[], Schedule]] = {
    "step": StepDecay,
    "cosine": Cosine,
    "warm_up": WarmUp,
    "one_cycle": OneCycle,
    "plateau": Plateau,
}
ScheduleLike = str | Callback | LRScheduler | MakeScheduler


def make_schedule(schedule: ScheduleLike | None) -> list[Callback]:
    """The callback of a name in SCHEDULES, of a torch scheduler or a function that makes one, or the callback itself.

    OneCycleLR and CyclicLR step with each batch, as PyTorch has it, the others after each epoch.

    Raises:
        ValueError, TypeError: an unknown name, or something else.
    """
    if schedule is None:
        return []
    if isinstance(schedule, str):
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule is {schedule!r}; give one of {', '.join(SCHEDULES)}, or a scheduler of torch's")
        return [SCHEDULES[schedule]()]
    if isinstance(schedule, Callback):
        if isinstance(schedule, (Schedule, TorchSchedule)):
            return [schedule]
    elif isinstance(schedule, (OneCycleLR, CyclicLR)):
        return [StepwiseTorchSchedule(schedule)]
    elif isinstance(schedule, LRScheduler) or (callable(schedule) and not isinstance(schedule, type)):
        return [TorchSchedule(schedule)]
    raise TypeError(
        f"schedule is a {type(schedule).__name__}; give one of {', '.join(SCHEDULES)}, a Schedule, a scheduler of "
        "torch.optim.lr_scheduler, or a function that makes one from the optimiser"
    )


def _cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) / 2.0 * (1.0 + math.cos(math.pi * done))


def _check_positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not number > 0:
            raise ValueError(f"{name} is {number!r}; it must be greater than 0")


def _check_share(**numbers: float) -> None:
    for name, number in numbers.items():
        if not 0.0 <= number < 1.0:
            raise ValueError(f"{name} is {number!r}; it must be at least 0 and less than 1")
