"""The activations: one table, name -> forward and derivative in ATen. It is the reference and the list of names.

The order of `ACTIVATIONS` is the order of `enum class ActivationKind` in `csrc/activation.h`; a test compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

LEAKY_RELU_SLOPE = 0.01  # torch.nn.LeakyReLU's default

aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """An activation and its derivative.

    `forward(preact) -> out`, elementwise, any shape.
    `forward_(preact) -> out` is the same in the memory of preact, where no gradient follows.
    `backward(grad_out, saved) -> grad_preact`, itself differentiable. `saved` is `preact` if `saves_preact`,
    else `out`.
    """

    forward: Callable[[Tensor], Tensor]
    forward_: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    saves_preact: bool = False


def _silu_backward(grad: Tensor, preact: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return aten.silu_backward(grad, preact)
    sigmoid = torch.sigmoid(preact)  # aten.silu_backward has no derivative
    return grad * sigmoid * (1 + preact * (1 - sigmoid))


ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(lambda z: z, lambda z: z, lambda grad, out: grad),
    "relu": Activation(F.relu, torch.relu_, lambda grad, out: aten.threshold_backward(grad, out, 0)),
    "leaky_relu": Activation(
        lambda z: F.leaky_relu(z, LEAKY_RELU_SLOPE),
        lambda z: F.leaky_relu_(z, LEAKY_RELU_SLOPE),
        lambda grad, out: aten.leaky_relu_backward(grad, out, LEAKY_RELU_SLOPE, True),
    ),
    "sigmoid": Activation(torch.sigmoid, torch.sigmoid_, lambda grad, out: aten.sigmoid_backward(grad, out)),
    "tanh": Activation(torch.tanh, torch.tanh_, lambda grad, out: aten.tanh_backward(grad, out)),
    "gelu": Activation(F.gelu, aten.gelu_, lambda grad, preact: aten.gelu_backward(grad, preact), saves_preact=True),
    "gelu_tanh": Activation(
        lambda z: F.gelu(z, approximate="tanh"),
        lambda z: aten.gelu_(z, approximate="tanh"),
        lambda grad, preact: aten.gelu_backward(grad, preact, approximate="tanh"),
        saves_preact=True,
    ),
    "silu": Activation(F.silu, lambda z: F.silu(z, inplace=True), _silu_backward, saves_preact=True),
}


def get_activation(name: str) -> Activation:
    """The activation called `name`; a ValueError that lists the names if there is none."""
    try:
        return ACTIVATIONS[name]
    except (KeyError, TypeError):
        raise ValueError(f"unknown activation {name!r}; choose one of {', '.join(ACTIVATIONS)}") from None


_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}


def activation_code(name: str) -> int:
    """The number of the activation in `csrc/activation.h`; a ValueError if there is none of that name."""
    return activation_codes((name,))[0]


def activation_codes(names: Iterable[str]) -> list[int]:
    """The number of each activation."""
    try:
        return [_CODES[name] for name in names]
    except (KeyError, TypeError):
        for name in names:
            get_activation(name)  # raises for the one that is not known
        raise
