"""The CUDA kernels on a CPU: csrc/cuda built over csrc/simt as operators for CPU tensors, and what steers and counts.

Import this before the backend `cuda` is asked for anything. Where there is a GPU it does nothing, and the same tests
run compiled, on CUDA tensors.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from cuda_native import ORDERS, operator_library

from fastenc.backends import cuda

EMULATED = not torch.cuda.is_available()
SCHEDULES = tuple(itertools.product(ORDERS, (True, False)))  # and whether asynchronous copies land late


@functools.cache
def load() -> None:
    torch.ops.load_library(str(operator_library()))


@contextlib.contextmanager
def scheduled(order: str, late_copies: bool, seed: int = 1, planted: str = "") -> Iterator[None]:
    """Run the threads of a block in this order, see `simt::Order`; with the mistake of that name, if there is one."""
    operators = torch.ops.fastenc_simt
    try:
        operators.schedule(order, late_copies, seed, planted)
        yield
    finally:
        operators.schedule("forward", True, 1, "")


@contextlib.contextmanager
def guarded_outputs() -> Iterator[None]:
    """All that the operators allocate begins as NaN and has NaN around it, which is checked at the end.

    Where kernels are compiled it does nothing: there compute-sanitizer looks.
    """
    if not EMULATED:
        yield
        return
    operators = torch.ops.fastenc_simt
    operators.guard(True)
    try:
        yield
        assert operators.stray_writes() == 0, "bytes around a tensor that an operator allocated were written"
    finally:
        operators.guard(False)


SPACES = ("global load", "global store", "shared load", "shared store")


class Site(NamedTuple):
    """A place in the kernels' source where memory is accessed: whole warps' accesses, and what they cost."""

    site: str  # file:line
    space: str  # one of SPACES
    accesses: int
    bytes: int
    moved: int  # global: 32 bytes for each sector touched
    passes: int  # shared: trips to the banks
    least: int  # shared: trips without a conflict


class Counted(NamedTuple):
    launches: list[list[int]]  # blocks, threads of a block, bytes of its shared memory
    traffic: list[Site]

    def share_of_sectors(self, space: str) -> float:
        """The bytes asked for over the bytes of the sectors that they lie in."""
        sites = [site for site in self.traffic if site.space == space]
        return sum(site.bytes for site in sites) / sum(site.moved for site in sites)

    def conflicts(self) -> float:
        """Trips to the banks of shared memory over those that would do."""
        return sum(site.passes for site in self.traffic) / sum(site.least for site in self.traffic)


@contextlib.contextmanager
def counted() -> Iterator[list[Counted]]:
    """Afterwards, what the launches inside the block were and accessed."""
    operators = torch.ops.fastenc_simt
    found: list[Counted] = []
    operators.count(True)
    try:
        yield found
        told: dict[str, Any] = json.loads(operators.traffic())
        found.append(Counted(told["launches"], [Site(**site) for site in told["traffic"]]))
    finally:
        operators.count(False)


if EMULATED:
    load()
    cuda.emulated.cache_clear()

only_emulated = pytest.mark.skipif(not EMULATED, reason="it is the emulator that counts and schedules")
