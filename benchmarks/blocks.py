"""Stacks of the shapes that some peers on a GPU know only: one width without biases, and two layers with gelu between.

The layers of the encoder get narrower, where FullyFusedMLP of tiny-cuda-nn has no place; and what FusedMLP of
flash-attention and FusedDenseGeluDense of apex are made for are blocks of a transformer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from torch import nn

from fastenc import Encoder

from .command import Options
from .harness import Case, Sides
from .peers import gpu
from .stacks import EVERYTHING, FORWARD, stack_bytes, stack_flops, stack_sides, with_relus

ONE_WIDTH = (64,) * 5
BLOCK = (1024, 4096, 1024)
BATCHES = (256, 4096, 65536)
QUICK_BATCHES = (256,)
NO_BIASES = "inference of 64-64-64-64-64 (relu), biases zero"
GELU_MODES = {f"{mode}, of 1024-4096-1024 (gelu between)": mode for mode in (FORWARD, EVERYTHING)}


def cases(options: Options) -> Iterator[Case]:
    """On a GPU; on a CPU there are none."""
    if options.device != "cuda":
        return
    batches = QUICK_BATCHES if options.quick else BATCHES
    kinds = [(NO_BIASES, FORWARD, ONE_WIDTH, one_width)]
    kinds += [(name, mode, BLOCK, gelu_block) for name, mode in GELU_MODES.items()]
    for place, dtype, (name, mode, widths, setup), M in itertools.product(
        options.places(), options.dtypes, kinds, batches
    ):
        flops, moved = stack_flops(M, widths, mode), stack_bytes(M, widths, mode, dtype.itemsize)
        made = partial(setup, mode=mode)
        sizes = {"batch": M}
        yield Case(name, sizes, dtype, place.threads, flops, moved, made, device=place.device, way=place.way)


def one_width(case: Case, mode: str, widths: tuple[int, ...] = ONE_WIDTH) -> Sides:
    """Biases are zeros, which our side and eager PyTorch add all the same."""
    layers = [nn.Linear(K, N, dtype=case.dtype) for K, N in itertools.pairwise(widths)]
    for layer in layers:
        nn.init.zeros_(layer.bias)
    fused = Encoder(widths[0], widths[1:], activation="relu", dtype=case.dtype)
    case = replace(case, mode=mode)
    return stack_sides(case, case.sizes["batch"], fused, with_relus(layers), layers, models=gpu.RELU)


def gelu_block(case: Case, mode: str, widths: tuple[int, ...] = BLOCK) -> Sides:
    first, second = layers = [nn.Linear(K, N, dtype=case.dtype) for K, N in itertools.pairwise(widths)]
    fused = Encoder(widths[0], widths[1:], activation="gelu_tanh", final_activation="identity", dtype=case.dtype)
    eager = nn.Sequential(first, nn.GELU(approximate="tanh"), second)
    case = replace(case, mode=mode)
    activations = (gpu.GELU, lambda out: out)
    return stack_sides(case, case.sizes["batch"], fused, eager, layers, models=gpu.GELU_BLOCK, activations=activations)
