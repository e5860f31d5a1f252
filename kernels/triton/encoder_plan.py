"""Which stacks the encoder kernels take, and what of a stack lives on chip and what in memory."""

from __future__ import annotations

from collections.abc import Sequence

import triton

from .activation import SAVES_PREACT

WIDEST = 128  # of the layers between the first input and the last output
DEEPEST = 8
# The most elements of weight gradients that a program sums in registers: with more, compiled kernels spill.
MOST_ON_CHIP = {2: 11_000, 4: 0}  # by the bytes of the dtype; fp32 operands take the room
# The most columns of hidden outputs that the chain finds again and holds, for the same reason.
MOST_HELD = 256


def padded(width: int) -> int:
    """The width of a tile that holds a layer's output: a power of two that tensor cores take."""
    return max(16, triton.next_power_of_2(width))


def is_narrow(widths: Sequence[int]) -> bool:
    """Whether the kernels take a stack with these outputs [N_1, ..., N_L]; the last may be wide, as may the input."""
    return 2 <= len(widths) <= DEEPEST and min(widths) > 0 and max(widths[:-1]) <= WIDEST


def ends_wide(widths: Sequence[int]) -> bool:
    """Whether the last layer is too wide to hold, and goes by tiles."""
    return padded(widths[-1]) > WIDEST


def sums_on_chip(widths: Sequence[int], itemsize: int) -> list[bool]:
    """Of each layer, whether the chain sums its weight gradient in registers.

    Never of the first layer, nor of a wide last one; of the others from the first on, as many as there is room for.
    """
    left = MOST_ON_CHIP[itemsize]
    result = [False]
    for i in range(1, len(widths)):
        size = padded(widths[i]) * padded(widths[i - 1])
        fits = size <= left and not (i == len(widths) - 1 and ends_wide(widths))
        left -= size if fits else 0
        result.append(fits)
    return result


def kept(save: str, widths: Sequence[int], activations: Sequence[str], itemsize: int) -> list[tuple[bool, bool]]:
    """Of each layer, whether the forward pass writes its output and its pre-activation to memory.

    save: "nothing" but the last output, "all", or "needed". That is: the first layer's output, from which the chain
    finds the others again at a small part of the work of the first product. In deep stacks, and where derivatives are
    made of pre-activations, that takes more registers than there are: there it is all that derivatives are made of.
    And the inputs of those weight gradients that are not summed on chip.
    """
    depth = len(widths)
    last = depth - 1
    if save != "needed":
        return [(save == "all" or i == last, save == "all" and a in SAVES_PREACT) for i, a in enumerate(activations)]
    on_chip = sums_on_chip(widths, itemsize)
    finds_again = sum(map(padded, widths[:-1])) <= MOST_HELD and SAVES_PREACT.isdisjoint(activations)
    result = []
    for i, activation in enumerate(activations):
        from_preact = activation in SAVES_PREACT
        is_start = i == 0 or not finds_again
        out = i == last or not on_chip[i + 1] or (is_start and not from_preact)
        result.append((out, from_preact))
    return result
