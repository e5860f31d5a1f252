"""Is the encoder 784-128-64-32-16 faster than nn.Sequential of nn.Linear and nn.ReLU?"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

from . import blocks
from .command import Options, Question
from .harness import Case, Sides
from .peers import gpu, local
from .stacks import EVERYTHING, FORWARD, PARAMETERS, encoder_sides, stack_bytes, stack_flops

WIDTHS = (784, 128, 64, 32, 16)
BATCHES = (1, 32, 256, 4096, 65536)
COMPILED_BATCHES = (32, 4096)  # compiling takes longer than measuring
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
            partial(setup, quick=options.quick),
            device=place.device,
            way=place.way,
        )
    yield from blocks.cases(options)


def setup(case: Case, quick: bool) -> Sides:
    peers = {"torch._addmm_activation": local.addmm_activation}
    if not quick and case.sizes["batch"] in COMPILED_BATCHES:
        peers |= {"torch.compile": local.compiled, "Inductor's fused linear": local.inductor_linear}
    models = gpu.RELU if case.device == "cuda" else {}
    return encoder_sides(case, case.sizes["batch"], WIDTHS, peers, models)


QUESTION = Question(
    name="encoder",
    title="Encoder 784-128-64-32-16 (relu) against nn.Sequential of nn.Linear and nn.ReLU",
    cases=cases,
    budget_s=1.0,
)
