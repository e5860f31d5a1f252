"""The CUDA kernels on a CPU: csrc/cuda built over csrc/simt as operators for CPU tensors, and what steers and counts.

Import this before the backend `cuda` is asked for anything. Where there is a GPU it does nothing, and the same tests
run compiled, on CUDA tensors.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fastenc.backends import cuda

ROOT = Path(__file__).parents[1]
EMULATED = not torch.cuda.is_available()
FLAGS = (
    "-O2",
    "-std=c++20",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wno-unknown-pragmas",
    "-DTORCH_TARGET_VERSION=0x020d000000000000",  # the stable ABI of torch 2.13, as in setup.py
)

ORDERS = ("forward", "reverse", "random", "greedy")
SCHEDULES = tuple(itertools.product(ORDERS, (True, False)))  # and whether asynchronous copies land late


def build() -> Path:
    """The library, built again where a source has changed; several processes may ask for it at once."""
    folder = ROOT / "build" / "emulated"
    sources = sorted([*(ROOT / "csrc" / "cuda").glob("*.cu"), *(ROOT / "csrc" / "simt").glob("*.cpp")])
    headers = [path for end in ("h", "cuh") for path in (ROOT / "csrc").rglob(f"*.{end}")]
    digest = hashlib.sha256(" ".join((*FLAGS, torch.__version__)).encode())
    for path in sorted([*sources, *headers]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    library = folder / f"{digest.hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _compile(sources, library)
    return library


def _compile(sources: list[Path], library: Path) -> None:
    scratch = library.with_suffix(f".{os.getpid()}")
    scratch.mkdir(exist_ok=True)
    compiler = os.environ.get("CXX", "g++").split()
    torch_folder = Path(torch.__file__).parent
    includes = ["-isystem", str(torch_folder / "include")]
    objects = [scratch / f"{source.name}.o" for source in sources]
    waiting = [
        [*compiler, *FLAGS, *includes, "-x", "c++", "-c", str(source), "-o", str(target)]
        for source, target in zip(sources, objects, strict=True)
    ]
    running: list[subprocess.Popen[str]] = []
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            running.append(subprocess.Popen(waiting.pop(), stderr=subprocess.PIPE, text=True))
        process = running.pop(0)
        errors = process.communicate()[1]
        assert process.returncode == 0, errors
    linked = scratch / library.name
    link = [*compiler, "-shared", "-o", str(linked), *map(str, objects), f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
    subprocess.run(link, check=True)
    linked.replace(library)
    for path in [*objects, scratch]:
        path.unlink() if path.is_file() else path.rmdir()


@functools.cache
def load() -> None:
    torch.ops.load_library(str(build()))


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
