"""Benchmark cases whose answers are changed, as the tests plant them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks import dense, stacks
from benchmarks.harness import Call, Case, Results, Sides


def dense_case(mode: str = stacks.EVERYTHING, dtype: torch.dtype = torch.float32) -> Case:
    M, N, K = 32, 24, 40
    return Case(mode, {"M": M, "N": N, "K": K}, dtype, 1, stacks.stack_flops(M, (K, N), mode), dense.setup)


def with_sides(case: Case, **lies: Callable[[Call], Call]) -> Case:
    """`case`, but with `lies[side](call)` for the call of that side."""

    def setup(case_: Case) -> Sides:
        sides = case.setup(case_)
        return replace(sides, **{side: lie(getattr(sides, side)) for side, lie in lies.items()})

    return replace(case, setup=setup)


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
