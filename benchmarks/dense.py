"""Is one FusedDense faster than nn.Linear and nn.ReLU, whatever the shape?"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from torch import Tensor, nn

from fastenc import FusedDense

from .command import Options, Question
from .harness import Case, Sides
from .peers import gpu, local
from .stacks import EVERYTHING, FORWARD, stack_bytes, stack_flops, stack_sides

ROWS = (1, 32, 256, 4096)
WIDTHS = (16, 128, 784, 1024)
QUICK_SHAPES = ((1, 16, 16), (32, 128, 784))


def cases(options: Options) -> Iterator[Case]:
    shapes = QUICK_SHAPES if options.quick else tuple(itertools.product(ROWS, WIDTHS, WIDTHS))
    for place, dtype, mode in itertools.product(options.places(), options.dtypes, (FORWARD, EVERYTHING)):
        for M, N, K in shapes:
            yield Case(
                mode,
                {"M": M, "N": N, "K": K},
                dtype,
                place.threads,
                stack_flops(M, (K, N), mode),
                stack_bytes(M, (K, N), mode, dtype.itemsize),
                setup,
                device=place.device,
                way=place.way,
            )


def setup(case: Case) -> Sides:
    M, N, K = case.sizes.values()
    linear, relu = nn.Linear(K, N, dtype=case.dtype), nn.ReLU()
    fused = FusedDense(K, N, activation="relu", dtype=case.dtype)

    def eager(x: Tensor) -> Tensor:
        return relu(linear(x))

    peers = {"torch._addmm_activation": local.addmm_activation}
    models = gpu.RELU if case.device == "cuda" else {}
    return stack_sides(case, M, fused, eager, [linear], peers, models)


QUESTION = Question(
    name="dense",
    title="One FusedDense (relu) against nn.Linear and nn.ReLU; out[M, N] from x[M, K]",
    cases=cases,
    budget_s=0.5,
)
