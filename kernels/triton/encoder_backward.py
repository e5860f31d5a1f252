"""The gradients of a narrow stack in at most three launches.

1. The chain (`encoder_chain.py`): dZ of each layer, on chip. The hidden activations that the forward pass did not keep
   are found again, and the weight gradients of the inner layers are summed in registers, as far as those suffice.
2. The weight gradients with a wide side, the first layer's above all (`weight_gradient.py`, or cuBLAS where there are
   many rows), from the dZ that the chain wrote.
3. The sum of the partial sums of both (`reduce.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from .activation import SAVES_PREACT
from .configs import Config, shortlist
from .device import Target, precision, target
from .encoder_chain import encoder_chain_kernel
from .encoder_plan import ends_wide, padded, sums_on_chip
from .reduce import Buffer, Partials, reduce
from .tuning import config_for
from .weight_gradient import LONGEST_STRIDE, Layer, sums_by_cublas, weight_gradient


def encoder_backward(
    grad_out: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    results: Sequence[Tensor | None],
    activations: Sequence[str],
    output_mask: Sequence[bool],
    dropouts: Sequence[float] | None = None,
    seed: Tensor | None = None,
    int64: bool = False,
    config: Config | None = None,
) -> list[Tensor]:
    """The gradients of x, then of weight and bias of each layer; an empty tensor where `output_mask` does not ask.

    results: of `encoder_forward`. With "all" saved, biases may be None, and what is not read may be empty or None.
    The other arguments as for `encoder_forward`.
    """
    M, K = x.shape
    depth = len(weights)
    widths = [weight.shape[0] for weight in weights]
    grads = [
        torch.empty(shape, dtype=x.dtype, device=x.device) if wanted else x.new_empty(0)
        for shape, wanted in zip(_shapes(x, weights), output_mask, strict=True)
    ]
    if M == 0:
        return [grad.zero_() for grad in grads]
    wants_weight, wants_bias = list(output_mask[1::2]), list(output_mask[2::2])
    wanted = [i for i in range(depth) if wants_weight[i] or wants_bias[i]]
    if not wanted and not output_mask[0]:
        return grads
    lowest = 0 if output_mask[0] else wanted[0]
    dropouts = tuple(dropouts or (0.0,) * depth)
    outs, saveds = _by_layer(results, activations)

    wide = ends_wide(widths)
    on_chip = sums_on_chip(widths, x.dtype.itemsize)
    sums_weight = [chip and wants for chip, wants in zip(on_chip, wants_weight, strict=True)]
    # The first layer's, with its wide input, may be cuBLAS's.
    by_cublas = wants_weight[0] and sums_by_cublas(M, x.dtype)
    # A bias goes where its layer's weight gradient goes; alone, or where that is cuBLAS's, it is summed on chip.
    alone = [not wants or (i == 0 and by_cublas) for i, wants in enumerate(wants_weight)]
    sums_bias = [wants_bias[i] and (sums_weight[i] or alone[i]) and not (wide and i == depth - 1) for i in range(depth)]
    dzs: list[Tensor | None] = [None] * depth
    layers: list[Layer] = []
    for i in wanted:
        if (wants_weight[i] and not sums_weight[i]) or (wants_bias[i] and not sums_bias[i]):
            below = x if i == 0 else outs[i - 1]
            own = (
                grads[2 * i + 1] if wants_weight[i] else None,
                grads[2 * i + 2] if wants_bias[i] and not sums_bias[i] else None,
            )
            if i == depth - 1:
                saved = None if activations[i] == "identity" else saveds[i]
                layers.append(Layer(grad_out, saved, below, activations[i], *own, dropouts[i], i))
            else:
                dzs[i] = torch.empty((M, widths[i]), dtype=x.dtype, device=x.device)
                if not (i == 0 and by_cublas):
                    layers.append(Layer(dzs[i], None, below, "identity", *own))

    partials: list[Partials] = []
    if lowest < depth - 1 or not wide or output_mask[0]:
        summed = [
            grads[2 * i + 1 + j] for i in range(depth) for j, sums in enumerate((sums_weight, sums_bias)) if sums[i]
        ]
        partials += _chain(
            grad_out, weights, biases, saveds, grads[0] if output_mask[0] else None, dzs, summed, sums_weight,
            sums_bias, lowest, activations, dropouts, seed, K, int64, config,
        )  # fmt: skip
    if by_cublas:
        torch.mm(dzs[0].t(), x, out=grads[1])
    partials += weight_gradient(layers, seed, int64)
    reduce(partials)
    return grads


def _shapes(x: Tensor, weights: Sequence[Tensor]) -> list[torch.Size]:
    return [x.shape, *(shape for weight in weights for shape in (weight.shape, weight.shape[:1]))]


def _by_layer(
    results: Sequence[Tensor | None], activations: Sequence[str]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The outputs, and what the derivatives are made of; None for what is not there."""
    there = [result if result is not None and result.numel() else None for result in results]
    outs = there[: len(activations)]
    preacts = iter(there[len(activations) :])
    return outs, [
        next(preacts) if activation in SAVES_PREACT else out for out, activation in zip(outs, activations, strict=True)
    ]


def _chain(
    grad_out, weights, biases, saveds, grad_x, dzs, summed, sums_weight, sums_bias, lowest, activations, dropouts, seed,
    K, int64, config,
) -> list[Partials]:  # fmt: skip
    M, depth = grad_out.shape[0], len(weights)
    widths = tuple(weight.shape[0] for weight in weights)
    wide = ends_wide(widths)
    # What the kernel reads of each layer: for its own derivative, as the input of the next one's weight gradient, or to
    # find the next one's output again.
    read, held = [False] * depth, [False] * depth
    for i in reversed(range(depth)):
        if i == depth - 1 and wide:
            continue
        derives = i >= lowest and activations[i] != "identity"
        finds_next = i + 1 < depth and read[i + 1] and saveds[i + 1] is None
        read[i] = derives or finds_next or (i + 1 < depth and sums_weight[i + 1])
        held[i] = read[i] and (finds_next or saveds[i] is None)
    if config is None:
        facts = target(grad_out.device)
        config = config_for(
            "encoder_chain",
            grad_out,
            (M, K, widths, tuple(activations), tuple(sums_weight), grad_x is not None),
            lambda: default_config(M, grad_out.dtype, facts),
            lambda: candidates(M, grad_out.dtype, facts),
            lambda candidate: _chain(
                grad_out, weights, biases, saveds, grad_x, dzs, summed, sums_weight, sums_bias, lowest, activations,
                dropouts, seed, K, int64, candidate,
            ),
        )  # fmt: skip
    config = dict(config)
    rows = triton.cdiv(config.pop("rows"), config["BLOCK_M"]) * config["BLOCK_M"]
    programs = triton.cdiv(M, rows)
    buffer = Buffer(programs, summed) if summed else None
    offsets = iter(buffer.offsets if buffer else ())
    starts = [[next(offsets) if sums[i] else 0 for sums in (sums_weight, sums_bias)] for i in range(depth)]
    strides = [grad_out.stride(), *zip(*(weight.stride() for weight in weights), strict=True)]
    encoder_chain_kernel[(programs,)](
        grad_out,
        tuple(weights),
        tuple(None if bias is None else bias.contiguous() for bias in biases),
        tuple(saveds),
        grad_x,
        tuple(dzs),
        buffer.sums if buffer else None,
        seed,
        M,
        K,
        *strides[0],
        tuple(start[0] for start in starts),
        tuple(start[1] for start in starts),
        buffer.stride if buffer else 0,
        rows,
        *strides[1:],
        widths,
        tuple(padded(width) for width in widths),
        tuple(activations),
        dropouts,
        tuple(activation in SAVES_PREACT for activation in activations),
        tuple(read),
        tuple(held),
        tuple(sums_weight),
        tuple(sums_bias),
        LOWEST=lowest,
        PRECISION=precision(grad_out.dtype),
        INT64=int64 or any(stride > LONGEST_STRIDE for of_one in strides for stride in of_one),
        **config,
    )
    return buffer.partials if buffer else []


def default_config(M: int, dtype: torch.dtype, facts: Target) -> Config:
    """Two blocks of rows for a program, or more where there are programs for all processors.

    Measured on an H200 in bf16: a program takes 3 us for each of its blocks one after the other, and 8 more programs,
    whose sums `reduce` adds up, less than one.
    """
    # One stage: nothing in the loop over the rows is worth loading ahead.
    config = {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1, "maxnreg": 255}
    if dtype.itemsize == 4:
        config = {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1}
    return {**config, "rows": max(2 * config["BLOCK_M"], triton.cdiv(M, facts.processors))}


def candidates(M: int, dtype: torch.dtype, facts: Target) -> list[Config]:
    """The default, then other row blocks, warps, and rows for each program."""
    configs = [default_config(M, dtype, facts)]
    for block_m, warps in ((16, 4), (16, 8), (32, 4), (32, 8), (64, 8)) if dtype.itemsize == 2 else ((16, 4), (16, 8)):
        for rows in sorted({block_m, 4 * block_m, configs[0]["rows"]}):
            config = {
                "BLOCK_M": block_m,
                "BLOCK_N": configs[0]["BLOCK_N"],
                "num_warps": warps,
                "num_stages": 1,
                "maxnreg": 255,
            }
            configs.append({**config, "rows": rows})
    return shortlist(configs, [0] * len(configs), facts)
