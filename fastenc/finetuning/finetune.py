"""finetune(): three strategies behind one interface."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fastenc.data import DataError, as_rows
from fastenc.data.augmentation import mixes

from ..encoder import Encoder
from ..loading import load_pretrained
from ..lora import add_lora, merge_lora
from ..training import Callback, EarlyStopping, History, Trainer
from ..training.augmented import Augment
from ..training.losses import LossFunction
from ..training.optimizers import DEFAULT_LR, OptimizerLike, RateFunction, make_optimizer
from ..training.rng import RandomNumbers
from .goals import Goal, Goals, read_goals
from .layers import GradualUnfreezing, encoder_layers, freeze_layers, layer_groups, regroup
from .pretraining import Pretraining, pretrain

STRATEGIES = ("scratch", "pretrain", "transfer")


@dataclass(frozen=True)
class FineTuned:
    """What `finetune` gives.

    Attributes:
        model: a Classifier or Regressor, for several targets a MultiTask (for the loss "triplet", the Encoder), all of
            it trainable again.
        history: of the training with labels. Losses of scaled targets are in their units.
        how: how its steps were taken, as `Trainer.explain` tells it.
        classes: the label of each of the Classifier's outputs; None for regression; of several targets by name.
        pretraining: the stage before, with its history and how; None if there was none.
    """

    model: Any
    history: History
    how: str
    classes: Any
    pretraining: Pretraining | None

    def predict(self, x: Any) -> Any:
        """Of each row its class's label, or its numbers: [rows] for one output, [rows, outputs] for more.

        For several targets a dict of these by name; for the loss "triplet" the codes.
        """
        outputs = np.asarray(Trainer(self.model).predict(x))
        if isinstance(self.model, Encoder):
            return outputs
        if isinstance(self.classes, dict):
            return {name: _answers(part, self.classes[name]) for name, part in self.model.split(outputs).items()}
        return _answers(outputs, self.classes)


def _answers(outputs: np.ndarray, classes: np.ndarray | None) -> np.ndarray:
    if classes is not None:
        return classes[outputs.argmax(1)]
    return outputs[:, 0] if outputs.shape[1] == 1 else outputs


def finetune(
    x: Any,
    y: Any,
    *,
    strategy: str = "scratch",
    encoder: Any = None,
    widths: Sequence[int] = (128, 64, 32, 16),
    activation: str = "relu",
    dropout: float = 0.0,
    task: str | Mapping[str, str] = "auto",
    unlabelled: Any = None,
    pretraining: str = "autoencoder",
    pretraining_options: dict[str, Any] | None = None,
    frozen: int | None = None,
    unfreeze_every: int | None = None,
    layer_decay: float = 1.0,
    lora_rank: int | None = None,
    lora_alpha: float = 16.0,
    lora_dropout: float = 0.0,
    optimizer: OptimizerLike = "adam",
    lr: float | RateFunction = DEFAULT_LR,
    loss: str | LossFunction | Mapping[str, str] | None = None,
    weights: Mapping[str, float] | None = None,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    nesterov: bool = False,
    scale_targets: bool = True,
    epochs: int = 100,
    batch_size: int = 32,
    validation_split: float = 0.0,
    validation_data: Any = None,
    patience: int | None = None,
    augment: Augment | None = None,
    callbacks: Sequence[Callback] = (),
    seed: int | None = None,
    device: torch.device | str | None = None,
    verbose: bool | str = "auto",
    **trainer: Any,
) -> FineTuned:
    """Train an encoder and a head on labelled rows.

    Args:
        x, y: [rows, features], and a label (text, booleans, whole numbers) or numbers for each row, arrays of any kind.
            A mapping from names to such targets trains one encoder with a head for each (`MultiTask`).
        strategy: "scratch"; "pretrain", first without labels on `unlabelled`; "transfer", from a trained `encoder`.
        encoder: a folder of `save_pretrained`, an Encoder, or a model with one; a copy of it is trained. None makes one
            of `widths`, `activation` and `dropout`, except for "transfer".
        task: "classification", "regression", or "auto": whole numbers, booleans and text are classes. Of several
            targets one for all, or by name.
        unlabelled: rows for pre-training; None for the rows that are trained on.
        pretraining, pretraining_options: the `method`, and other arguments, of `fastenc.finetuning.pretrain`.
        frozen: how many of the encoder's first layers are not trained. None: for "transfer" all but the last, or with
            `unfreeze_every` all; otherwise none.
        unfreeze_every: train one more of the frozen layers, from the top down, after every so many epochs.
        layer_decay: the head learns at lr, each layer of the encoder below it at this times the rate of the one above.
        lora_rank, lora_alpha, lora_dropout: train low-rank adapters of this rank and the head, not the encoder's
            weights; the adapters are merged at the end (`fastenc.add_lora`).
        optimizer, lr, weight_decay, momentum, nesterov: as of Trainer.
        loss: as of Trainer; None for cross_entropy or mse. "triplet" trains the encoder without a head. Of several
            targets by name.
        weights: of several targets, by name, what the loss of each counts in the sum; 1 where it is left out.
        scale_targets: for regression with mse, mae and huber, train on targets of mean 0 and deviation 1, and put their
            scale into the head at the end.
        validation_split: share of the rows, chosen at random by `seed` (of each class alike), not trained on.
        validation_data: (x, y) to measure after each epoch, in place of the split.
        patience: stop when val_loss got no better for so many epochs; the best weights are kept.
        augment, epochs, batch_size, callbacks, verbose: as of `Trainer.fit`.
        seed: makes all of it repeatable.
        trainer: other options of the Trainer (l1, clip_norm, ...), for the training with labels.

    Raises:
        ValueError: options that are wrong or do not go together.
        DataError: bad rows; missing labels, a single class, labels that only validation has, or a split without rows,
            of one class, or with all rows of a class.
        ModelFileError: the folder holds no intact model.
        FloatingPointError: as `Trainer.fit`.
    """
    _check(strategy, encoder, unlabelled, pretraining_options, lora_rank, frozen, unfreeze_every, layer_decay, lr)
    rows = as_rows(x)
    goal = read_goals(y, len(rows), task, loss, weights, scale_targets)
    if (
        augment is not None
        and mixes(augment)
        and isinstance(goal, Goals)
        and any(each is not None for each in goal.classes.values())
    ):
        raise ValueError("Mixup cannot mix the labels of several targets; leave it out, or train on one target")
    training, validation = _parts(rows, goal, validation_split, validation_data, seed)
    if patience is not None and validation is None:
        raise ValueError("patience needs validation rows; give validation_split or validation_data")
    numbers = RandomNumbers(seed)
    with numbers.use(torch.device("cpu")):
        made = _encoder(encoder, rows.shape[1], widths, activation, dropout)
        made = made if device is None else made.to(device)
        before = None
        if strategy == "pretrain":
            options = {"method": pretraining, "seed": seed, "verbose": verbose, **(pretraining_options or {})}
            before = _pretrain(made, training[0] if unlabelled is None else unlabelled, options)
        model = goal.model(made)
        if lora_rank is not None:
            add_lora(model.encoder, lora_rank, lora_alpha, lora_dropout)
    goal.learn_scale(training[1])
    training = training[0], goal.to_units(training[1])
    validation = validation and (validation[0], goal.to_units(validation[1]))

    named: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov}
    if layer_decay != 1.0 or unfreeze_every is not None:
        optimizer = make_optimizer(optimizer, model.parameters(), lr, weight_decay, momentum, nesterov)
        if layer_decay != 1.0:
            regroup(optimizer, layer_groups(model, cast(float, lr), layer_decay))
        named = {}
    if frozen is None:
        layers = len(encoder_layers(model))
        frozen = layers if unfreeze_every is not None else layers - 1 if strategy == "transfer" else 0
        frozen = 0 if lora_rank is not None else frozen
    freeze_layers(model, frozen)
    fitter = Trainer(model, optimizer, loss=goal.loss_of(model), seed=seed, **named, **trainer)
    history = fitter.fit(
        *training,
        epochs=epochs,
        batch_size=batch_size,
        validation_data=validation,
        augment=augment,
        verbose=verbose,
        callbacks=[
            *([GradualUnfreezing(unfreeze_every)] if unfreeze_every is not None else []),
            *([EarlyStopping(patience=patience)] if patience is not None else []),
            *callbacks,
        ],
    )
    if lora_rank is not None:
        merge_lora(model)
    goal.put_scale_into(model)
    return FineTuned(model.requires_grad_(True), history, fitter.explain(), goal.classes, before)


def _check(
    strategy: str,
    encoder: Any,
    unlabelled: Any,
    pretraining_options: dict[str, Any] | None,
    lora_rank: int | None,
    frozen: int | None,
    unfreeze_every: int | None,
    layer_decay: float,
    lr: float | RateFunction,
) -> None:
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy is {strategy!r}; give one of {', '.join(STRATEGIES)}")
    if strategy == "transfer" and encoder is None:
        raise ValueError("strategy='transfer' needs a trained encoder; give a model or its folder as encoder")
    if strategy != "pretrain" and (unlabelled is not None or pretraining_options):
        raise ValueError(f"unlabelled rows are for strategy='pretrain' and it is {strategy!r}; change one of the two")
    if lora_rank is not None and (frozen or unfreeze_every is not None or layer_decay != 1.0):
        raise ValueError("lora_rank freezes the encoder itself; leave out frozen, unfreeze_every and layer_decay")
    if callable(lr) and (unfreeze_every is not None or layer_decay != 1.0):
        raise ValueError("lr is a function and layer_decay and unfreeze_every need a number; give lr as a number")


def _parts(
    rows: Tensor, goal: Goal | Goals, split: float, data: Any, seed: int | None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
    """(x, targets) to train on and to validate on."""
    if data is not None:
        if not isinstance(data, tuple) or len(data) != 2:
            raise ValueError("validation_data must be (x, y)")
        x = as_rows(data[0], name="validation x", features=rows.shape[1])
        return (rows, goal.values), (x, goal.match(data[1], len(x), "validation y"))
    if not 0.0 <= split < 1.0:
        raise ValueError(f"validation_split is {split}; it must be at least 0 and less than 1")
    if split == 0.0:
        return (rows, goal.values), None
    values = goal.values
    first, second = (torch.from_numpy(part) for part in goal.split(split, seed))
    return (rows[first], values[first]), (rows[second], values[second])


def _encoder(given: Any, features: int, widths: Sequence[int], activation: str, dropout: float) -> Encoder:
    """A new encoder, or a copy of the one that is given or lies in a folder; trainable."""
    if given is None:
        return Encoder(features, widths, activation, dropout=dropout)
    if isinstance(given, (str, os.PathLike)):
        given = load_pretrained(given)
    found = getattr(given, "encoder", given)
    if not isinstance(found, Encoder):
        raise ValueError(f"encoder is a {type(given).__name__}; give a folder, an Encoder, or a model that has one")
    if found.in_features != features:
        raise DataError(
            f"x has {features} columns and the encoder takes {found.in_features}; give the columns that it was trained "
            "on, in the same order"
        )
    return copy.deepcopy(found).requires_grad_(True).train()


def _pretrain(encoder: Encoder, x: Any, options: dict[str, Any]) -> Pretraining:
    try:
        return pretrain(encoder, x, **options)
    except FloatingPointError as error:
        raise FloatingPointError(f"in pre-training {error}") from error
