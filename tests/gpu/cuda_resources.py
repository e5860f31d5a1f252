"""What every CUDA kernel needs on every GPU that it was compiled for.

    python tests/gpu/cuda_resources.py             the report, as JSON, to stdout
    python tests/gpu/cuda_resources.py --write     the same, into cuda_resources.json

Registers, local memory and threads are read from the built library by cuobjdump: nvcc's, or the one that comes with
Triton. Shared memory is chosen as a kernel is launched: the operators run over the emulator, which notes the launches
and runs none. Neither GPU nor driver is needed. It is a process of its own, as there the operators take CPU tensors.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
import math
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from fastenc import _C
from fastenc.activation import activation_code

ROOT = Path(__file__).parents[2]
RESOURCES = Path(__file__).parent / "cuda_resources.json"

Record = dict[str, Any]


def toolkits() -> list[Any]:
    """Those that setup.py finds; `home` has bin/nvcc."""
    return runpy.run_path(str(ROOT / "setup.py"))["find_toolkits"]()


@functools.cache
def cuobjdump() -> str:
    """The program's path."""
    triton = importlib.util.find_spec("triton")
    folders = [toolkit.home / "bin" for toolkit in toolkits()]
    folders += [Path(folder, "backends/nvidia/bin") for folder in (triton and triton.submodule_search_locations) or ()]
    found = next(filter(None, (shutil.which("cuobjdump", path=str(folder)) for folder in folders)), None)
    if not found:
        sys.exit("fastenc: there is no cuobjdump; install the CUDA toolkit, or triton, which has one")
    return found


def library() -> Path:
    """The built CUDA kernels."""
    found = importlib.util.find_spec("fastenc._C_cuda")
    if not found or not found.origin:
        sys.exit("fastenc: fastenc._C_cuda is not built; build fastenc where nvcc is")
    return Path(found.origin)


@functools.cache
def enumerators() -> dict[str, list[str]]:
    """The names of each enum of the kernels, in its order."""
    found = {}
    for path in sorted((ROOT / "csrc" / "cuda").glob("*.*h")):
        for enum, names in re.findall(r"enum class (\w+)[^{;]*{([^}]*)}", path.read_text()):
            found[enum] = [name.strip().removeprefix("k").lower() for name in names.split(",")]
    return found


NUMBERS = {"__half": "half", "Half": "half", "__nv_bfloat16": "bfloat16", "BFloat16": "bfloat16"}


def readable(names: list[str]) -> list[str]:
    """Such as dense_forward_kernel<bfloat16, BlockTile<2, 2, 2, 4>>, of what the compilers call kernels."""
    found = []
    for name in run("c++filt", "--types", text="\n".join(names)).splitlines():
        if as_type := re.search(r"&\((.+)\)>$", name):  # the emulator's
            name = as_type[1]
        name = re.sub(r"\([^()]*\)$", "", name.removeprefix("void ").replace("fastenc::cuda::", "")).replace(" >", ">")
        name = re.sub(r"\((\w+)\)(\d+)", lambda value: enumerators()[value[1]][int(value[2])], name)
        found.append(re.sub(r"\w+", lambda word: NUMBERS.get(word[0], word[0]), name))
    return found


def run(*command: str | Path, text: str | None = None) -> str:
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def threads(path: Path) -> dict[tuple[int, str], int]:
    """The most threads in a block, by architecture and mangled name: what the kernel is compiled for."""
    most = {}
    arch, name, attribute = 0, "", ""
    for line in run(cuobjdump(), "-elf", path).splitlines():
        if found := re.match(r"arch = sm_(\d+)", line):
            arch = int(found[1])
        elif found := re.match(r"\.nv\.info\.(\w+)$", line):
            name = found[1]
        elif found := re.match(r"\s+Attribute:\s+(\w+)", line):
            attribute = found[1]
        elif attribute == "EIATTR_MAX_THREADS" and (found := re.match(r"\s+Value:\s+(0x\w+) (0x\w+) (0x\w+)", line)):
            most[arch, name] = math.prod(int(extent, 16) for extent in found.groups())
    return most


def measure(path: Path) -> list[Record]:
    """The records of all kernels in a library or object file, sorted."""
    most = threads(path)
    records = []
    arch, name = 0, ""
    for line in run(cuobjdump(), "-res-usage", path).splitlines():
        if found := re.match(r"arch = sm_(\d+)", line):
            arch = int(found[1])
        elif found := re.match(r" Function (\w+):$", line):
            name = found[1]
        elif found := re.match(r"  REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            use = dict(zip(("registers", "stack", "static_shared", "local"), map(int, found.groups()), strict=True))
            records.append({"kernel": name, "arch": arch, "threads": most[arch, name], **use})
    for record, kernel in zip(records, readable([record["kernel"] for record in records]), strict=True):
        record["kernel"] = kernel
    return sorted(records, key=lambda record: (record["kernel"], record["arch"]))


def call_all() -> None:
    """Call the operators so that each kernel is launched with as much shared memory as it ever takes."""
    operators = torch.ops.fastenc_cuda
    numbers = [(torch.float32, False), (torch.float32, True), (torch.float16, False), (torch.bfloat16, False)]
    relu = activation_code("relu")
    for (dtype, tf32), M in itertools.product(numbers, (1, 50_000)):  # for both sizes of tiles
        one = torch.empty(1, dtype=dtype)
        for widths in ((784, 128, 64, 32, 16), (784, *[128] * 8), (784, 128, 1000), (784, 1000)):
            weights = [one.expand(N, K) for K, N in itertools.pairwise(widths)]
            depth = len(weights)
            x, grad_out, relus = one.expand(M, widths[0]), one.expand(M, widths[-1]), [relu] * depth
            results = operators.encoder_forward(x, weights, [None] * depth, relus, True, tf32)
            operators.encoder_backward(grad_out, x, weights, results, relus, [1] * (2 * depth + 1), tf32)
        for weight in (torch.empty(1000, 784, dtype=dtype), torch.empty(784, 1000, dtype=dtype).t()):
            out, _ = operators.dense_forward(x, weight, None, relu, True, tf32)
            operators.dense_backward(grad_out, x, weight, out, relu, 1, 1, 1, tf32)


def shared_memory() -> dict[str, int]:
    """The most bytes that a block is launched with, by kernel."""
    sys.path.insert(0, str(ROOT / "tests"))
    import emulated  # loads the operators for CPU tensors

    emulated.load()
    torch.ops.fastenc_simt.count(True)
    torch.ops.fastenc_simt.run(False)
    call_all()
    told = json.loads(torch.ops.fastenc_simt.traffic())
    most: dict[str, int] = {}
    for kernel, (_, _, shared) in zip(readable(told["kernels"]), told["launches"], strict=True):
        most[kernel] = max(shared, most.get(kernel, 0))
    return most


def report() -> dict[str, Any]:
    records, shared = measure(library()), shared_memory()
    for record in records:
        record["shared"] = shared[record["kernel"]]
    return {"nvcc": _C.build_info()["cuda"], "records": records}


def as_text(made: dict[str, Any]) -> str:
    """JSON with one line per record, so that a change shows as a line of a diff."""
    lines = ",\n".join(json.dumps(record) for record in made["records"])
    return f'{{"nvcc": "{made["nvcc"]}", "records": [\n{lines}\n]}}\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    text = as_text(report())
    if parser.parse_args().write:
        RESOURCES.write_text(text)
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
