"""What can be hung into training: Callback, EarlyStopping, and the History that comes out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from .weights import Snapshot

if TYPE_CHECKING:
    from .trainer import Trainer


class History:
    """What was measured in each epoch.

    Attributes:
        history: name -> one number for each epoch: "loss" (mean over the rows, while training) and, with validation
            data, "val_loss" and what else `Trainer.evaluate` gives, each with "val_" before it.
        epoch: the epochs that were finished, from 0.
    """

    def __init__(self) -> None:
        self.history: dict[str, list[float]] = {}
        self.epoch: list[int] = []

    def add(self, epoch: int, logs: dict[str, float]) -> None:
        self.epoch.append(epoch)
        for name, value in logs.items():
            self.history.setdefault(name, []).append(value)

    def __repr__(self) -> str:
        last = ", ".join(f"{name} {values[-1]:.6g}" for name, values in self.history.items())
        return f"History({len(self.epoch)} epochs{': ' + last if last else ''})"


class Callback:
    """Override what you need. `self.trainer` is the Trainer; `self.trainer.stop_training = True` ends training.

    Epochs and batches count from 0. The two hooks inside an epoch's steps are called only where a subclass overrides
    them: then each step is a call of its own, and `on_train_batch_end` waits for its loss. `on_train_end` is called
    however training ends, after an error or Ctrl-C too.

    A callback with something to remember from one epoch to the next gives it in `state_dict`, for checkpoints: dicts,
    lists, tuples, numbers, text, None and tensors.
    """

    trainer: Trainer
    writes = False  # whether it is for one process alone, where several train together

    @property
    def inside_steps(self) -> bool:
        """Whether the hooks inside an epoch's steps are to be called."""
        hooks = ("on_train_batch_begin", "on_train_batch_end")
        return any(getattr(type(self), hook) is not getattr(Callback, hook) for hook in hooks)

    def on_train_begin(self) -> None:
        """Before the first epoch."""

    def on_epoch_begin(self, epoch: int) -> None:
        """Before each epoch."""

    def on_train_batch_begin(self, batch: int) -> None:
        """Before each step."""

    def on_train_batch_end(self, batch: int, logs: dict[str, float]) -> None:
        """After each step; `logs` holds the batch's "loss"."""

    def on_test_begin(self) -> None:
        """Before an epoch's validation, and what `evaluate` measures."""

    def on_test_end(self, logs: dict[str, float]) -> None:
        """After it; `logs` holds what was measured, without "val_"."""

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        """After each epoch and its validation; `logs` holds what History gets."""

    def on_train_end(self) -> None:
        """After the last epoch."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of this callback; {} for nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave; called after `on_train_begin`."""


def monitored(callback: Callback, monitor: str, logs: dict[str, float]) -> float:
    """What a callback looks at.

    Raises:
        ValueError: it was not measured.
    """
    if monitor not in logs:
        raise ValueError(
            f"{type(callback).__name__} monitors {monitor!r} and only {', '.join(logs)} was measured; "
            "monitor one of these, or give fit a validation_split or validation_data"
        )
    return logs[monitor]


def larger_is_better(mode: str, monitor: str) -> bool:
    """Of a mode "min", "max" or "auto": "max" where the name has "acc" in it.

    Raises:
        ValueError: mode is another.
    """
    if mode not in ("auto", "min", "max"):
        raise ValueError(f"mode is {mode!r}; give auto, min or max")
    return mode == "max" or (mode == "auto" and "acc" in monitor)


class EarlyStopping(Callback):
    """Stop when a number no longer gets better, and give the model the weights of its best epoch.

    Args:
        monitor: a name in `History.history`.
        patience: how many epochs in a row may pass without an improvement; 0 and 1 stop at the first, as in Keras.
        min_delta: an improvement is a change by more than this.
        mode: "min" if smaller is better, "max" if larger is, "auto" for "max" where the name has "acc" in it.
        restore_best_weights: whether the model ends with the weights of the best epoch. It does however training ends:
            stopped here, after all epochs, or by an error. (Keras 2 did so only when stopped here.)

    Attributes:
        best, best_epoch: the best value and its epoch, None before the first.
        stopped_epoch: the epoch after which this stopped training, or None.

    Raises:
        ValueError: mode is unknown, or patience or min_delta negative; after the first epoch, if nothing of the name
            `monitor` was measured.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        patience: int = 0,
        min_delta: float = 0.0,
        mode: str = "auto",
        restore_best_weights: bool = True,
    ) -> None:
        self.larger_is_better = larger_is_better(mode, monitor)
        if patience < 0 or min_delta < 0:
            raise ValueError(f"patience is {patience} and min_delta {min_delta}; neither can be negative")
        self.monitor = monitor
        self.patience = patience
        self.min_delta = min_delta
        self.restore_best_weights = restore_best_weights
        self.on_train_begin()

    def on_train_begin(self) -> None:
        self.best: float | None = None
        self.best_epoch: int | None = None
        self.stopped_epoch: int | None = None
        self._waited = 0
        self._weights: Snapshot | None = None

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        value = monitored(self, self.monitor, logs)
        if self._improved(value):
            self.best, self.best_epoch = value, epoch
            self._waited = 0
            if self._weights is not None:
                self._weights.take()
            elif self.restore_best_weights:
                self._weights = Snapshot(self.trainer.model)
            return
        self._waited += 1
        if self._waited >= self.patience:
            self.stopped_epoch = epoch
            self.trainer.stop_training = True

    def on_train_end(self) -> None:
        if self._weights is not None:
            self._weights.restore()
            self._weights = None

    def state_dict(self) -> dict[str, Any]:
        weights = None if self._weights is None else self._weights.kept
        return {"best": self.best, "best_epoch": self.best_epoch, "waited": self._waited, "weights": weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.best_epoch, self._waited = state["best"], state["best_epoch"], state["waited"]
        if state["weights"] is not None and self.restore_best_weights:
            self._weights = Snapshot(self.trainer.model)
            self._weights.keep(state["weights"])

    def _improved(self, value: float) -> bool:
        if self.best is None or math.isnan(self.best):
            return True
        if self.larger_is_better:
            return value > self.best + self.min_delta
        return value < self.best - self.min_delta
