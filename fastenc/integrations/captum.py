"""captum: DeepLift's rule for a layer whose activation is part of it."""

from __future__ import annotations

from captum.attr._core import deep_lift
from torch import Tensor
from torch.nn import functional as F

from ..activation import get_activation
from ..modules import FusedDense


def register() -> None:
    """Tell captum's DeepLift about FusedDense, and so about encoders.

    Without it DeepLift takes the activation's derivative for the rule's quotient of differences, and says nothing.
    Methods that are made of gradients alone, as IntegratedGradients, need nothing; nor do models from `fuse`.
    """
    deep_lift.SUPPORTED_NON_LINEAR[FusedDense] = _rescaled


def _rescaled(
    layer: FusedDense, x: Tensor, out: Tensor, grad_x: Tensor, grad_out: Tensor, eps: float = 1e-10
) -> Tensor:
    """`grad_x` [2 B, K] with the rescale rule in place of the derivative; rows are inputs, then their baselines.

    What other users of x put into `grad_x` stays in it: only this layer's part is changed.
    """
    activation = get_activation(layer.activation)
    preact = F.linear(x, layer.weight, layer.bias)
    derived = activation.backward(grad_out, preact if activation.saves_preact else out)
    before, after = deep_lift._compute_diffs(preact, out)
    rescaled = (grad_out * after / before).where(before.abs() >= eps, derived)
    return grad_x + (rescaled - derived) @ layer.weight
