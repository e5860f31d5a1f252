"""One fit: its epochs and steps, its callbacks, and where it is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .augmented import AugmentedRows
from .callbacks import Callback
from .engine import EngineSteps
from .graph import WholeSteps
from .measuring import measure, training_metrics
from .progress import Progress
from .schedules import Schedule, TorchSchedule
from .sources import Rows, Stream
from .steps import AfterStep, BeforeStep, train_batches, train_rows
from .update import Update
from .weights import Snapshot, all_finite

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .trainer import Trainer


@dataclass
class Position:
    """Where a fit is, for a checkpoint: what it needs beside the random numbers of the moment to go on with its bits.

    epoch    epochs that are finished
    step     steps taken of the next one; of these the losses, the random numbers before, and the engine's seed
    start    steps of the Trainer's life before the fit
    stopped  whether a callback has ended the fit
    """

    epoch: int = 0
    step: int = 0
    start: int = 0
    stopped: bool = False
    losses: list[float] = field(default_factory=list)
    random: dict[str, Any] | None = None
    seed: int | None = None


class Fit:
    """The work of `Trainer.fit`, whose arguments these are.

    Attributes:
        position: where it is.
        rows: how many are trained on; None where they come from a Dataset or DataLoader.
        resumed: the checkpoint that it goes on from, or None.
    """

    def __init__(
        self,
        trainer: Trainer,
        train: Rows | Stream,
        validation: Rows | Stream | None = None,
        *,
        epochs: int = 1,
        batch_size: int = 32,
        shuffle: bool = True,
        callbacks: Sequence[Callback] = (),
        resumed: Checkpoint | None = None,
    ) -> None:
        self.trainer, self.train, self.validation = trainer, train, validation
        self.epochs, self.batch_size, self.shuffle = epochs, batch_size, shuffle
        self.rows = len(train) if isinstance(train, Rows) else None
        self.callbacks = callbacks
        self.resumed = resumed
        self.position = Position(start=trainer.update.steps.taken)
        self._share = trainer.share
        self._whole = self._make_whole()
        self._step_by_step: str | None = trainer.update.ordinary
        if not isinstance(train, Rows):
            self._step_by_step = "the data comes from a Dataset or DataLoader"
        if self._share is not None:
            self._step_by_step = self._share.explanation
        self._schedules = [callback for callback in callbacks if isinstance(callback, Schedule)]
        self._check_rates()
        for schedule in self._schedules:
            schedule.begin(self._updates_per_epoch(), epochs)

    @property
    def explanation(self) -> str:
        """How the steps were taken so far, and why."""
        if self._step_by_step is not None:
            return f"step by step: {self._step_by_step}"
        assert self._whole is not None
        return self._whole.explanation

    def run(self) -> None:
        """All epochs, within the Trainer's random numbers and in training mode."""
        trainer, begun = self.trainer, []
        if self._share is not None:
            self._share.begin(self, self.epochs)
        try:
            for callback in self.callbacks:
                begun.append(callback)
                callback.on_train_begin()
            if self.resumed is not None:
                self.position = self.resumed.apply(trainer, self.callbacks)
                trainer.stop_training = self.position.stopped
            with self._guarded() as good:
                for epoch in range(self.position.epoch, self.epochs):
                    if trainer.stop_training:
                        break
                    self._run_epoch(epoch, good)
        finally:
            for callback in begun:
                callback.on_train_end()
            del (
                self.train,
                self.validation,
                self._whole,
                self._share,
            )  # the Trainer keeps this fit, and need not keep its data

    def run_once(self) -> float:
        """One pass over the rows, without callbacks; its mean loss."""
        if self._share is not None:
            self._share.begin(self, 0)
        with self._guarded():
            return self._train_epoch(0)

    def _run_epoch(self, epoch: int, good: Snapshot) -> None:
        trainer, position = self.trainer, self.position
        for callback in self.callbacks:
            callback.on_epoch_begin(epoch)
        logs = {"loss": self._train_epoch(epoch)}
        if self._share is not None:
            self._share.copy_buffers()
        good.take()
        if trainer.metrics:
            logs.update(training_metrics(trainer, self.train))
        if self._schedules:
            logs["lr"] = float(trainer.optimizer.param_groups[0]["lr"])
        if self.validation is not None:
            measured = measure(trainer, self.validation, callbacks=self.callbacks)
            logs.update({f"val_{name}": value for name, value in measured.items()})
        trainer.history.add(epoch, logs)
        position.epoch, position.step, position.losses, position.random = epoch + 1, 0, [], None
        for callback in self.callbacks:
            callback.on_epoch_end(epoch, logs)
        if self._share is not None:
            trainer.stop_training = self._share.processes.any(trainer.stop_training)

    @contextmanager
    def _guarded(self) -> Iterator[Snapshot]:
        """Inside, the model is put back to the Snapshot where an error has left it with weights that are no good."""
        model, whole = self.trainer.model, self._whole
        good = Snapshot(model)
        try:
            yield good
        except BaseException as error:
            stopped_in_time = isinstance(whole, EngineSteps) and whole.stopped_in_time
            if (isinstance(error, FloatingPointError) and not stopped_in_time) or not all_finite(model):
                good.restore()
                self.trainer.optimizer.state.clear()  # its averages are NaN as well
            raise
        finally:
            self.trainer.how = self.explanation
            if whole is not None:
                whole.close()

    def _make_whole(self) -> EngineSteps | WholeSteps | None:
        recorder = self.trainer.recorder
        if not isinstance(self.train, Rows) or self.trainer.update.ordinary or self._share is not None:
            return None
        if reason := recorder.why_not(self.train.x.device):
            watchful = any(type(callback) is not Progress for callback in self.callbacks)
            return EngineSteps(self.train, self.batch_size, reason, watchful)
        return WholeSteps(self.train, self.batch_size, recorder)

    def _train_epoch(self, epoch: int) -> float:
        """Train one epoch, or what is left of it; its mean loss over the rows."""
        trainer, train, whole, share, model = self.trainer, self.train, self._whole, self._share, self.trainer.model
        first = self.position.step
        update = self._update()
        before_step, after_step = self._hooks(first)
        if isinstance(train, Rows):
            order = self._order(train, first, keep=after_step is not None)
            if first * self.batch_size >= len(train):  # saved after the epoch's last step
                losses, counts = torch.empty(0, device="cpu"), torch.empty(0, dtype=torch.int64, device="cpu")
            elif share is not None:
                batches = share.training_batches(train, self.batch_size, order)
                loss = trainer.batch_loss if train.weight is None else trainer.loss_function
                losses, counts = share.train(loss, update, batches, after_step, before_step)
            elif whole is None or (first > 0 and isinstance(whole, WholeSteps)):
                losses, counts = train_rows(
                    model, trainer.loss_function, update, train, order, self.batch_size, after_step, before_step
                )
            else:
                losses, counts = whole.train(model, trainer.loss_function, update, order, after_step, before_step)
        else:
            if trainer.metrics:
                trainer.metrics.reset(train.device)
            loss = trainer.measured_loss if trainer.metrics else trainer.checked_loss
            if share is None:
                losses, counts = train_batches(model, loss, update, train.batches(), after_step, before_step)
            else:
                batches = share.training_batches(train, self.batch_size)
                losses, counts = share.train(loss, update, batches, after_step, before_step)
        losses = losses.double().cpu()
        if first > 0:
            losses, counts = self._with_those_before(losses, counts, first)
        self._check(epoch, losses)
        return float((losses * counts).sum() / counts.sum())

    def _with_those_before(self, losses: Tensor, counts: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """The losses of a whole epoch and their numbers of rows; the `first` were taken before a checkpoint."""
        before = torch.tensor(self.position.losses[:first], dtype=torch.float64, device="cpu")
        rows = torch.full((first,), self.batch_size, device="cpu")
        if isinstance(self.train, Rows):
            rows[-1] = min(self.batch_size, len(self.train) - (first - 1) * self.batch_size)
        return torch.cat([before, losses]), torch.cat([rows, counts])

    def _update(self) -> Update:
        """The Trainer's, with the schedules of this fit."""
        update, optimizer = self.trainer.update, self.trainer.optimizer
        if update.optimizer is not optimizer:  # a callback has set another
            update = replace(update, optimizer=optimizer)
        if not self._schedules:
            return update
        for group in update.optimizer.param_groups:
            group.setdefault("initial_lr", float(group["lr"]))
        start, schedules = self.position.start, self._schedules
        return replace(update, factor=lambda step: math.prod(schedule.factor(step - start) for schedule in schedules))

    def _order(self, train: Rows, first: int, keep: bool) -> Tensor | None:
        """The order of the epoch's rows from step `first` on. `keep`: for a checkpoint within the epoch."""
        position, random_numbers, device = self.position, self.trainer.random_numbers, train.x.device
        now = random_numbers.state(device) if first > 0 or keep else None
        if first == 0:
            position.random, position.losses = now, []
        elif position.random is not None:
            random_numbers.load(position.random, device)
        if isinstance(train, AugmentedRows):
            train.renew()  # from the epoch's random numbers, as its order
        order = torch.randperm(len(train), device="cpu").to(device) if self.shuffle else None
        if first == 0 or now is None:
            return order
        random_numbers.load(now, device)
        if isinstance(self._whole, EngineSteps) and first * self.batch_size < len(train):
            self._whole.continue_at(first, position.seed)
        order = torch.arange(len(train), device=device) if order is None else order
        return order[first * self.batch_size :]

    def _hooks(self, first: int) -> tuple[BeforeStep | None, AfterStep | None]:
        """What to call before and after each step, for callbacks that have work there."""
        trainer, position = self.trainer, self.position
        listeners = [callback for callback in self.callbacks if callback.inside_steps]
        if not listeners and not (self._share is not None and self._share.watched):
            return None, None

        def before_step(step: int) -> None:
            for listener in listeners:
                listener.on_train_batch_begin(first + step)

        def after_step(step: int, value: Tensor) -> bool:
            logs = {"loss": value.item()}
            position.step = first + step + 1
            position.losses.append(logs["loss"])
            position.seed = self._whole.seed if isinstance(self._whole, EngineSteps) else None
            for listener in listeners:
                listener.on_train_batch_end(first + step, logs)
            return trainer.stop_training

        begins = any(type(c).on_train_batch_begin is not Callback.on_train_batch_begin for c in listeners)
        return before_step if begins else None, after_step

    def _check_rates(self) -> None:
        """Raises ValueError if the learning rates are set by more than one side, of which the last would win."""
        sides = ["lr, which is a function"] if self.trainer.update.rate is not None else []
        sides += [type(schedule).__name__ for schedule in self._schedules[:1]]  # they are multiplied with each other
        sides += [f"a torch {type(c).__name__}" for c in self.callbacks if isinstance(c, TorchSchedule)]
        if len(sides) > 1:
            raise ValueError(f"the learning rates are set by {' and by '.join(sides)}; leave one of them out")

    def _updates_per_epoch(self) -> int | None:
        if isinstance(self.train, Rows):
            batches = -(-len(self.train) // self.batch_size)
        else:
            try:
                batches = len(self.train.loader)
            except TypeError:  # of an IterableDataset
                return None
        return -(-batches // self.trainer.accumulate)

    def _check(self, epoch: int, losses: Tensor) -> None:
        """Raises FloatingPointError if a loss or a weight is NaN or Inf."""
        if not math.isfinite(losses.sum()):
            step, whole = int((~losses.isfinite()).nonzero()[0]), self._whole
            kept = isinstance(whole, EngineSteps) and whole.stopped_in_time and all_finite(self.trainer.model)
            raise FloatingPointError(
                f"the loss became {losses[step].item()} in epoch {epoch + 1}, step {step + 1}, and the model has the "
                f"weights from before that {'step' if kept else 'epoch again'}; try a smaller lr, or scale the data"
            )
        if not all_finite(self.trainer.model):
            raise FloatingPointError(
                f"a weight became NaN or Inf in the last step of epoch {epoch + 1}, and the model has the weights from "
                "before that epoch again; try a smaller lr, or scale the data"
            )
