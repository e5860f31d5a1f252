"""What sentryward (PyPI), a static verifier of PTX, says about races in the CUDA kernels: a report, not a test.

    python tests/gpu/race_proof.py                     all launches below, one JSON line each, to stdout
    python tests/gpu/race_proof.py --only reduce       those whose name has this in it
    python tests/gpu/race_proof.py --seconds 300       for each

It needs nvcc and sentryward, and no GPU. A proof holds for one launch, all of its schedules, any numbers in memory, and
sentryward's model of the machine, where the lanes of a warp do not race. encoder_chain_kernel, whose parameters its
launcher plans, is not among them.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import runpy
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SHARED = 101_376  # bytes: what every GPU has, though most kernels ask for less
ARITHMETICS = {"ieee": 0, "tf32": 1, "half": 2, "bfloat16": 3}  # of csrc/cuda/launch.h
BFLOAT16, RELU = 3, 1  # the second is of csrc/activation.h

Pointer, Integer = ctypes.c_void_p, ctypes.c_int64


# The structs of csrc/cuda/launch.h. A parameter of another size in the PTX is refused.


class Matrix(ctypes.Structure):
    _fields_ = (("data", Pointer), ("row_stride", Integer), ("col_stride", Integer))


class DenseForward(ctypes.Structure):
    _fields_ = (
        *((name, Integer) for name in ("arithmetic", "M", "N", "K")),
        *((name, Matrix) for name in ("x", "weight")),
        ("bias", Pointer),
        ("activation", Integer),
        *((name, Pointer) for name in ("out", "preact")),
    )


class PreactGradient(ctypes.Structure):
    _fields_ = (
        *((name, Integer) for name in ("arithmetic", "M", "N")),
        *((name, Matrix) for name in ("grad_out", "saved")),
        ("activation", Integer),
        *((name, Pointer) for name in ("grad_preact", "grad_bias", "workspace")),
    )


class WeightPartials(ctypes.Structure):
    _fields_ = (
        *((name, Integer) for name in ("arithmetic", "M", "N", "K")),
        *((name, Matrix) for name in ("grad_preact", "x")),
        ("partials", Pointer),
    )


class PartialSums(ctypes.Structure):
    _fields_ = (("partials", Pointer), ("parts", Integer), ("stride", Integer), ("out", Pointer), ("count", Integer))


class Reduce(ctypes.Structure):
    _fields_ = (("arithmetic", Integer), ("sums", Integer), ("sum", PartialSums * 16))


class StackLayer(ctypes.Structure):
    _fields_ = (
        ("N", Integer),
        ("weight", Matrix),
        ("bias", Pointer),
        ("activation", Integer),
        *((name, Pointer) for name in ("out", "preact")),
    )


class EncoderForward(ctypes.Structure):
    _fields_ = (
        *((name, Integer) for name in ("arithmetic", "M", "K", "depth")),
        ("x", Matrix),
        ("layers", StackLayer * 8),
    )


@dataclass(frozen=True)
class Launch:
    """`kernel` is a pattern of its mangled name. A pointer that is not 0 is to a buffer of its own. With `addresses` it
    has an address, as kernels choose their accesses by it; sentryward then cannot tell such buffers apart, answers
    "unsupported" and proves no more than that the barriers are right."""

    name: str
    source: str
    kernel: str
    blocks: int
    threads: int
    parameters: tuple[Any, ...]
    addresses: bool = True


def launches() -> list[Launch]:
    M, N, K = 64, 64, 96
    x, weight, dz = Matrix(1, K, 1), Matrix(1, K, 1), Matrix(1, N, 1)
    gradient = PreactGradient(BFLOAT16, M, N, dz, dz, RELU, 1, 0, 0), Pointer(1), Integer(M), ctypes.c_bool(True)
    sums = (PartialSums * 16)(PartialSums(1, 4, 200, 1, 200))
    bfloat16 = "I13__nv_bfloat16"
    found = [
        Launch("reduce", "reduce", f"reduce_kernel{bfloat16}", 2, 128, (Reduce(BFLOAT16, 1, sums),), False),
        Launch("preact_gradient", "preact_gradient", f"preact_gradient_kernel{bfloat16}", 1, 256, gradient, False),
    ]
    for name, number in ARITHMETICS.items():
        forward = DenseForward(number, M, N, K, x, weight, 1, RELU, 1, 0)
        first, second = (StackLayer(width, Matrix(1, below, 1), 1, RELU, 1, 0) for width, below in ((32, K), (16, 32)))
        stack = EncoderForward(number, M, K, 2, x, (StackLayer * 8)(first, second))
        step = 16 if name in ("ieee", "tf32") else 32  # columns of an operand: 64 bytes
        partials = WeightPartials(number, M, N, K, dz, x, 1), Integer(64)
        of_type, small = f"_kernelILNS0_10ArithmeticE{number}E", "NS0_9BlockTileILi2ELi2ELi2ELi4EEELNS0_3SumE0E"
        found += [
            Launch(f"weight_partials {name}", "weight_partials", f"weight_partials{of_type}", 2, 128, partials),
            Launch(f"dense_forward {name}", "dense_forward", f"dense_forward{of_type}{small}", 1, 128, (forward,)),
            Launch(
                f"encoder_forward {name}",
                "encoder_forward",
                f"encoder_forward{of_type}Li4E",
                1,
                128,
                (stack, Integer(K // step + 32 // step)),
            ),
        ]
    return found


def fields(value: Any, name: str, offset: int = 0) -> list[tuple[int, str, Any]]:
    """Offset, name and value (a Pointer, or another simple number) of each number in a parameter."""
    if isinstance(value, ctypes.Structure):
        parts = []
        for field, kind in value._fields_:
            part = getattr(value, field)
            if not isinstance(part, (ctypes.Structure, ctypes.Array)):
                part = kind(part)
            parts += fields(part, f"{name}.{field}", offset + getattr(type(value), field).offset)
        return parts
    if isinstance(value, ctypes.Array):
        size = ctypes.sizeof(value._type_)
        return [one for i, part in enumerate(value) for one in fields(part, f"{name}.{i}", offset + i * size)]
    return [(offset, name, value)]


def kernel_input(launch: Launch, entry: str) -> dict[str, Any]:
    declarations: list[dict[str, Any]] = []
    arguments: list[dict[str, Any]] = []
    for number, parameter in enumerate(launch.parameters):
        for offset, name, value in fields(parameter, f"p{number}"):
            place = {"parameter": number, "offset": offset}
            number_there = int(value.value or 0)
            if isinstance(value, Pointer) and number_there and not launch.addresses:
                declarations.append({**place, "type": "pointer", "space": "global", "object": name})
                continue
            if isinstance(value, Pointer) and number_there:
                number_there = (1 + len(arguments)) << 40
            kind = {1: "u8", 8: "u64"}[ctypes.sizeof(value)]
            arguments.append({**place, "type": kind, "value": number_there})
    shape = {"grid_dim": [launch.blocks, 1, 1], "block_dim": [launch.threads, 1, 1], "dynamic_shared_bytes": SHARED}
    return {
        "schema": "spverify.kernel-input/v1",
        "entry": entry,
        "launch": shape,
        "declarations": declarations,
        "arguments": arguments,
    }


def compile_ptx(source: str, folder: Path) -> Path:
    toolkits = runpy.run_path(str(ROOT / "setup.py"))["find_toolkits"]()
    if not toolkits:
        sys.exit("fastenc: there is no nvcc; install the CUDA toolkit")
    target = folder / f"{source}.ptx"
    if target.exists():
        return target
    flags = ["-ptx", "-arch=compute_80", "-std=c++17", f"-I{ROOT / 'csrc'}"]
    code = ROOT / f"csrc/cuda/{source}.cu"
    subprocess.run([toolkits[0].home / "bin/nvcc", *flags, code, "-o", target], check=True)
    return target


def prove(launch: Launch, folder: Path, seconds: float) -> dict[str, Any]:
    from sentryward import verify  # only here, so that --help needs none

    ptx = compile_ptx(launch.source, folder)
    found = re.search(rf"\.entry (\w*{launch.kernel}\w*)\(([^)]*)\)", ptx.read_text())
    if not found:
        return {"kernel": launch.name, "result": "there is no such kernel in the PTX"}
    sizes = [int(size) for size in re.findall(r"_param_\d+\[(\d+)\]", found[2])]
    if sizes != [ctypes.sizeof(one) for one in launch.parameters if isinstance(one, ctypes.Structure)]:
        return {"kernel": launch.name, "result": f"its structs have other sizes than here: {sizes}"}
    (folder / "input.json").write_text(json.dumps(kernel_input(launch, found[1])))
    answer = verify(ptx, input=folder / "input.json", timeout_seconds=seconds, memory_limit_mib=8000)
    return {
        "kernel": launch.name,
        "result": answer["result"],
        "checks": answer.get("checks"),
        "races": answer.get("race_count"),
        "diagnostics": (answer.get("diagnostics") or [])[:3],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--seconds", type=float, default=120)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for launch in launches():
            if options.only in launch.name:
                print(json.dumps(prove(launch, Path(folder), options.seconds)), flush=True)


if __name__ == "__main__":
    main()
