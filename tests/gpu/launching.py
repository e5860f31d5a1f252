"""Launches that compile and do not run, and what the machine code of a kernel shows."""

from __future__ import annotations

import collections
import contextlib
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from fastenc.kernels import device
from fastenc.kernels.configs import Config
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

ARCHS = tuple(device.TARGETS)
CANDIDATE_ARCHS = (80, 86, 90)  # one for each size of shared memory
AMD = ("gfx942",)
MI300X = device.Target(80, 304, 65_536)  # the launchers choose as for an A100 with less shared memory
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

# SASS opcodes by what they show. Tensor cores: HMMA; on sm_90 HGMMA and on sm_100 UTCHMMA for wide tiles. Copies into
# shared memory past the registers: LDGSTS, by descriptor UTMALDG. Local memory, where spilled registers go: LDL, STL.
OPCODES = {
    "tensor_core": ("HMMA", "HGMMA", "UTCHMMA"),
    "copies": ("LDGSTS", "UTMALDG"),
    "local_memory": ("LDL", "STL"),
}


@dataclass(frozen=True)
class Case:
    """Calls of launchers: `launch(dtype)` makes meta tensors of that dtype and calls."""

    name: str
    launch: Callable[[torch.dtype], object]
    dtypes: tuple[str, ...] = tuple(DTYPES)
    archs: tuple[int | str, ...] = ARCHS
    searched: bool = False  # the candidates of a search are compiled as well, where asked for
    aligned: bool = True  # every row of every matrix begins at a multiple of 16 bytes


@dataclass(frozen=True)
class Launch:
    kernel: JITFunction
    keywords: dict[str, Any]
    compiled: CompiledKernel


class StandIn:
    """What Triton asks of a driver before it compiles. Triton keeps kernels by device: each architecture is another."""

    def __init__(self, arch: int | str) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32) if isinstance(self.arch, int) else GPUTarget("hip", self.arch, 64)

    def get_current_device(self) -> int | str:
        return self.arch

    def get_current_stream(self, device: int | str) -> int:
        return 0


@contextlib.contextmanager
def compiling(arch: int | str, dtype: str) -> Iterator[list[Launch]]:
    """Meanwhile launches compile for `arch` and do not run; fp32 products are made as `dtype` says."""
    launched = []
    compile_or_run = JITFunction.run

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> CompiledKernel:
        if arch in AMD:
            keywords.pop("maxnreg", None)  # which Triton knows for NVIDIA alone
        compiled = compile_or_run(self, *args, grid=grid, warmup=True, **keywords)
        launched.append(Launch(self, keywords, compiled))
        return compiled

    driver.set_active(StandIn(arch))
    facts = device.TARGETS[arch] if isinstance(arch, int) else MI300X
    torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    with mock.patch.object(JITFunction, "run", run), device.assumed(facts):
        yield launched


def launches(case: Case, arch: int | str, dtype: str) -> list[Launch]:
    """What the case launches, with the default configurations."""
    with compiling(arch, dtype) as launched:
        case.launch(DTYPES[dtype])
    return launched


def candidate_launches(case: Case, arch: int | str, dtype: str) -> list[Launch]:
    """What the case launches, and each launch in the largest configurations that a search would measure as well."""

    def try_largest(
        kernel_name: str,
        x: Tensor,
        shape: tuple[object, ...],
        default: Callable[[], Config],
        candidates: Callable[[], list[Config]],
        run: Callable[[Config], object],
    ) -> Config:
        def size(config: Config) -> int:
            return config["num_stages"] * math.prod(value for name, value in config.items() if "BLOCK" in name)

        for config in sorted(candidates(), key=size)[-2:]:
            run(config)
        return default()

    with contextlib.ExitStack() as patches:
        for name, module in tuple(sys.modules.items()):
            if name.startswith("fastenc.kernels.") and hasattr(module, "config_for"):
                patches.enter_context(mock.patch.object(module, "config_for", try_largest))
        return launches(case, arch, dtype)


def records(
    case: Case, arch: int | str, dtype: str, launched: Iterable[Launch], recorded: set[str]
) -> Iterator[dict[str, Any]]:
    """One record for each kernel whose hash is not in `recorded`, which grows."""
    for launch in launched:
        compiled = launch.compiled
        if compiled.hash in recorded:
            continue
        recorded.add(compiled.hash)
        config = {name: value for name, value in launch.keywords.items() if type(value) is int}
        yield {
            "kernel": launch.kernel.fn.__name__,
            "case": case.name,
            "dtype": dtype,
            "arch": arch,
            "config": dict(sorted(config.items())),
            "aligned": case.aligned,
            **products(compiled.asm["ttir"]),
            **(resources(compiled) if isinstance(arch, int) else amd_resources(compiled)),
        }


def products(ttir: str) -> dict[str, Any]:
    """The shapes of the results of `tl.dot`, and the most of them that are in one loop."""
    shapes = set()
    loops: list[tuple[int, int]] = []  # around this line: of each the depth of braces before it, and its line
    inside: collections.Counter[int] = collections.Counter()
    depth = 0
    for number, line in enumerate(ttir.splitlines()):
        if "scf.for" in line or "scf.while" in line:
            loops.append((depth, number))
        if found := re.search(r"tt\.dot .*-> tensor<(\d+x\d+)x", line):
            shapes.add(found[1])
            inside.update(first for _, first in loops)
        depth += line.count("{") - line.count("}")
        while loops and depth <= loops[-1][0]:
            loops.pop()
    return {"products": sorted(shapes), "products_in_a_loop": max(inside.values(), default=0)}


def check_parameters(compiled: CompiledKernel) -> None:
    """The machine code must take the arguments that Triton's launcher hands on: tuples flat, nothing for constants.

    After them come two scratch buffers of Triton's own.
    """
    signature = list(_flat(compiled.src.signature.values()))
    if any(type.startswith("tensordesc") for type in signature):
        return  # handed on in several pieces
    handed = ["u32" if type == "i32" else "u64" for type in signature if type != "constexpr"]
    taken = re.findall(r"\.param \.(\w+)", re.search(r"\.entry [^(]*\(([^)]*)\)", compiled.asm["ptx"])[1])
    assert taken == [*handed, "u64", "u64"], f"{compiled.metadata.name} takes {taken}, and {handed} are handed on"


def _flat(types: Iterable[Any]) -> Iterator[str]:
    for type in types:
        if isinstance(type, (tuple, list)):
            yield from _flat(type)
        else:
            yield type


def resources(compiled: CompiledKernel) -> dict[str, Any]:
    """What ptxas made of it.

    registers, stack (bytes): of a thread; shared (bytes): of a block; then how many instructions of each kind, and of
    sm_90's asynchronous products the most that any wait leaves unfinished.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "-res-usage", "-sass", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    check_parameters(compiled)
    opcodes = count_opcodes(listing)
    unfinished = re.findall(r"wgmma\.wait_group\.sync\.aligned\s+(\d+)", compiled.asm["ptx"])
    return {
        "registers": int(re.search(r"\bREG:(\d+)", listing)[1]),
        "stack": int(re.search(r"\bSTACK:(\d+)", listing)[1]),
        "shared": compiled.metadata.shared,
        **{kind: {name: opcodes[name] for name in names if opcodes[name]} for kind, names in OPCODES.items()},
        "unfinished": max(map(int, unfinished), default=0),
    }


def amd_resources(compiled: CompiledKernel) -> dict[str, Any]:
    """Vector registers, how many of them are spilled, and shared memory in bytes."""
    assembly = compiled.asm["amdgcn"]
    return {
        "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1]),
        "spilled": int(re.search(r"\.vgpr_spill_count:\s+(\d+)", assembly)[1]),
        "shared": compiled.metadata.shared,
    }


def count_opcodes(sass: str) -> collections.Counter[str]:
    """How often each opcode, without its modifiers, is in what cuobjdump printed."""
    return collections.Counter(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", sass, re.MULTILINE))
