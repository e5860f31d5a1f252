"""Trainer: fit, evaluate, predict and encode for any module, with Keras's meaning of their arguments."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fastenc.data import DataError

from .augmented import Augment, augmented
from .callbacks import Callback, History
from .checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from .distributed import Processes, is_first, own_device
from .find_lr import LearningRates, find_rates
from .fitting import Fit
from .inputs import evened, place_of, read_inputs, read_source, read_train_and_validation
from .losses import LossFunction, fit_target, get_loss
from .measuring import EVALUATION_ROWS, measure, outputs
from .metrics import Metrics
from .model_checkpoint import ModelCheckpoint
from .optimizers import DEFAULT_LR, OptimizerLike, RateFunction, make_optimizer
from .precision import PRECISIONS, make_scaler
from .progress import Progress, wants_progress
from .recorder import CudaRecorder
from .rng import RandomNumbers
from .schedules import ScheduleLike, make_schedule
from .sharing import Share, together
from .sources import Rows
from .update import Update
from .weights import mode

T = TypeVar("T")


class Trainer:
    """Trains a model and runs it over data.

    Args:
        model: any `nn.Module` from one tensor to one tensor.
        optimizer: "sgd", "adam", "adamw" (PyTorch's, fused where it can), an Optimizer, or a function that makes one
            from a list of parameters. It lives as long as the Trainer: a second `fit` goes on where the first ended.
        lr: of an optimiser given by name: the learning rate, or a function from a step's number to the rate of that
            step. Steps count from 0 over the Trainer's life; the function may be called more than once for a step.
        weight_decay, momentum, nesterov: of an optimiser given by name; the last two for "sgd" only.
        l1: l1 * sign(weight) is added to the gradients of what is trained and has at least 2 dimensions (weights, not
            biases) before they are clipped. The losses that are reported leave the penalty out.
        clip_norm: the most that the norm of all gradients together may be: larger ones are scaled down to it.
        clip_value: the most that each element of a gradient may be, up or down. Not together with clip_norm.
        schedule: what the learning rates are times as a fit goes on: "step", "cosine", "warm_up", "one_cycle" or
            "plateau", one of `fastenc.training.schedules` with options of your own, a torch.optim.lr_scheduler of the
            optimiser, or a function that makes one from it. Schedules among the callbacks of `fit` are multiplied with
            it. Each fit starts anew, but a torch scheduler goes on; rates are in the History as "lr".
        accumulate: how many batches make one update, by the mean loss over all their rows. Steps are then updates.
        precision: "fp32", or "bf16" or "fp16" for `torch.autocast` in `fit` and `evaluate`; weights stay as they are.
            fp16 scales the loss and needs a GPU.
        metrics: torchmetrics objects or functions (prediction, target) -> number, or name -> one of them, for
            `evaluate` and the History. There, those of the training rows are measured after each epoch, in eval mode;
            of a Dataset or DataLoader, which is read once, as the steps are taken.
        loss: "mse", "mae", "huber" (delta 1), "cross_entropy" (the model gives logits), "bce" (the model gives
            probabilities), "bce_with_logits", "cosine", "info_nce" (the target is each row's partner), "triplet" (of
            labels; both over the rows of a batch), or a function of (prediction, target): the mean over the rows.
        seed: makes shuffling and dropout repeatable: the Trainer draws from random numbers of its own and PyTorch's
            global ones stay as they are, and `fit` for one epoch twice is `fit` for two. None: from the global ones.
        device: where to put the model; None leaves it where it is. Data follows the model.

    Attributes:
        history: the History of the latest `fit`, while it runs and after an error or Ctrl-C too.
        stop_training: set to True by a callback to end `fit`.
        fitting: the latest fit, with its `position`; None before the first.

    Arrays: x is what `fastenc.data.as_rows` takes, tensors, numpy arrays, memory maps, pandas and pyarrow tables, or a
    torch Dataset or DataLoader that gives x or (x, y). A DataLoader's own batch size and shuffling hold, not those
    given here; a Dataset is read in batches of `batch_size`. Arrays are copied to the model's device as a whole.

    On the CPU a C++ engine takes whole steps of the encoders and heads of this package where nothing asks for more; on
    a GPU the step of a full batch is replayed from a CUDA graph where it can be: see `explain` and docs/gpu.md.

    Under torchrun all processes take the same calls with the same data, and share the work of `fit`, `partial_fit` and
    `evaluate`: see docs/distributed.md.

    Raises:
        ValueError: an unknown name, a negative or NaN option, or one that does not go with the others.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerLike = "adam",
        lr: float | RateFunction = DEFAULT_LR,
        loss: str | LossFunction = "mse",
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        nesterov: bool = False,
        l1: float = 0.0,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        schedule: ScheduleLike | None = None,
        accumulate: int = 1,
        precision: str = "fp32",
        metrics: Iterable[Any] | Mapping[str, Any] = (),
        seed: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.loss_function = get_loss(loss)
        self.loss = loss
        self.model = model if device is None else model.to(own_device(device))
        self.optimizer = make_optimizer(optimizer, model.parameters(), lr, weight_decay, momentum, nesterov)
        self.schedule = make_schedule(schedule)
        if self.schedule and callable(lr):
            raise ValueError("lr is a function and schedule is given; leave one of them out")
        self.precision = precision
        self.update = Update(
            self.optimizer,
            l1,
            clip_norm,
            clip_value,
            rate=lr if callable(lr) else None,
            accumulate=accumulate,
            scaler=make_scaler(precision, place_of(self.model).device),
        )
        self.metrics = Metrics(metrics)
        self.history = History()
        self.stop_training = False
        self.fitting: Fit | None = None
        self.accumulate = accumulate
        self.random_numbers = RandomNumbers(seed)
        self.recorder = CudaRecorder()
        self.how = "no fit was started"
        self.processes: Processes | None = None
        self.share: Share | None = None  # within what several processes do together

    @together
    def fit(
        self,
        x: Any,
        y: Any = None,
        *,
        epochs: int = 1,
        batch_size: int = 32,
        validation_split: float = 0.0,
        validation_data: Any = None,
        shuffle: bool = True,
        callbacks: Sequence[Callback] = (),
        verbose: bool | str = "auto",
        augment: Augment | None = None,
        sample_weight: Any = None,
        resume: str | os.PathLike[str] | None = None,
    ) -> History:
        """Train for `epochs` passes over the rows.

        Args:
            x, y: inputs [rows, features] and targets; without y the target is x.
            batch_size: rows in a step; the last step of an epoch takes what is left.
            validation_split: this last fraction of the rows, before shuffling, is measured and not trained on. A
                warning tells if all of it is of one class.
            validation_data: x, (x, y) or (x, y, sample_weight), to measure after each epoch; validation_split is then
                not looked at.
            shuffle: take the rows in a new random order in each epoch.
            verbose: "auto" shows a progress bar where stderr is a terminal, True always, False never.
            augment: of `fastenc.data.augmentation`, any function from a batch [rows, features] to one of its shape, or
                a list of these: applied to all training rows anew before each epoch (batch by batch where they come
                from a Dataset or DataLoader). Without y the target stays the clean x. Makes a copy of x.
            sample_weight: [rows], 0 or more: how many times each row counts, as if it came so often. The loss is then
                the weighted mean, and steps stay as large as without weights. Metrics do not see them.
            resume: the folder of a checkpoint, or of several, of which the latest is taken: go on from there, up to
                `epochs` in all. On a CPU the bits are those of a fit that was not interrupted, if all else is as it
                was: data, arguments, callbacks in their order.

        Returns: History, in which "loss" is the mean over the rows of an epoch, each as it was when its step was taken.

        Raises:
            DataError: bad x, y, sample_weight, validation_data or validation_split, or a loss that cannot weigh rows.
                Arrays are looked at before the model is touched.
            CheckpointError: the checkpoint cannot be read or is of another model, optimiser or callbacks. The Trainer
                is as it was.
            FloatingPointError: a loss or a weight became NaN or Inf. The model and the optimiser are as before that
                step where the C++ engine took it and all weights are finite; else the model has the weights of the last
                good epoch and the optimiser starts afresh. (With EarlyStopping, those of the best epoch.)
        """
        _check_count("epochs", epochs)
        _check_count("batch_size", batch_size)
        if not 0.0 <= validation_split < 1.0:
            raise ValueError(f"validation_split is {validation_split}; it must be at least 0 and less than 1")
        with self.autocast():
            train, validation = read_train_and_validation(
                self.model,
                self.loss,
                x,
                y,
                sample_weight,
                batch_size,
                shuffle,
                validation_split,
                validation_data,
            )
            if augment is not None:
                train = augmented(train, augment, self.model, self.loss)
        callbacks = [*self.schedule, *callbacks, *([Progress(epochs)] if wants_progress(verbose) else [])]
        callbacks.sort(key=lambda callback: isinstance(callback, ModelCheckpoint))  # they save what the others know
        callbacks = [callback for callback in callbacks if is_first() or not callback.writes]
        for callback in callbacks:
            callback.trainer = self
        resumed = self._from_first(lambda: None if resume is None else Checkpoint.read(latest_checkpoint(resume)))
        fit = Fit(
            self,
            train,
            validation,
            epochs=epochs,
            batch_size=batch_size,
            shuffle=shuffle,
            callbacks=callbacks,
            resumed=resumed,
        )
        if resumed is not None:
            resumed.check(self, fit)
        self.history = History()
        self.stop_training = False
        self.fitting = fit
        with self._training():
            fit.run()
        return self.history

    @together
    def partial_fit(self, x: Any, y: Any = None, *, batch_size: int | None = None) -> float:
        """One pass over rows of a stream, in one step or in steps of `batch_size` rows, in their order.

        Optimiser, random numbers and the count of steps go on from call to call, and from and to `fit`; `history` stays
        as it is, and callbacks are not asked.

        Returns: the mean loss over the rows, each as it was when its step was taken.

        Raises:
            ValueError: the Trainer has a schedule, which needs an end; give lr a function of the step's number.
            DataError, FloatingPointError: as `fit`.
        """
        if self.schedule:
            raise ValueError("partial_fit has no end, and schedule needs one; make lr a function of the step's number")
        if batch_size is not None:
            _check_count("batch_size", batch_size)
        with self.autocast():
            train = read_source(self.model, self.loss, x, y, batch_size or EVALUATION_ROWS, False)
        size = batch_size or (len(train) if isinstance(train, Rows) else EVALUATION_ROWS)
        with self._training():
            return Fit(self, train, batch_size=size, shuffle=False).run_once()

    def save_checkpoint(self, folder: str | os.PathLike[str], *, preprocessing: dict[str, Any] | None = None) -> None:
        """Save model, optimiser, schedule, random numbers, position, history and callbacks to `folder`.

        The old checkpoint there is whole until the new one is. A model of this package can be had from the folder by
        `load_pretrained`, too. Callbacks may call this, after an epoch or a step; ModelCheckpoint does it by itself.

        Raises:
            CheckpointError, OSError: it cannot be saved; the message says why.
        """
        if is_first():
            save_checkpoint(self, folder, preprocessing=preprocessing)

    @together
    def load_checkpoint(self, folder: str | os.PathLike[str]) -> None:
        """Go on from what `save_checkpoint` wrote, without a fit: callbacks are left out.

        Raises:
            CheckpointError: as `fit`.
        """
        checkpoint = self._from_first(lambda: Checkpoint.read(latest_checkpoint(folder)))
        checkpoint.check(self, None)
        checkpoint.apply(self, None)

    @together
    def find_lr(
        self,
        x: Any,
        y: Any = None,
        *,
        batch_size: int = 32,
        lowest: float = 1e-7,
        highest: float = 10.0,
        steps: int = 100,
    ) -> LearningRates:
        """Try learning rates from `lowest` to `highest`, one step each, until the loss explodes.

        The rates of all parameter groups are the one that is tried. Afterwards model, optimiser and random numbers are
        as they were.

        Returns: LearningRates, with `suggestion` and `plot(path)`.

        Raises:
            DataError: as `fit`; a Dataset or DataLoader, too.
            ValueError: the rates or steps make no range.
        """
        _check_count("batch_size", batch_size)
        with self.autocast():
            train = read_source(self.model, self.loss, x, y, batch_size, True)
        if not isinstance(train, Rows):
            raise DataError("find_lr needs arrays, and x is a Dataset or DataLoader; give it some of the rows")
        with self._training():
            if self.share is not None:
                self.share.agree_on(train)
                self.share.copy_from_first()
            return find_rates(self, train, batch_size, lowest, highest, steps)

    @together
    def evaluate(
        self,
        x: Any,
        y: Any = None,
        *,
        batch_size: int = EVALUATION_ROWS,
        callbacks: Sequence[Callback] = (),
        sample_weight: Any = None,
    ) -> dict[str, float]:
        """{"loss": mean over the rows}, for cross_entropy "accuracy", and the metrics: in eval mode, no gradients.

        sample_weight: [rows], as in `fit`: loss and accuracy are then weighted means, and metrics do not see it.
        """
        _check_count("batch_size", batch_size)
        for callback in callbacks:
            callback.trainer = self
        with self.autocast():
            source = evened(read_source(self.model, self.loss, x, y, batch_size, False, sample_weight), "x")
            if self.share is not None:
                self.share.agree_on(source)
            return measure(self, source, batch_size, callbacks)

    def predict(self, x: Any, *, batch_size: int = EVALUATION_ROWS) -> Any:
        """The model's output for each row of x, in eval mode, without gradients.

        Returns: [rows, ...], a torch tensor on x's device if x is one, otherwise a numpy array (bf16 as float32).
        """
        return self._outputs(self.model, x, batch_size)

    def encode(self, x: Any, *, batch_size: int = EVALUATION_ROWS) -> Any:
        """The code of each row of x, by the model's `encode` or, if it has none, by the model; else as `predict`."""
        return self._outputs(getattr(self.model, "encode", self.model), x, batch_size)

    def explain(self) -> str:
        """How the steps of the latest `fit` were taken, and why: by the C++ engine, by a CUDA graph, or one by one."""
        return self.how

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision's, around what the model computes; nothing for fp32."""
        dtype = PRECISIONS[self.precision]
        return nullcontext() if dtype is None else torch.autocast(place_of(self.model).device.type, dtype)

    def batch_loss(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss of a batch, or of this process's share of it."""
        return self.loss_function(output, target) if self.share is None else self.share.loss(output, target)

    def checked_loss(self, output: Tensor, target: Tensor) -> Tensor:
        return self.batch_loss(output, fit_target(target, output, self.loss, "the target"))

    def measured_loss(self, output: Tensor, target: Tensor) -> Tensor:
        """As `checked_loss`, and the metrics see the batch."""
        target = fit_target(target, output, self.loss, "the target")
        self.metrics.update(output, target, self.share)
        return self.batch_loss(output, target)

    def _from_first(self, read: Callable[[], T]) -> T:
        """What `read` gives here, or on process 0 of several, whose folders the others need not see."""
        return read() if self.share is None else self.share.processes.from_first(read)

    def _outputs(self, function: Callable[[Tensor], Tensor], x: Any, batch_size: int) -> Any:
        _check_count("batch_size", batch_size)
        source = read_inputs(self.model, x, None, batch_size, False)
        with mode(self.model, training=False), torch.inference_mode():
            result = outputs(function, source, batch_size)
        if isinstance(x, Tensor):
            return result.to(x.device)
        return (result.float() if result.dtype == torch.bfloat16 else result).cpu().numpy()

    @contextmanager
    def _training(self) -> Iterator[None]:
        """The Trainer's random numbers, training mode and precision."""
        with self.random_numbers.use(place_of(self.model).device), mode(self.model, training=True), self.autocast():
            yield


def _check_count(name: str, count: int) -> None:
    if not isinstance(count, (int, np.integer)) or count < 1:
        raise ValueError(f"{name} is {count!r}; it must be a whole number of at least 1")
