"""Is the encoder 784-128-64-32-16 faster than nn.Sequential of nn.Linear and nn.ReLU?"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import nn

from fastenc import Encoder

from .command import Options, Question
from .harness import Case, Sides
from .stacks import EVERYTHING, FORWARD, PARAMETERS, stack_bytes, stack_flops, stack_sides

WIDTHS = (784, 128, 64, 32, 16)
BATCHES = (1, 32, 256, 4096, 65536)
QUICK_BATCHES = (1, 32)


def cases(options: Options) -> Iterator[Case]:
    modes = (FORWARD, PARAMETERS, EVERYTHING)
    batches = QUICK_BATCHES if options.quick else BATCHES
    for place, dtype, mode, M in itertools.product(options.places(), options.dtypes, modes, batches):
        yield Case(
            mode,
            {"batch": M},
            dtype,
            place.threads,
            stack_flops(M, WIDTHS, mode),
            stack_bytes(M, WIDTHS, mode, dtype.itemsize),
            setup,
            device=place.device,
            way=place.way,
        )


def setup(case: Case) -> Sides:
    layers = [nn.Linear(K, N, dtype=case.dtype) for K, N in itertools.pairwise(WIDTHS)]
    eager = nn.Sequential(*(module for layer in layers for module in (layer, nn.ReLU())))
    fused = Encoder(WIDTHS[0], WIDTHS[1:], activation="relu", dtype=case.dtype)
    return stack_sides(case, case.sizes["batch"], fused, eager, layers)


QUESTION = Question(
    name="encoder",
    title="Encoder 784-128-64-32-16 (relu) against nn.Sequential of nn.Linear and nn.ReLU",
    cases=cases,
    dtypes=(torch.float32, torch.bfloat16),
    budget_s=1.0,
)
