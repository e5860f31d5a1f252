"""Optimisers by name: PyTorch's own, fused where PyTorch can."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

OptimizerLike = str | Optimizer | Callable[[list[nn.Parameter]], Optimizer]

RateFunction = Callable[[int], float]

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
DEFAULT_LR = 1e-3


def make_optimizer(
    optimizer: OptimizerLike,
    parameters: Iterable[nn.Parameter],
    lr: float | RateFunction,
    weight_decay: float,
    momentum: float,
    nesterov: bool,
) -> Optimizer:
    """An optimiser over those of `parameters` that require gradients; with a RateFunction, at the rate of step 0.

    Raises:
        ValueError: nothing to train, an unknown name, an option that the optimiser does not take, a negative or NaN
            option, or an instance that holds none of the parameters.
        TypeError: something that is no optimiser and makes none.
    """
    if not isinstance(optimizer, (str, Optimizer)) and not callable(optimizer):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}; give one of {', '.join(OPTIMIZERS)}, an Optimizer, or a "
            "function that makes one from a list of parameters"
        )
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if not trainable:
        raise ValueError("the model has no parameter to train; set requires_grad on those that should be trained")
    if isinstance(optimizer, str):
        return _named(optimizer, trainable, lr, weight_decay, momentum, nesterov)
    if (lr, weight_decay, momentum, nesterov) != (DEFAULT_LR, 0.0, 0.0, False):
        raise ValueError(
            "lr, weight_decay, momentum and nesterov belong to optimisers given by name; set them on your optimiser"
        )
    made = optimizer if isinstance(optimizer, Optimizer) else optimizer(trainable)
    if not isinstance(made, Optimizer):
        raise TypeError(f"the optimizer's function gives a {type(made).__name__}; make it give a torch.optim.Optimizer")
    wanted = {id(parameter) for parameter in trainable}
    if not any(id(parameter) in wanted for group in made.param_groups for parameter in group["params"]):
        raise ValueError("the optimiser holds none of the model's parameters; make it from model.parameters()")
    return made


def rate_at(schedule: RateFunction, step: int) -> float:
    """The learning rate of a step.

    Raises:
        ValueError: it is not a number of at least 0.
    """
    rate = schedule(step)
    if not (isinstance(rate, Real) and rate >= 0.0):
        raise ValueError(f"lr gives {rate!r} for step {step}; make it give a number of at least 0")
    return float(rate)


def _named(
    name: str,
    parameters: list[nn.Parameter],
    lr: float | RateFunction,
    weight_decay: float,
    momentum: float,
    nesterov: bool,
) -> Optimizer:
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer is {name!r}; give one of {', '.join(OPTIMIZERS)}, an Optimizer, or a function")
    options: dict[str, Any] = {"lr": rate_at(lr, 0) if callable(lr) else lr, "weight_decay": weight_decay}
    for option, value in (*options.items(), ("momentum", momentum)):
        if not value >= 0.0:
            raise ValueError(f"{option} is {value!r}; give a number of at least 0")
    if name == "sgd":
        if nesterov and momentum == 0.0:
            raise ValueError("nesterov=True needs a momentum above 0; give one, such as momentum=0.9")
        options |= {"momentum": momentum, "nesterov": nesterov}
    elif momentum != 0.0 or nesterov:
        given = f"momentum is {momentum}" if momentum != 0.0 else "nesterov is True"
        raise ValueError(f"{given} and {name} takes none; use optimizer='sgd', or leave it out")
    try:
        return OPTIMIZERS[name](parameters, fused=True, **options)
    except RuntimeError:  # PyTorch has no fused kernel for this device or dtype
        return OPTIMIZERS[name](parameters, **options)
