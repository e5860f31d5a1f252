"""A model, not a measurement: how long training steps of the encoder take on a GPU, from counts and datasheets.

    python -m benchmarks.roofline                # some minutes; needs the extra `test`, and no GPU
    python -m benchmarks.roofline --rows 4096

The kernels' bytes and operations are counted while Triton's interpreter runs them (tests/interpreter.py); those of
eager PyTorch are what its launches must load and store. A launch takes a gap and the longer of its bytes at the
memory's full bandwidth and its operations at the peak rate of the processors that it has programs for (for eager: all).
Real launches reach neither, and not all by the same share; what the host needs for launching, which decides where
batches are small, is not in the model.

Datasheets and gap are those of `fastenc.backends.rule`.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

import fastenc
from fastenc.backends.rule import KERNEL, Datasheet, datasheet
from fastenc.functional import encoder

from .encoder import WIDTHS
from .harness import dtype_name

TESTS = Path(__file__).parents[1] / "tests"
ROWS = (4096, 65536)
ACTIVATIONS = ("relu", "relu", "relu", "identity")


class Gpu(NamedTuple):
    sheet: Datasheet
    processors: int


GPUS = {"A100 SXM 80 GB": Gpu(datasheet(80), 108), "H100 SXM": Gpu(datasheet(90), 132)}


class Launch(NamedTuple):
    """One kernel: the bytes that must cross the memory bus, each address once, and its operations."""

    name: str
    bytes: int
    flops: int
    programs: int | None = None  # None: enough for any GPU


def modelled_time(launch: Launch, gpu: Gpu, dtype: torch.dtype) -> float:
    """Microseconds."""
    rate = gpu.sheet.tensor if dtype.itemsize == 2 else gpu.sheet.plain
    if launch.programs is not None:
        rate *= min(1.0, launch.programs / gpu.processors)
    return KERNEL + max(launch.bytes / (gpu.sheet.memory * 1e6), launch.flops / (rate * 1e6))


def eager_launches(M: int, widths: Sequence[int], activations: Sequence[str], itemsize: int) -> list[Launch]:
    """What eager PyTorch launches, forward and backward, without the input's gradient.

    A layer [M, K] -> [M, N]: addmm, with the bias in it; the activation in a pass of its own; backward the activation's
    derivative, the sum for the bias, and a product for each gradient that is needed.
    """
    forward, backward = [], []
    for i, ((K, N), activation) in enumerate(zip(itertools.pairwise(widths), activations, strict=True)):
        product = 2 * M * K * N
        forward.append(Launch("addmm", M * K + N * K + N + M * N, product))
        grads = [
            Launch("sum", M * N + N, M * N),
            Launch("mm, weight", M * N + M * K + N * K, product),
        ]
        if i > 0:
            grads.append(Launch("mm, input", M * N + N * K + M * K, product))
        if activation != "identity":
            forward.append(Launch(activation, 2 * M * N, M * N))
            grads.insert(0, Launch(f"{activation}, derivative", 3 * M * N, M * N))
        backward.append(grads)
    launches = [*forward, *itertools.chain.from_iterable(reversed(backward))]
    return [launch._replace(bytes=launch.bytes * itemsize) for launch in launches]


def least_bytes(M: int, widths: Sequence[int], itemsize: int) -> int:
    """The least that forward and backward move: x, read by each; each output and the gradients' counterpart once.

    That is 2 K + 2 (N_1 + ... + N_L) elements for a row. Beside that, weights and biases are read by each pass, but
    those of the first layer only by the forward pass, and their gradients are written.
    """
    layers = [N * K + N for K, N in itertools.pairwise(widths)]
    return (2 * M * sum(widths) + 3 * sum(layers) - layers[0]) * itemsize


def counted_launches(M: int, widths: Sequence[int], activations: Sequence[str], dtype: torch.dtype) -> list[Launch]:
    """What the Triton backend launches for the same step, counted while interpreted; cuBLAS's share as eager's."""
    if not TESTS.is_dir():
        raise SystemExit("Counting needs the tests of a checkout; run it there: python -m benchmarks.roofline")
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))
    import interpreter
    from fastenc.kernels.weight_gradient import sums_by_cublas

    if not interpreter.INTERPRETED:
        raise SystemExit("Counting needs Triton's interpreter: hide the GPU with CUDA_VISIBLE_DEVICES= (empty)")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(M, widths[0], generator=generator).to(dtype)
    weights = [(torch.randn(N, K, generator=generator) / K**0.5).to(dtype) for K, N in itertools.pairwise(widths)]
    biases = [torch.randn(N, generator=generator).to(dtype) for N in widths[1:]]
    parameters = [parameter.requires_grad_() for parameter in (*weights, *biases)]
    with fastenc.use_backend("triton"), interpreter.watched() as launches:
        out = encoder(x, weights, biases, activations)
        torch.autograd.grad(out, parameters, torch.randn(out.shape, generator=generator).to(dtype))
    counted = [
        Launch(launch.kernel, launch.loaded + launch.stored, launch.flops, math.prod(launch.grid))
        for launch in launches
    ]
    if sums_by_cublas(M, dtype):
        K, N = widths[:2]
        counted.append(Launch("mm, weight", (M * N + M * K + N * K) * dtype.itemsize, 2 * M * K * N))
    return counted


def table(rows: Sequence[int], widths: Sequence[int], activations: Sequence[str], dtype: torch.dtype) -> str:
    """Markdown: launches, elements moved per row, and the modelled times of both sides."""
    names = [f"{gpu}, {what}" for gpu in GPUS for what in ("modelled us", "ratio")]
    lines = [
        f"| rows | | launches | elements per row | of the least | {' | '.join(names)} |",
        "|" + "---|" * (5 + len(names)),
    ]
    for M in rows:
        sides = {
            "least": [Launch("all", least_bytes(M, widths, dtype.itemsize), 0)],
            "eager PyTorch": eager_launches(M, widths, activations, dtype.itemsize),
            "fastenc, Triton": counted_launches(M, widths, activations, dtype),
        }
        least = sides["least"][0].bytes
        for name, launches in sides.items():
            moved = sum(launch.bytes for launch in launches)
            cells = [f"{moved / M / dtype.itemsize:.0f}", f"{moved / least:.2f}"]
            for gpu in GPUS.values():
                time = sum(modelled_time(launch, gpu, dtype) for launch in launches)
                eager = sum(modelled_time(launch, gpu, dtype) for launch in sides["eager PyTorch"])
                cells += ["", ""] if name == "least" else [f"{time:.1f}", f"{eager / time:.2f}"]
            count = "" if name == "least" else str(len(launches))
            lines.append(f"| {M} | {name} | {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, metavar="M")
    parsed = parser.parse_args(arguments)
    dtype = torch.bfloat16
    print(f"Encoder {'-'.join(map(str, WIDTHS))}, relu but for the last layer, {dtype_name(dtype)}.")
    print("Forward and backward without the input's gradient. Bytes and launches are counted.")
    print(f"Times are MODELLED from datasheets, with a gap of {KERNEL:.0f} us between launches: none is measured.")
    print()
    print(table(parsed.rows, WIDTHS, ACTIVATIONS, dtype))
    return 0


if __name__ == "__main__":
    sys.exit(main())
