"""The layers of an encoder one by one: frozen, thawed from the top down, and each with a learning rate of its own."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..training import Callback


def encoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of an Encoder, or of the encoder in a model, from the input up.

    Raises:
        ValueError: the model has no list of layers.
    """
    layers = getattr(getattr(model, "encoder", model), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{type(model).__name__} has no encoder with layers; give an Encoder, or a model with one")
    return list(layers)


def freeze_layers(model: nn.Module, count: int) -> None:
    """No longer train the first `count` layers of the model's encoder. Frozen layers below the others cost no gradient.

    Raises:
        ValueError: there are fewer layers, or the model has none.
    """
    layers = encoder_layers(model)
    if not 0 <= count <= len(layers):
        raise ValueError(f"frozen is {count} and the encoder has {len(layers)} layers; give 0 to {len(layers)}")
    for layer in layers[:count]:
        layer.requires_grad_(False)


class GradualUnfreezing(Callback):
    """Trains one more of the encoder's frozen layers after every `every` epochs, from the top down.

    What is frozen when training begins is thawed; the optimiser must hold those parameters already, which one made from
    all parameters before they were frozen does. The C++ engine follows.

    Raises:
        ValueError: `every` is not a whole number of at least 1; in training, if the optimiser lacks a thawed layer.
    """

    def __init__(self, every: int = 1) -> None:
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every is {every!r}; give a whole number of epochs of at least 1")
        self.every = every
        self._frozen: list[nn.Module] = []
        self._thawed = 0

    def on_train_begin(self) -> None:
        layers = encoder_layers(self.trainer.model)
        self._frozen = [layer for layer in layers if not any(p.requires_grad for p in layer.parameters())][::-1]
        self._thawed = 0

    def on_epoch_begin(self, epoch: int) -> None:
        for layer in self._frozen[self._thawed : epoch // self.every]:
            held = {id(p) for group in self.trainer.optimizer.param_groups for p in group["params"]}
            if any(id(parameter) not in held for parameter in layer.parameters()):
                raise ValueError(
                    "the optimiser does not hold the layer that is to be thawed; make it from all of the model's "
                    "parameters before you freeze them, or use fastenc.finetune(..., unfreeze_every=...)"
                )
            layer.requires_grad_(True)
            self._thawed += 1


def layer_groups(model: nn.Module, lr: float, decay: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser: `lr` for what is above the encoder, and `decay` times less for each layer.

    With a decay of 0.5 the head gets lr, the encoder's last layer lr / 2, the one below lr / 4, and so on.

    Raises:
        ValueError: the decay is not above 0 and at most 1, or the model has no encoder with layers.
    """
    if not 0.0 < decay <= 1.0:
        raise ValueError(f"layer_decay is {decay!r}; it must be above 0 and at most 1")
    layers = encoder_layers(model)
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    above = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    groups: list[dict[str, Any]] = [{"params": above, "lr": lr}] if above else []
    for depth, layer in enumerate(reversed(layers), start=bool(above)):
        groups.append({"params": list(layer.parameters()), "lr": lr * decay**depth})
    return groups


def regroup(optimizer: Optimizer, groups: list[dict[str, Any]]) -> None:
    """Give a new optimiser of one group these groups, with its own options otherwise."""
    (options,) = optimizer.param_groups
    optimizer.param_groups.clear()
    for group in groups:
        optimizer.add_param_group({**options, **group})
