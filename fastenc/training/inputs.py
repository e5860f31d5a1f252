"""What the Trainer's methods are given, as sources of batches for its model: inputs, targets, weights, validation."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastenc.data import DataError

from .losses import LossFunction, fit_target, one_class, weight_reason
from .measuring import EVALUATION_ROWS
from .sources import Rows, Stream, is_stream, make_rows, make_stream
from .weights import mode

NAMES = ("x", "y")  # in messages


def place_of(model: nn.Module) -> Tensor:
    """A parameter whose device and dtype are the model's."""
    return next(parameter for parameter in model.parameters() if parameter.is_floating_point())


def in_features(model: nn.Module) -> int | None:
    """How many features a row has that the model takes, where the model tells: itself, its encoder or first layer."""
    if isinstance(model, nn.Sequential):
        return in_features(model[0]) if len(model) else None
    features = getattr(getattr(model, "encoder", model), "in_features", None)
    return features if isinstance(features, int) and features > 0 else None


def read_inputs(
    model: nn.Module, x: Any, y: Any, batch_size: int, shuffle: bool, names: tuple[str, str] = NAMES
) -> Rows | Stream:
    """Arrays as rows, and a Dataset or DataLoader as a stream, on the model's device and in its dtype."""
    parameter = place_of(model)
    place = (parameter.device, parameter.dtype, in_features(model))
    if is_stream(x):
        return make_stream(x, y, names[0], batch_size, shuffle, *place)
    return make_rows(x, y, names, *place)


def read_source(
    model: nn.Module,
    loss: str | LossFunction,
    x: Any,
    y: Any,
    batch_size: int,
    shuffle: bool,
    weight: Any = None,
    names: tuple[str, str] = NAMES,
) -> Rows | Stream:
    """Inputs, targets and weights, of which arrays are checked as a whole and streams batch by batch."""
    source = read_inputs(model, x, y, batch_size, shuffle, names)
    if weight is not None:
        if isinstance(source, Stream):
            raise DataError(f"sample_weight needs arrays, and {names[0]} is a Dataset or DataLoader; leave it out")
        if reason := weight_reason(loss):
            raise DataError(f"sample_weight weighs each row, and {reason}")
        source = source.weighed(weight, "sample_weight")
    if isinstance(source, Stream) or callable(loss):
        return source
    if y is None and loss == "cross_entropy":
        raise DataError(f"loss='cross_entropy' needs labels, and there is no {names[1]}; give one label for each row")
    with mode(model, training=False), torch.inference_mode():
        output = model(source.x[:1].clone())  # a model may write to its input
    target = fit_target(source.target, output, loss, names[0] if y is None else names[1])
    return replace(source, target=target)


def read_train_and_validation(
    model: nn.Module,
    loss: str | LossFunction,
    x: Any,
    y: Any,
    weight: Any,
    batch_size: int,
    shuffle: bool,
    validation_split: float,
    validation_data: Any,
) -> tuple[Rows | Stream, Rows | Stream | None]:
    """What `Trainer.fit` trains on, and what it measures after each epoch, if anything."""
    train = read_source(model, loss, x, y, batch_size, shuffle, weight)
    if validation_data is not None:
        given = validation_data if isinstance(validation_data, tuple) else (validation_data, None)
        if len(given) not in (2, 3):
            raise ValueError(f"validation_data is a tuple of {len(given)}; give x, (x, y) or (x, y, sample_weight)")
        names = ("validation x", "validation y")
        weight = given[2] if len(given) == 3 else None
        validation = read_source(model, loss, given[0], given[1], EVALUATION_ROWS, False, weight, names)
        return evened(train, "x"), evened(validation, "validation x")
    if validation_split == 0.0:
        return evened(train, "x"), None
    if not isinstance(train, Rows):
        raise DataError("validation_split needs arrays, and x is a Dataset or DataLoader; give validation_data")
    train, validation = train.split(validation_split)
    if loss == "cross_entropy" and one_class(validation.target) and not one_class(train.target):
        warnings.warn(
            f"the last {validation_split:g} of the rows, which validation_split takes, are of one class; mix the "
            "rows before, or give validation_data",
            stacklevel=3,
        )
    return evened(train, "x without the validation split"), evened(validation, "the validation split")


def evened(source: Rows | Stream, name: str) -> Rows | Stream:
    """The source with weights of mean 1, if it has any."""
    return source.evened(name) if isinstance(source, Rows) else source
