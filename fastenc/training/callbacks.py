"""What can be hung into training: Callback, EarlyStopping, and the History that comes out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

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

    Epochs and batches count from 0. `on_train_batch_end` costs a wait for the loss at each step, so it is called only
    where a subclass overrides it. `on_train_end` is called however training ends, after an error or Ctrl-C too.
    """

    trainer: Trainer

    def on_train_begin(self) -> None:
        """Before the first epoch."""

    def on_epoch_begin(self, epoch: int) -> None:
        """Before each epoch."""

    def on_train_batch_end(self, batch: int, logs: dict[str, float]) -> None:
        """After each step; `logs` holds the batch's "loss"."""

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        """After each epoch and its validation; `logs` holds what History gets."""

    def on_train_end(self) -> None:
        """After the last epoch."""


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
        if mode not in ("auto", "min", "max"):
            raise ValueError(f"mode is {mode!r}; give auto, min or max")
        if patience < 0 or min_delta < 0:
            raise ValueError(f"patience is {patience} and min_delta {min_delta}; neither can be negative")
        self.monitor = monitor
        self.patience = patience
        self.min_delta = min_delta
        self.larger_is_better = mode == "max" or (mode == "auto" and "acc" in monitor)
        self.restore_best_weights = restore_best_weights
        self.on_train_begin()

    def on_train_begin(self) -> None:
        self.best: float | None = None
        self.best_epoch: int | None = None
        self.stopped_epoch: int | None = None
        self._waited = 0
        self._weights: Snapshot | None = None

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        if self.monitor not in logs:
            raise ValueError(
                f"EarlyStopping monitors {self.monitor!r} and only {', '.join(logs)} was measured; "
                "monitor one of these, or give fit a validation_split or validation_data"
            )
        value = logs[self.monitor]
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

    def _improved(self, value: float) -> bool:
        if self.best is None or math.isnan(self.best):
            return True
        if self.larger_is_better:
            return value > self.best + self.min_delta
        return value < self.best - self.min_delta
