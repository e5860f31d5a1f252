"""opacus: the gradient of each sample, of a layer whose activation is part of it."""

from __future__ import annotations

import torch
from opacus.grad_sample import linear, register_grad_sampler
from opacus.grad_sample.utils import register_norm_sampler
from torch import Tensor
from torch.nn import functional as F

from ..activation import get_activation
from ..modules import FusedDense


def register() -> None:
    """Tell opacus about FusedDense, and so about encoders: gradients of each sample, and ghost clipping's norms.

    Without it opacus runs each layer again under `torch.func`: the same gradients, slower. Models from `fuse` need
    nothing; their layers have opacus's hooks, and are called one by one.
    """
    register_grad_sampler(FusedDense)(_grad_sample)
    register_norm_sampler(FusedDense)(_norm_sample)


def _grad_sample(layer: FusedDense, activations: list[Tensor], backprops: Tensor) -> dict[torch.nn.Parameter, Tensor]:
    """Parameter -> [B, *its shape], from the layer's input [B, ..., K] and the gradient of its output [B, ..., N]."""
    return linear.compute_linear_grad_sample(layer, activations, _before_activation(layer, activations[0], backprops))


def _norm_sample(layer: FusedDense, activations: list[Tensor], backprops: Tensor) -> dict[torch.nn.Parameter, Tensor]:
    """Parameter -> the norm [B] of what `_grad_sample` gives."""
    return linear.compute_linear_norm_sample(layer, activations, _before_activation(layer, activations[0], backprops))


@torch.no_grad()
def _before_activation(layer: FusedDense, x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of what the activation was applied to. It is computed again: opacus keeps the layer's input only."""
    activation = get_activation(layer.activation)
    bias = None if layer.bias is None else layer.bias.to(grad.dtype)  # under autocast, gradients have its dtype
    preact = F.linear(x.to(grad.dtype), layer.weight.to(grad.dtype), bias)
    return activation.backward(grad, preact if activation.saves_preact else activation.forward(preact))
