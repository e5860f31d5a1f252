"""Benchmark cases whose answers are changed, as the tests plant them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks import dense, stacks
from benchmarks.harness import Call, Case, Results, Side, Sides


def dense_case(mode: str = stacks.EVERYTHING, dtype: torch.dtype = torch.float32) -> Case:
    M, N, K = 32, 24, 40
    flops, moved = stacks.stack_flops(M, (K, N), mode), stacks.stack_bytes(M, (K, N), mode, dtype.itemsize)
    return Case(mode, {"M": M, "N": N, "K": K}, dtype, 1, flops, moved, dense.setup)


def with_sides(
    case: Case, ours: Callable[[Call], Call] | None = None, eager: Callable[[Call], Call] | None = None
) -> Case:
    """`case`, but with `ours(call)` and `eager(call)` for the calls of these sides."""

    def setup(case_: Case) -> Sides:
        sides = case.setup(case_)
        peers = dict(sides.peers)
        if eager is not None:
            peers[stacks.EAGER] = lying_side(peers[stacks.EAGER], eager)
        return replace(sides, ours=sides.ours if ours is None else lying_side(sides.ours, ours), peers=peers)

    return replace(case, setup=setup)


def lying_side(side: Side, lie: Callable[[Call], Call]) -> Side:
    return replace(side, call=lie(side.call))


def lying_setup(case: Case) -> Sides:
    """Of a dense case whose first output is wrong, for another process."""
    return with_sides(replace(case, setup=dense.setup), ours=tamper(0, add_at_first)).setup(case)


def dying_setup(case: Case) -> Sides:
    os._exit(1)


def sleeping_setup(case: Case) -> Sides:
    """Tells on stderr that it has begun, and does not end."""
    print("asleep", file=sys.stderr, flush=True)
    time.sleep(600)
    raise AssertionError("nobody has stopped it")


def tamper(index: int, change: Callable[[Tensor], Tensor]) -> Callable[[Call], Call]:
    """A lie that returns what the true call does, except for tensor `index`, which is changed."""

    def lie(call: Call) -> Call:
        def lying() -> Results:
            results = [result.detach().clone() for result in call()]
            results[index] = change(results[index])
            return tuple(results)

        return lying

    return lie


def add_at_first(tensor: Tensor) -> Tensor:
    tensor.view(-1)[0] += 1e-3
    return tensor


def zero_last_row(tensor: Tensor) -> Tensor:
    tensor[-1] = 0
    return tensor


def nan_at_last(tensor: Tensor) -> Tensor:
    tensor.view(-1)[-1] = torch.nan
    return tensor
