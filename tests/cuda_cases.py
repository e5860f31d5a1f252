"""Launches of the CUDA kernels for the tests to make: edges that are always tried, and as many at random as wanted."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

from cuda_native import ARITHMETICS, STRIDES, Case

from fastenc.activation import ACTIVATIONS

DENSE = ("dense_forward", "dense_backward", "preact_gradient", "weight_partials")
STACKS = ("encoder_forward", "encoder_backward")
OPS = (*DENSE, *STACKS, "reduce")

DENSE_SHAPES = (  # M, (K, N)
    (1, (1, 1)),
    (64, (64, 64)),
    (67, (129, 65)),
    (130, (33, 200)),
    (5, (300, 8)),
    (200, (24, 17)),
    (0, (5, 7)),
    (6, (0, 7)),
    (6, (5, 0)),
)
STACK_SHAPES = (  # M, widths
    (1, (1, 1)),
    (70, (100, 128, 64, 32, 16)),
    (33, (72, 65, 1, 17)),
    (129, (16, 16, 16)),
    (17, (200, 128, 128, 300)),
    (40, (9, 8, 7, 6, 5, 4, 3, 2, 1)),
    (0, (5, 7, 3)),
    (6, (0, 7, 3)),
)
SUMS = ((1, (1,)), (7, (130, 1, 129)), (33, (128, 5)), (0, (3,)))  # parts, numbers of each sum


def shapes(op: str) -> tuple[tuple[int, tuple[int, ...]], ...]:
    return SUMS if op == "reduce" else STACK_SHAPES if op in STACKS else DENSE_SHAPES


def edges(op: str, arithmetic: str) -> list[Case]:
    """Each shape with activations, strides, masks and options that differ from shape to shape and type to type."""
    generator = random.Random(f"{op} {arithmetic}")
    return [varied(generator, Case(op, arithmetic, M, widths)) for M, widths in shapes(op)]


def varied(generator: random.Random, case: Case) -> Case:
    """`case` with what does not change its shape drawn at random."""
    depth = len(case.widths) - 1
    wanted = generator.randrange(1, 1 << (2 * depth + 1))
    return replace(
        case,
        activations=tuple(generator.choice(list(ACTIVATIONS)) for _ in range(depth)),
        **{name: generator.choice(STRIDES) for name in ("x", "weight", "grad_out", "saved")},
        bias=generator.random() < 0.8,
        save=generator.random() < 0.7,
        wanted=-1 if generator.random() < 0.5 else wanted,
        integers=generator.random() < 0.5,
        seed=generator.randrange(1, 1 << 31),
    )


def size(generator: random.Random, most: int) -> int:
    """Small numbers, those about multiples of 16, and any."""
    near = 16 * generator.randint(1, max(1, most // 16)) + generator.choice((-1, 0, 0, 0, 1, 4, 8))
    return min(most, generator.choice((generator.randint(1, 4), near, generator.randint(1, most))))


def random_cases(seed: int) -> Iterator[Case]:
    """Launches of every op without end, of at most about a million products each."""
    generator = random.Random(seed)
    while True:
        op, arithmetic = generator.choice(OPS), generator.choice(ARITHMETICS)
        M = size(generator, 300)
        if op == "reduce":
            widths = tuple(size(generator, 400) for _ in range(generator.randint(1, 16)))
        elif op in STACKS:
            hidden = [size(generator, 128) for _ in range(generator.choice((0, 1, 2, 3, 7)))]
            widths = (size(generator, 300), *hidden, size(generator, generator.choice((128, 128, 300))))
        else:
            widths = (size(generator, 300), size(generator, 300))
        if op == "reduce" or M * sum(a * b for a, b in itertools.pairwise(widths)) < 1_000_000:
            yield varied(generator, Case(op, arithmetic, M, widths))
