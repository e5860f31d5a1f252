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
from . import stack

NAME = "reference"
DEVICE = None

_PLAIN = (Tensor, torch.nn.Parameter)


def why_unavailable() -> str | None:
    return None


def why_not(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why not these arguments, in words; None if they will do. What F.linear takes beyond them is left to it."""
    if type(weight) not in _PLAIN:
        return f"weight is of a class of its own, {type(weight).__name__}, which may take part in F.linear alone"
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
    return stack.forward(dense_forward, x, weights, biases, activations, save)


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


def dropout_scale(seed: Tensor, layer: int, rows: int, columns: int, p: float) -> Tensor:
    """What dropout inside the kernels multiplies a layer's output with: 0 with probability p, else 1 / (1 - p).

    Philox 4x32 with 10 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), key `seed + layer`
    (int64 [1]), counter `row * columns + column`, and the first of its four numbers, as Triton's `tl.rand`.

    Returns: fp32 [rows, columns] on the seed's device.
    """
    low = 0xFFFFFFFF
    counter = torch.arange(rows * columns, device=seed.device)
    key = seed + layer
    keys = [key & low, (key >> 32) & low]
    c = [counter & low, (counter >> 32) & low, torch.zeros_like(counter), torch.zeros_like(counter)]
    for _ in range(10):
        (high_b, low_b), (high_a, low_a) = _wide_product(0xCD9E8D57, c[2]), _wide_product(0xD2511F53, c[0])
        c = [high_b ^ c[1] ^ keys[0], low_b, high_a ^ c[3] ^ keys[1], low_a]
        keys = [(keys[0] + 0x9E3779B9) & low, (keys[1] + 0xBB67AE85) & low]
    drawn = torch.where(c[0] >= 1 << 31, low - c[0], c[0]).float() * 4.6566127342e-10
    scale = torch.where(drawn < torch.tensor(p, dtype=torch.float32), 0.0, 1 / (1 - p))
    return scale.float().view(rows, columns)


def _wide_product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and the lower 32 bits of the product of two unsigned 32-bit numbers, b as int64."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    middle = (low >> 16) + high
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)
