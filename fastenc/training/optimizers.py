"""Optimisers by name: PyTorch's own, fused where PyTorch can."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

OptimizerLike = str | Optimizer | Callable[[list[nn.Parameter]], Optimizer]

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
DEFAULT_LR = 1e-3


def make_optimizer(
    optimizer: OptimizerLike, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, momentum: float
) -> Optimizer:
    """An optimiser over those of `parameters` that require gradients.

    Raises:
        ValueError: nothing to train, an unknown name, an option that the optimiser does not take, or an instance that
            holds none of the parameters.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if not trainable:
        raise ValueError("the model has no parameter to train; set requires_grad on those that should be trained")
    if isinstance(optimizer, str):
        return _named(optimizer, trainable, lr, weight_decay, momentum)
    if (lr, weight_decay, momentum) != (DEFAULT_LR, 0.0, 0.0):
        raise ValueError("lr, weight_decay and momentum belong to optimisers given by name; set them on your optimiser")
    made = optimizer if isinstance(optimizer, Optimizer) else optimizer(trainable)
    wanted = {id(parameter) for parameter in trainable}
    if not any(id(parameter) in wanted for group in made.param_groups for parameter in group["params"]):
        raise ValueError("the optimiser holds none of the model's parameters; make it from model.parameters()")
    return made


def _named(name: str, parameters: list[nn.Parameter], lr: float, weight_decay: float, momentum: float) -> Optimizer:
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer is {name!r}; give one of {', '.join(OPTIMIZERS)}, an Optimizer, or a function")
    options: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    if name == "sgd":
        options["momentum"] = momentum
    elif momentum != 0.0:
        raise ValueError(f"momentum is {momentum} and {name} takes none; use optimizer='sgd', or leave it out")
    try:
        return OPTIMIZERS[name](parameters, fused=True, **options)
    except RuntimeError:  # PyTorch has no fused kernel for this device or dtype
        return OPTIMIZERS[name](parameters, **options)
