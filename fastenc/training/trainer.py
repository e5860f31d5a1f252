"""Trainer: fit, evaluate, predict and encode for any module, with Keras's meaning of their arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastenc.data import DataError

from .augmented import Augment, AugmentedRows, augmented
from .callbacks import Callback, History
from .engine import EngineSteps
from .graph import WholeSteps
from .losses import LossFunction, fit_target, get_loss
from .optimizers import DEFAULT_LR, OptimizerLike, Schedule, make_optimizer
from .progress import Progress, wants_progress
from .recorder import CudaRecorder
from .rng import RandomNumbers
from .sources import Rows, Stream, is_stream, make_rows, make_stream
from .steps import train_batches
from .update import Update
from .weights import Snapshot, all_finite, mode

EVALUATION_ROWS = 1024  # at a time, where nothing is learned


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
        loss: "mse", "mae", "huber" (delta 1), "cross_entropy" (the model gives logits), "bce" (the model gives
            probabilities), "bce_with_logits", "cosine", "info_nce" (the target is each row's partner), "triplet" (of
            labels; both over the rows of a batch), or a function of (prediction, target): the mean over the rows.
        seed: makes shuffling and dropout repeatable: the Trainer draws from random numbers of its own and PyTorch's
            global ones stay as they are, and `fit` for one epoch twice is `fit` for two. None: from the global ones.
        device: where to put the model; None leaves it where it is. Data follows the model.

    Attributes:
        history: the History of the latest `fit`, while it runs and after an error or Ctrl-C too.
        stop_training: set to True by a callback to end `fit`.

    Arrays: x is what `fastenc.data.as_rows` takes, tensors, numpy arrays, memory maps, pandas and pyarrow tables, or a
    torch Dataset or DataLoader that gives x or (x, y). A DataLoader's own batch size and shuffling hold, not those
    given here; a Dataset is read in batches of `batch_size`. Arrays are copied to the model's device as a whole.

    On the CPU a C++ engine takes whole steps of the encoders and heads of this package where nothing asks for more; on
    a GPU the step of a full batch is replayed from a CUDA graph where it can be: see `explain` and docs/gpu.md.

    Raises:
        ValueError: an unknown name, a negative or NaN option, or one that does not go with the others.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerLike = "adam",
        lr: float | Schedule = DEFAULT_LR,
        loss: str | LossFunction = "mse",
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        nesterov: bool = False,
        l1: float = 0.0,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        seed: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self._loss = get_loss(loss)
        self.loss = loss
        self.model = model if device is None else model.to(device)
        self.optimizer = make_optimizer(optimizer, model.parameters(), lr, weight_decay, momentum, nesterov)
        self._update = Update(self.optimizer, l1, clip_norm, clip_value, rate=lr if callable(lr) else None)
        self.history = History()
        self.stop_training = False
        self._random_numbers = RandomNumbers(seed)
        self._recorder = CudaRecorder()
        self._how = "no fit was started"

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
    ) -> History:
        """Train for `epochs` passes over the rows.

        Args:
            x, y: inputs [rows, features] and targets; without y the target is x.
            batch_size: rows in a step; the last step of an epoch takes what is left.
            validation_split: this last fraction of the rows, before shuffling, is measured and not trained on.
            validation_data: x, or (x, y), to measure after each epoch; validation_split is then not looked at.
            shuffle: take the rows in a new random order in each epoch.
            verbose: "auto" shows a progress bar where stderr is a terminal, True always, False never.
            augment: of `fastenc.data.augmentation`, any function from a batch [rows, features] to one of its shape, or
                a list of these: applied to all training rows anew before each epoch (batch by batch where they come
                from a Dataset or DataLoader). Without y the target stays the clean x. Makes a copy of x.

        Returns: History, in which "loss" is the mean over the rows of an epoch, each as it was when its step was taken.

        Raises:
            DataError: bad x, y, validation_data or validation_split. Arrays are looked at before the model is touched.
            FloatingPointError: a loss or a weight became NaN or Inf. The model and the optimiser are as before that
                step where the C++ engine took it and all weights are finite; else the model has the weights of the last
                good epoch and the optimiser starts afresh. (With EarlyStopping, those of the best epoch.)
        """
        _check_count("epochs", epochs)
        _check_count("batch_size", batch_size)
        if not 0.0 <= validation_split < 1.0:
            raise ValueError(f"validation_split is {validation_split}; it must be at least 0 and less than 1")
        train = self._source(x, y, ("x", "y"), batch_size, shuffle)
        validation: Rows | Stream | None = None
        if validation_data is not None:
            pair = validation_data if isinstance(validation_data, tuple) else (validation_data, None)
            if len(pair) != 2:
                raise ValueError(f"validation_data is a tuple of {len(pair)}; give x or (x, y)")
            validation = self._source(*pair, ("validation x", "validation y"), EVALUATION_ROWS, False)
        elif validation_split > 0.0:
            if not isinstance(train, Rows):
                raise DataError("validation_split needs arrays, and x is a Dataset or DataLoader; give validation_data")
            train, validation = train.split(validation_split)
        if augment is not None:
            train = augmented(train, augment, self.model, self.loss)
        callbacks = [*callbacks, *([Progress(epochs)] if wants_progress(verbose) else [])]
        for callback in callbacks:
            callback.trainer = self
        self.history = History()
        self.stop_training = False
        with self._random_numbers.use(self._parameter().device), mode(self.model, training=True):
            self._epochs(train, validation, epochs, batch_size, shuffle, callbacks)
        return self.history

    def evaluate(self, x: Any, y: Any = None, *, batch_size: int = EVALUATION_ROWS) -> dict[str, float]:
        """{"loss": mean over the rows} and, for cross_entropy, "accuracy"; in eval mode, without gradients."""
        _check_count("batch_size", batch_size)
        return self._evaluate(self._source(x, y, ("x", "y"), batch_size, False), batch_size)

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
        return self._how

    def _epochs(
        self,
        train: Rows | Stream,
        validation: Rows | Stream | None,
        epochs: int,
        batch_size: int,
        shuffle: bool,
        callbacks: Sequence[Callback],
    ) -> None:
        good = Snapshot(self.model)
        whole: EngineSteps | WholeSteps | None = None
        if not isinstance(train, Rows):
            self._how = "step by step: the data comes from a Dataset or DataLoader"
        elif reason := self._recorder.why_not(train.x.device):
            watchful = any(type(callback) is not Progress for callback in callbacks)
            whole = EngineSteps(train, batch_size, reason, watchful)
        else:
            whole = WholeSteps(train, batch_size, self._recorder)
        for callback in callbacks:
            callback.on_train_begin()
        try:
            for epoch in range(epochs):
                for callback in callbacks:
                    callback.on_epoch_begin(epoch)
                logs = {"loss": self._train_epoch(epoch, train, whole, shuffle, callbacks)}
                good.take()
                if validation is not None:
                    measured = self._evaluate(validation, EVALUATION_ROWS)
                    logs.update({f"val_{name}": value for name, value in measured.items()})
                self.history.add(epoch, logs)
                for callback in callbacks:
                    callback.on_epoch_end(epoch, logs)
                if self.stop_training:
                    break
        except BaseException as error:
            stopped_in_time = isinstance(whole, EngineSteps) and whole.stopped_in_time
            if (isinstance(error, FloatingPointError) and not stopped_in_time) or not all_finite(self.model):
                good.restore()
                self.optimizer.state.clear()  # its averages are NaN as well
            raise
        finally:
            if whole is not None:
                self._how = whole.explanation
                whole.close()
            for callback in callbacks:
                callback.on_train_end()

    def _train_epoch(
        self,
        epoch: int,
        train: Rows | Stream,
        whole: EngineSteps | WholeSteps | None,
        shuffle: bool,
        callbacks: Sequence[Callback],
    ) -> float:
        """Train one epoch; its mean loss over the rows."""
        listeners = [c for c in callbacks if type(c).on_train_batch_end is not Callback.on_train_batch_end]

        def after_step(step: int, value: Tensor) -> bool:
            logs = {"loss": value.item()}
            for listener in listeners:
                listener.on_train_batch_end(step, logs)
            return self.stop_training

        hook = after_step if listeners else None
        update = replace(self._update, optimizer=self.optimizer)  # a callback may have set another
        if isinstance(train, AugmentedRows):
            train.renew()
        if isinstance(train, Rows):
            order = torch.randperm(len(train)).to(train.x.device) if shuffle else None
            assert whole is not None
            losses, counts = whole.train(self.model, self._loss, update, order, hook)
        else:
            losses, counts = train_batches(self.model, self._checked_loss, update, train.batches(), hook)
        losses = losses.double().cpu()
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            step = int(bad[0])
            kept = isinstance(whole, EngineSteps) and whole.stopped_in_time and all_finite(self.model)
            raise FloatingPointError(
                f"the loss became {losses[step].item()} in epoch {epoch + 1}, step {step + 1}, and the model has the "
                f"weights from before that {'step' if kept else 'epoch again'}; try a smaller lr, or scale the data"
            )
        if not all_finite(self.model):
            raise FloatingPointError(
                f"a weight became NaN or Inf in the last step of epoch {epoch + 1}, and the model has the weights from "
                "before that epoch again; try a smaller lr, or scale the data"
            )
        return float((losses * counts).sum() / counts.sum())

    def _evaluate(self, source: Rows | Stream, batch_size: int) -> dict[str, float]:
        count = 0
        total = correct = torch.zeros((), dtype=torch.float64, device=self._parameter().device)
        with mode(self.model, training=False), torch.inference_mode():
            for x, target in source.batches(batch_size):
                output = self.model(x)
                if isinstance(source, Stream):
                    target = fit_target(target, output, self.loss, f"the target in {source.name}")
                count += len(x)
                total = total + self._loss(output, target).double() * len(x)
                if self.loss == "cross_entropy":
                    labels = target if target.ndim < output.ndim else target.argmax(1)
                    correct = correct + (output.argmax(1) == labels).double().mean() * len(x)
        results = {"loss": float(total) / count}
        if self.loss == "cross_entropy":
            results["accuracy"] = float(correct) / count
        return results

    def _outputs(self, function: Callable[[Tensor], Tensor], x: Any, batch_size: int) -> Any:
        _check_count("batch_size", batch_size)
        source = self._inputs(x, None, ("x", "y"), batch_size, False)
        rows = len(source) if isinstance(source, Rows) else 0  # of a stream it shows at its end
        result, parts, start = None, [], 0
        with mode(self.model, training=False), torch.inference_mode():
            for batch, _ in source.batches(batch_size):
                part = function(batch)
                if not isinstance(part, Tensor):
                    raise TypeError(f"the model gives a {type(part).__name__}; predict and encode need one tensor")
                if not rows:
                    parts.append(part)
                    continue
                if result is None:
                    with torch.inference_mode(False):  # so that the result can be trained on
                        result = torch.empty((rows, *part.shape[1:]), dtype=part.dtype, device=part.device)
                result[start : start + len(part)] = part
                start += len(part)
        if result is None:
            result = torch.cat(parts)
        if isinstance(x, Tensor):
            return result.to(x.device)
        return (result.float() if result.dtype == torch.bfloat16 else result).cpu().numpy()

    def _parameter(self) -> Tensor:
        """A parameter whose device and dtype are the model's."""
        return next(parameter for parameter in self.model.parameters() if parameter.is_floating_point())

    def _inputs(self, x: Any, y: Any, names: tuple[str, str], batch_size: int, shuffle: bool) -> Rows | Stream:
        parameter = self._parameter()
        place = (parameter.device, parameter.dtype, in_features(self.model))
        if is_stream(x):
            return make_stream(x, y, names[0], batch_size, shuffle, *place)
        return make_rows(x, y, names, *place)

    def _source(self, x: Any, y: Any, names: tuple[str, str], batch_size: int, shuffle: bool) -> Rows | Stream:
        """Inputs and targets, of which arrays are checked as a whole and streams batch by batch."""
        source = self._inputs(x, y, names, batch_size, shuffle)
        if isinstance(source, Stream) or callable(self.loss):
            return source
        if y is None and self.loss == "cross_entropy":
            raise DataError(
                f"loss='cross_entropy' needs labels, and there is no {names[1]}; give one label for each row"
            )
        with mode(self.model, training=False), torch.inference_mode():
            output = self.model(source.x[:1].clone())  # a model may write to its input
        target = fit_target(source.target, output, self.loss, names[0] if y is None else names[1])
        return replace(source, target=target)

    def _checked_loss(self, output: Tensor, target: Tensor) -> Tensor:
        return self._loss(output, fit_target(target, output, self.loss, "the target"))


def in_features(model: nn.Module) -> int | None:
    """How many features a row has that the model takes, where the model tells: itself, its encoder or first layer."""
    if isinstance(model, nn.Sequential):
        return in_features(model[0]) if len(model) else None
    features = getattr(getattr(model, "encoder", model), "in_features", None)
    return features if isinstance(features, int) and features > 0 else None


def _check_count(name: str, count: int) -> None:
    if not isinstance(count, (int, np.integer)) or count < 1:
        raise ValueError(f"{name} is {count!r}; it must be a whole number of at least 1")
