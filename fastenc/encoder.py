"""Encoder, its mirror image, and the heads that are trained on top of it: stacks of FusedDense layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as hooks

from .functional import encoder as encoder_stack
from .modules import FusedDense
from .pretrained import Pretrained


class Encoder(Pretrained, nn.Module):
    """A stack of FusedDense layers that turns `[..., in_features]` into vectors `[..., widths[-1]]`.

    Args:
        in_features: number of input features.
        widths: the width of each layer; the last is the size of the code.
        activation: of every layer but the last.
        final_activation: of the last layer; None means as the others.
        bias: whether the layers have biases.
        dropout: probability of dropping a hidden feature (between layers, not after the last) while training.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        widths: Sequence[int] = (128, 64, 32, 16),
        activation: str = "relu",
        final_activation: str | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        widths = tuple(int(width) for width in widths)
        if not widths:
            raise ValueError("widths is empty; an Encoder needs at least one layer, for example widths=(16,)")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout is {dropout}; it must be at least 0 and less than 1")
        self.in_features = in_features
        self.widths = widths
        self.activation = activation
        self.final_activation = activation if final_activation is None else final_activation
        self.dropout = dropout
        names = [activation] * (len(widths) - 1) + [self.final_activation]
        self.layers = nn.ModuleList(
            FusedDense(before, width, bias, name, device, dtype)
            for before, width, name in zip((in_features, *widths), widths, names, strict=False)
        )

    @property
    def out_features(self) -> int:
        return self.widths[-1]

    @property
    def reconstructed_features(self) -> int:
        """How many numbers an AutoEncoder on this encoder gives for each row: its own inputs."""
        return self.in_features

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON can hold them."""
        return {
            "in_features": self.in_features,
            "widths": list(self.widths),
            "activation": self.activation,
            "final_activation": self.final_activation,
            "bias": self.layers[0].bias is not None,
            "dropout": self.dropout,
        }

    def forward(self, x: Tensor) -> Tensor:
        return _run(cast("Iterable[FusedDense]", self.layers._modules.values()), self._dropouts(), x)

    def _dropouts(self) -> tuple[float, ...] | None:
        """Of each layer's output, the probability of dropping now; None for no dropout."""
        if not (self.training and self.dropout > 0):
            return None
        return (self.dropout,) * (len(self.layers) - 1) + (0.0,)


# The encoders that a model can begin with, by the class in its config; without one it is an Encoder.
ENCODERS: dict[str, Any] = {}


def encoder_from_config(config: dict[str, Any]) -> Any:
    """The encoder of which `get_config` gave this.

    Raises:
        ValueError: an encoder that this version does not know.
    """
    name = config.get("class")
    if name is None:
        return Encoder(**config)
    if name not in ENCODERS:
        raise ValueError(f"there is no encoder {name!r} here; the known ones are Encoder, {', '.join(ENCODERS)}")
    return ENCODERS[name].from_config(config)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the module does nothing but its class's forward: no subclass, hook or wrapper."""
    state = module.__dict__
    return type(module) is kind and not (
        "forward" in state
        or "_compiled_call_impl" in state
        or state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    )


def has_global_hooks() -> bool:
    return bool(
        hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks
        or hooks._global_backward_pre_hooks
    )


def _run(layers: Iterable[nn.Module], dropouts: Sequence[float] | None, x: Tensor) -> Tensor:
    """The layers one after the other: in one kernel where nothing asks for more than their forward."""
    weights, biases, activations = [], [], []
    for layer in layers:
        if not is_plain(layer, FusedDense):
            break
        state = layer.__dict__
        parameters = state["_parameters"]
        weights.append(parameters["weight"])
        biases.append(parameters["bias"])
        activations.append(state["activation"])
    else:
        if not has_global_hooks():
            return encoder_stack(x, weights, biases, activations, dropouts)
    for i, layer in enumerate(layers):
        x = layer(x)
        if dropouts is not None and dropouts[i] > 0:
            x = F.dropout(x, dropouts[i])
    return x


def _fusible(stack: nn.Module) -> tuple[list[nn.Module], tuple[float, ...] | None] | None:
    """The layers of an Encoder (or the one layer of a head) that may run as part of a longer stack, and their dropouts.

    None if they may not.
    """
    if is_plain(stack, FusedDense):
        return [stack], None
    if not isinstance(stack, Encoder) or not is_plain(stack, Encoder):
        return None
    return list(stack.layers), stack._dropouts()


def _run_both(first: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
    """`second(first(x))`, in one kernel if both are plain stacks."""
    below, above = _fusible(first), _fusible(second)
    if below is None or above is None or has_global_hooks():
        return second(first(x))
    dropouts = None
    if below[1] is not None or above[1] is not None:
        dropouts = [p for layers, of_each in (below, above) for p in of_each or (0.0,) * len(layers)]
    return _run(below[0] + above[0], dropouts, x)


def plain_stack(model: nn.Module) -> tuple[list[FusedDense], list[float]] | None:
    """The layers that a model of this module runs one after the other, and the dropout after each as it is now.

    None if the model may do anything else: other classes, subclasses, hooks, replaced layers.
    """
    parts = {AutoEncoder: ("encoder", "decoder"), Classifier: ("encoder", "head"), Regressor: ("encoder", "head")}
    names = parts.get(type(model))
    if has_global_hooks() or (names is not None and not is_plain(model, type(model))):
        return None
    layers: list[FusedDense] = []
    dropouts: list[float] = []
    for stack in [model] if names is None else [getattr(model, name) for name in names]:
        fusible = _fusible(stack)
        if fusible is None or not all(is_plain(layer, FusedDense) for layer in fusible[0]):
            return None
        layers += cast("list[FusedDense]", fusible[0])
        dropouts += fusible[1] or (0.0,) * len(fusible[0])
    return layers, dropouts


class AutoEncoder(Pretrained, nn.Module):
    """An encoder and its mirror image: `decode(encode(x))` is trained to be `x`.

    Args:
        encoder: the Encoder; its widths, reversed, are the decoder's. On a FrontEncoder, `decode(encode(x))` is trained
            to be `encoder.summary(x)`.
        final_activation: of the reconstruction; "sigmoid" for features in 0 to 1.
    """

    def __init__(self, encoder: Any, final_activation: str = "identity") -> None:
        super().__init__()
        first = cast(FusedDense, encoder.layers[0])
        self.encoder = encoder
        self.decoder = Encoder(
            encoder.out_features,
            (*reversed(encoder.widths[:-1]), encoder.reconstructed_features),
            encoder.activation,
            final_activation,
            bias=first.bias is not None,
            dropout=encoder.dropout,
            device=first.weight.device,
            dtype=first.weight.dtype,
        )

    def get_config(self) -> dict[str, Any]:
        return {"encoder": self.encoder.get_config(), "final_activation": self.decoder.final_activation}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> AutoEncoder:
        return cls(encoder_from_config(config["encoder"]), config["final_activation"])

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def decode(self, code: Tensor) -> Tensor:
        return self.decoder(code)

    def forward(self, x: Tensor) -> Tensor:
        return _run_both(self.encoder, self.decoder, x)


class _Head(Pretrained, nn.Module):
    """An encoder, which is an Encoder or a FrontEncoder, and one linear layer on its code."""

    def __init__(self, encoder: Any, out_features: int) -> None:
        super().__init__()
        weight = cast(FusedDense, encoder.layers[0]).weight
        self.encoder = encoder
        self.head = FusedDense(
            encoder.out_features, out_features, activation="identity", device=weight.device, dtype=weight.dtype
        )

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def forward(self, x: Tensor) -> Tensor:
        return _run_both(self.encoder, self.head, x)


class Classifier(_Head):
    """An encoder and a linear layer to `num_classes` logits: `[..., in_features] -> [..., num_classes]`."""

    def __init__(self, encoder: Any, num_classes: int) -> None:
        super().__init__(encoder, num_classes)

    def get_config(self) -> dict[str, Any]:
        return {"encoder": self.encoder.get_config(), "num_classes": self.head.out_features}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Classifier:
        return cls(encoder_from_config(config["encoder"]), config["num_classes"])


class Regressor(_Head):
    """An encoder and a linear layer to `num_outputs` numbers: `[..., in_features] -> [..., num_outputs]`."""

    def __init__(self, encoder: Any, num_outputs: int) -> None:
        super().__init__(encoder, num_outputs)

    def get_config(self) -> dict[str, Any]:
        return {"encoder": self.encoder.get_config(), "num_outputs": self.head.out_features}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Regressor:
        return cls(encoder_from_config(config["encoder"]), config["num_outputs"])
