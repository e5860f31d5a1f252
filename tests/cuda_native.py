"""Builds the CUDA kernels over csrc/simt, as a program that is given cases, and as operators for PyTorch.

The program, tests/native/cuda_kernels.cpp, runs their launchers. It has three builds. "plain" has guards around every
buffer. "address" has AddressSanitizer and UBSan; alignment is checked, as GPUs need it. "thread" has ThreadSanitizer in
all but the emulator itself, whose fibers are its threads.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from fastenc.activation import ACTIVATIONS

ROOT = Path(__file__).parents[1]
BUILT = ROOT / "build" / "cuda_native"
TORCH = Path(torch.__file__).parent

ARITHMETICS = ("ieee", "tf32", "half", "bfloat16")  # in the order of csrc/cuda/launch.h
ORDERS = ("forward", "reverse", "random", "greedy")  # of csrc/simt/simt.h
STRIDES = ("contiguous", "transposed", "expanded", "scalar", "misaligned", "padded", "strided", "reversed")

EMULATOR = [ROOT / "csrc/simt" / name for name in ("fiber.cpp", "simt.cpp", "traffic.cpp")]  # knows no torch
COMMON = ("-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{ROOT / 'csrc'}")
# Of the program and of the operators, which share what they compile.
PLAIN = (
    *("-O2", "-fPIC", "-fvisibility=hidden"),
    "-DTORCH_TARGET_VERSION=0x020d000000000000",  # the stable ABI of torch 2.13, as in setup.py
    *("-isystem", str(TORCH / "include")),
)
FLAGS = {
    "plain": PLAIN,
    "address": ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-O1", "-g1", "-fsanitize=thread", "-Wno-tsan", "-DSIMT_THREAD_SANITIZER"),
    "library": ("-O2", "-fPIC"),
    "operators": PLAIN,
}
LINKED = {"library": ("-shared",), "operators": ("-shared", f"-L{TORCH / 'lib'}", "-ltorch_cpu")}
SANITIZERS = {
    "ASAN_OPTIONS": "detect_leaks=0",  # what a faulting kernel leaves on its fibers
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}


@dataclass(frozen=True)
class Case:
    """One launch. `widths` are K, then the outputs of each layer; `wanted` has a bit for each gradient."""

    op: str
    arithmetic: str = "ieee"
    M: int = 1
    widths: tuple[int, ...] = (1, 1)
    activations: tuple[str, ...] = ("identity",)
    x: str = "contiguous"
    weight: str = "contiguous"
    grad_out: str = "contiguous"
    saved: str = "contiguous"
    infinite: str = "none"  # x, weight or grad_out: its first number is Inf
    bias: bool = True
    save: bool = True
    wanted: int = -1
    integers: bool = False
    seed: int = 1
    check: bool = True  # against loops in double precision
    order: str = "forward"
    late: bool = True  # asynchronous copies land when they are waited for, or at once
    planted: str = "none"

    def line(self) -> str:
        words = {
            **self.__dict__,
            "arithmetic": ARITHMETICS.index(self.arithmetic),
            "widths": ",".join(map(str, self.widths)),
            "activations": ",".join(str(list(ACTIVATIONS).index(name)) for name in self.activations),
            "order": ORDERS.index(self.order),
        }
        return " ".join(f"{key}={int(value) if isinstance(value, bool) else value}" for key, value in words.items())


@dataclass(frozen=True)
class Outcome:
    """`verdict`: ok (detail: a digest of the results' bits), wrong, guard, fault; or what ended the program: address,
    undefined, race, crash (detail: its last words)."""

    case: Case
    verdict: str
    detail: str


def schedules(case: Case) -> list[Case]:
    """`case` in every order, with late and with early copies. Only the first is compared with exact results."""
    all_ = [replace(case, order=order, late=late) for order in ORDERS for late in (True, False)]
    return [all_[0], *(replace(other, check=False) for other in all_[1:])]


def run(kind: str, cases: Iterable[Case]) -> list[Outcome]:
    """The cases one after the other in one process of the build `kind`; none after one that ends it."""
    cases = list(cases)
    command: list[str | Path] = [program(kind)]
    if kind == "thread" and (setarch := shutil.which("setarch")):
        command = [setarch, "-R", *command]  # else it does not start where addresses are very random
    result = subprocess.run(
        command,
        input="".join(case.line() + "\n" for case in cases),
        env={**os.environ, **SANITIZERS},
        capture_output=True,
        text=True,
    )
    lines = [line.partition(" ") for line in result.stdout.splitlines()]
    outcomes = [Outcome(case, verdict, detail) for case, (verdict, _, detail) in zip(cases, lines, strict=False)]
    if result.returncode:
        outcomes.append(Outcome(cases[len(outcomes)], what_ended(result.stderr), result.stderr[-6000:]))
    return outcomes


def what_ended(words: str) -> str:
    if "ThreadSanitizer: data race" in words:
        return "race"
    if "ERROR: AddressSanitizer" in words:
        return "address"
    return "undefined" if "runtime error:" in words else "crash"


@functools.cache
def program(kind: str) -> Path:
    """The program, compiled if its sources are not those of the last time."""
    sources = [
        *sorted((ROOT / "tests/native").glob("cuda_*.cpp")),
        *(path for path in sorted((ROOT / "csrc/cuda").glob("*.cu")) if path.name != "ops.cu"),
    ]
    return linked(kind, "cuda_kernels", sources)


def library(name: str, sources: Sequence[Path]) -> Path:
    """These sources over the emulator, to be loaded by ctypes."""
    return linked("library", name, sources)


def operator_library() -> Path:
    """The operators of csrc/cuda for CPU tensors, and those that steer the emulator."""
    sources = [*sorted((ROOT / "csrc/cuda").glob("*.cu")), ROOT / "csrc/simt/operators.cpp"]
    return linked("operators", "operators", sources)


def linked(kind: str, name: str, sources: Sequence[Path]) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not compiler or not compiles(compiler, kind):
        pytest.skip(f"there is no C++ compiler for the {kind} build")
    BUILT.mkdir(parents=True, exist_ok=True)
    with open(BUILT / "lock", "w") as lock, ThreadPoolExecutor(2) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two processes that test, one compiles
        objects = list(pool.map(lambda source: compiled(compiler, kind, source), [*sources, *EMULATOR]))
        known = digest(*(path.name for path in objects))
        return made(BUILT / f"{kind}-{name}-{known}", [compiler, *FLAGS[kind], *objects, *LINKED.get(kind, ())])


def compiles(compiler: str, kind: str) -> bool:
    probe = [compiler, *FLAGS[kind], "-x", "c++", "-", "-o", os.devnull]
    return subprocess.run(probe, input=b"int main() {}", capture_output=True).returncode == 0


def compiled(compiler: str, kind: str, source: Path) -> Path:
    flags = [*COMMON, *FLAGS[kind]]
    if source.parent.name == "simt":
        flags = [flag for flag in flags if flag != "-fsanitize=thread"]  # it makes the threads that are looked at
    target = BUILT / f"{source.parent.name}-{source.stem}-{digest(compiler, *flags)}-{digest(closure(source))}"
    return made(target, [compiler, *flags, "-c", "-x", "c++", source])


def digest(*words: str) -> str:
    return hashlib.sha256(repr(words).encode()).hexdigest()[:16]


@functools.cache
def closure(source: Path) -> str:
    """The text of a source and of all of ours that it includes."""
    found = [source]
    for path in found:
        for name in re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE):
            included = next(folder / name for folder in (path.parent, ROOT / "csrc") if (folder / name).exists())
            if included.resolve() not in found:
                found.append(included.resolve())
    return "".join(path.read_text() for path in found)


def made(target: Path, command: Sequence[str | Path]) -> Path:
    """`target`, made by `command` -o unless it is there. Those made of other sources go when they are a day old."""
    if target.exists():
        return target
    for old in target.parent.glob(target.name.rpartition("-")[0] + "-*"):
        if old.stat().st_mtime < time.time() - 24 * 3600:
            old.unlink(missing_ok=True)
    unfinished = target.with_name(f"unfinished-{os.getpid()}-{target.name}")
    result = subprocess.run([*command, "-o", unfinished], capture_output=True, text=True)
    assert result.returncode == 0, f"{target.name} does not build:\n{result.stderr[-6000:]}"
    return unfinished.replace(target)
