"""A stack cut into what a GPU backend runs in one kernel, and a stack run layer by layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from torch import Tensor

from ..activation import get_activation


@functools.lru_cache(maxsize=1024)
def parts(widths: tuple[int, ...], is_narrow: Callable[[Sequence[int]], bool]) -> list[slice]:
    """A stack with these outputs, cut into what runs in one kernel: runs of narrow layers, and single ones.

    is_narrow: whether one kernel takes a stack with the outputs given to it.
    """
    cut, first = [], 0
    while first < len(widths):
        ends = range(first + 2, len(widths) + 1)
        end = max((end for end in ends if is_narrow(widths[first:end])), default=first + 1)
        cut.append(slice(first, end))
        first = end
    return cut


def forward(
    dense_forward: Callable[..., tuple[Tensor, Tensor]],
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[str],
    save: bool,
) -> list[Tensor]:
    """`fastenc::encoder_forward` by a `dense_forward` for each layer."""
    outs, preacts = [], []
    for weight, bias, activation in zip(weights, biases, activations, strict=True):
        x, preact = dense_forward(x, weight, bias, activation, save)
        outs.append(x)
        if get_activation(activation).saves_preact:
            preacts.append(preact)
    return outs + preacts if save else outs[-1:]


def backward(
    dense_backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    grad_out: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    results: Sequence[Tensor],
    activations: Sequence[str],
    output_mask: Sequence[bool],
) -> list[Tensor]:
    """`fastenc::encoder_backward` by a `dense_backward` for each layer."""
    depth = len(weights)
    grads = [x.new_empty(0)] * (2 * depth + 1)
    preact_index = len(results)
    for i in reversed(range(depth)):
        saved = results[i]
        if get_activation(activations[i]).saves_preact:
            preact_index -= 1
            saved = results[preact_index]
        below = x if i == 0 else results[i - 1]
        if below.dim() != 2:  # a stand-in for what is not read
            below = grad_out.new_empty(()).expand(grad_out.shape[0], weights[i].shape[1])
        needs_below = any(output_mask[: 2 * i + 1])
        grad_out, grads[2 * i + 1], grads[2 * i + 2] = dense_backward(
            grad_out,
            below,
            weights[i],
            grad_out if activations[i] == "identity" else saved,
            activations[i],
            (needs_below, output_mask[2 * i + 1], output_mask[2 * i + 2]),
        )
        if not needs_below:
            return grads
    grads[0] = grad_out
    return grads
