"""The reference backend: ATen, on any device and in any dtype. The fallback, and the oracle of the tests.

Every function is differentiable, and takes a batch of problems in leading dimensions (of all tensors alike), so that
double backward and vmap can go through the formulas here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..activation import get_activation

NAME = "reference"
DEVICE = None


def why_unavailable() -> str | None:
    return None


def why_not(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why not these arguments, in words; None if they will do. What F.linear takes beyond them is left to it."""
    if x.dim() != 2 or weight.dim() != 2:
        return f"x and weight must have 2 dimensions; they are {tuple(x.shape)} and {tuple(weight.shape)}"
    return None


def dense_forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save: bool) -> tuple[Tensor, Tensor]:
    """See `fastenc::dense_forward`."""
    act = get_activation(activation)
    if weight.dim() == 2:
        preact = F.linear(x, weight, bias)
    else:
        preact = x @ weight.mT if bias is None else torch.baddbmm(bias.unsqueeze(-2), x, weight.mT)
    return act.forward(preact), preact if act.saves_preact and save else x.new_empty(0)


def dense_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    saved: Tensor,
    activation: str,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """See `fastenc::dense_backward`."""
    grad_preact = get_activation(activation).backward(grad_out, saved)
    return linear_backward(grad_preact, x, weight, output_mask)


def linear_backward(
    grad_preact: Tensor, x: Tensor, weight: Tensor, output_mask: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias from that of `x @ weight.T + bias`; empty where not wanted."""
    want_x, want_weight, want_bias = output_mask
    return (
        grad_preact @ weight.conj() if want_x else grad_preact.new_empty(0),
        grad_preact.mT @ x.conj() if want_weight else grad_preact.new_empty(0),
        grad_preact.sum(-2) if want_bias else grad_preact.new_empty(0),
    )


def encoder_forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], activations: Sequence[str], save: bool
) -> list[Tensor]:
    """See `fastenc::encoder_forward`."""
    outs, preacts = [], []
    for weight, bias, activation in zip(weights, biases, activations, strict=True):
        x, preact = dense_forward(x, weight, bias, activation, save)
        outs.append(x)
        if get_activation(activation).saves_preact:
            preacts.append(preact)
    return outs + preacts if save else outs[-1:]


def encoder_backward(
    grad_results: Sequence[Tensor | None],
    x: Tensor,
    weights: Sequence[Tensor],
    results: Sequence[Tensor],
    activations: Sequence[str],
    output_mask: Sequence[bool],
) -> list[Tensor | None]:
    """As `fastenc::encoder_backward`, but from the gradients of all that `encoder_forward` returned.

    None in `grad_results` is zero; what no gradient reaches is None in the result.
    """
    depth = len(weights)
    grads: list[Tensor | None] = [None] * (2 * depth + 1)
    preact_index = len(results)
    grad_out = grad_results[depth - 1]
    for i in reversed(range(depth)):
        act = get_activation(activations[i])
        saved, extra = results[i], None
        if act.saves_preact:
            preact_index -= 1
            saved, extra = results[preact_index], grad_results[preact_index]
        grad_preact = extra
        if grad_out is not None:
            grad_preact = act.backward(grad_out, saved)
            grad_preact = grad_preact if extra is None else grad_preact + extra
        grad_out = None if i == 0 else grad_results[i - 1]
        if grad_preact is None:
            continue
        needs_below = any(output_mask[: 2 * i + 1])
        mask = (needs_below, output_mask[2 * i + 1], output_mask[2 * i + 2])
        below, grads[2 * i + 1], grads[2 * i + 2] = linear_backward(
            grad_preact, x if i == 0 else results[i - 1], weights[i], mask
        )
        if i == 0:
            grads[0] = below
        elif needs_below:
            grad_out = below if grad_out is None else grad_out + below
    return grads
