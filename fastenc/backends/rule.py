"""When a GPU backend's kernels should be faster than eager PyTorch: a model, with constants measured on one GPU.

A step takes the longer of what its host needs to launch it and what its device needs to run it. The device needs, for
each kernel, KERNEL microseconds and the longer of arithmetic and memory traffic, by the GPU's datasheet; a stack of
layers at least what one program needs for the sums that it makes alone. Fusing saves the passes over the activations
and launches; it costs where our product is slower than cuBLAS's, and a launch of a Triton kernel costs the host more
than that of an eager operator. In a CUDA graph the host costs nothing.

The constants are of an H200 with an Intel Xeon as its host (benchmarks/results/nvidia-h200-2026-11-28); what other GPUs
reach of theirs is assumed from it. `fastenc tune` measures, and what it finds goes before this rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from typing import NamedTuple

import torch

# Whether to decide as within a CUDA graph: what goes into one is launched before, ordinarily, so that it is compiled.
as_if_captured: ContextVar[bool] = ContextVar("fastenc_as_if_captured", default=False)

# Microseconds.
EAGER_OP = 15.0  # the host, for one operator of eager PyTorch
EAGER_TRAINED_OP = 30.0  # the same in training, with its share of autograd
FUNCTION = 75.0  # the host, for an autograd Function in Python, in either direction
KERNEL = 2.0  # the device, for beginning and ending a kernel

STEP_K = 64
GAIN = 0.9  # our time must be less than this share of eager's: nearer than that the model cannot tell


class Speeds(NamedTuple):
    """What a backend's kernels reach, on tensor cores or without them."""

    step: float  # microseconds for STEP_K columns of a sum that one program makes alone; cuBLAS cuts it in pieces
    chain: float  # microseconds at least for the backward pass of a stack
    fused: float  # microseconds at least for that of a dense layer, made without writing dZ
    shares: Mapping[int, float]  # of the datasheet's rate that products reach, from a compute capability on


class Kernels(NamedTuple):
    """What the model asks of a backend's kernels."""

    choice: float  # microseconds of the host, to choose and call them from Python, beside the launch
    launch: float  # microseconds of the host
    layer: float  # microseconds of the host, for each layer of a launch backward
    leaves_products: bool  # whether a dense layer's products are left to cuBLAS where that is faster, see `fuses`
    widest: float  # the most outputs of a dense layer whose gradients are made without writing dZ
    tensor: Speeds
    plain: Speeds


TRITON = Kernels(
    20.0,
    60.0,
    35.0,
    leaves_products=False,
    widest=float("inf"),
    tensor=Speeds(0.3, 10.0, 2.0, {80: 0.3}),
    plain=Speeds(8.0, 10.0, 2.0, {80: 0.1}),
)
# Theirs are warps' products, mma.sync, of which newer GPUs have larger kinds that alone reach their rate.
CUDA = Kernels(
    20.0,
    30.0,
    10.0,
    leaves_products=True,
    widest=128,
    tensor=Speeds(3.0, 30.0, 25.0, {80: 0.2, 90: 0.09, 100: 0.05, 120: 0.2}),
    plain=Speeds(10.0, 40.0, 35.0, {80: 0.3}),
)


class Datasheet(NamedTuple):
    """Dense rates of a GPU, in 10^6 operations or bytes a microsecond, that is 10^12 a second."""

    tensor: float  # 16-bit products on tensor cores; TF32 has half of it
    plain: float  # fp32 without them
    memory: float


# A100 80 GB SXM, A40, L40, H100 SXM, B200, RTX 5090.
DATASHEETS = {
    80: Datasheet(312, 19.5, 2.04),
    86: Datasheet(150, 37.4, 0.70),
    89: Datasheet(181, 90.5, 0.86),
    90: Datasheet(989, 67, 3.35),
    100: Datasheet(2250, 75, 8.0),
    120: Datasheet(210, 105, 1.79),
}


def datasheet(arch: int) -> Datasheet:
    """Of the GPU listed with this compute capability, or the nearest one below it."""
    return DATASHEETS[_nearest(DATASHEETS, arch)]


def _nearest(archs: Iterable[int], arch: int) -> int:
    """The highest that is not above this compute capability."""
    return max((known for known in archs if known <= arch), default=80)


class Work(NamedTuple):
    """What one side does in a step."""

    host: float  # microseconds
    device: float  # microseconds

    def time(self, captured: bool) -> float:
        return self.device if captured else max(self.host, self.device)


class Problem(NamedTuple):
    """A stack of layers (one, or several in one kernel) and the step that it is part of."""

    M: int
    widths: tuple[int, ...]  # of the input, then of each layer
    activations: tuple[str, ...]
    dtype: torch.dtype
    tensor_cores: bool  # whether products run on them: 16-bit types, and fp32 where TF32 is allowed
    training: bool  # whether a backward pass follows
    captured: bool  # whether the step goes into a CUDA graph

    def __str__(self) -> str:
        """For people, for example "32 rows, 784-128, relu, bfloat16, training in a CUDA graph"."""
        names = ", ".join(dict.fromkeys(self.activations))
        dtype = str(self.dtype).removeprefix("torch.") + (
            ", TF32" if self.dtype.itemsize * self.tensor_cores == 4 else ""
        )
        kind = ("training" if self.training else "inference") + (" in a CUDA graph" if self.captured else "")
        return f"{self.M} rows, {'-'.join(map(str, self.widths))}, {names}, {dtype}, {kind}"


def ratio(problem: Problem, arch: int, kernels: Kernels) -> float:
    """Eager PyTorch's modelled time over ours: above 1 ours is less."""
    sheet = datasheet(arch)
    ours = _ours(problem, arch, kernels).time(problem.captured)
    return _eager(problem, sheet).time(problem.captured) / ours


def fuses(problem: Problem, arch: int, kernels: Kernels) -> tuple[bool, bool]:
    """Whether the kernels make the forward, and the backward pass of a dense layer in less time than passes of ours or
    PyTorch's around cuBLAS's products. (Backward these are a kernel more: our sum for the bias has a second one.)
    """
    sheet, share, speeds = datasheet(arch), _share(problem, arch, kernels), _speeds(problem, kernels)
    forward, backward = (
        _forward(problem, sheet, share, speeds.step),
        _backward(problem, sheet, share, speeds, kernels.widest),
    )
    return forward[0] <= forward[1], backward[0] <= backward[1] + KERNEL


def _product(problem: Problem, sheet: Datasheet, N: int, K: int, share: float = 1.0) -> float:
    """Microseconds of a product of [M, K] and [K, N], or of one of its two gradients, which are as large."""
    M, itemsize = problem.M, problem.dtype.itemsize
    rate = sheet.tensor * 2 / itemsize if problem.tensor_cores else sheet.plain
    return max(2e-6 * M * N * K / (rate * share), 1e-6 * (M * K + N * K + M * N) * itemsize / sheet.memory)


def _traffic(problem: Problem, sheet: Datasheet, elements: float) -> float:
    return 1e-6 * elements * problem.dtype.itemsize / sheet.memory


def _layers(problem: Problem) -> list[tuple[int, int, bool]]:
    """(K, N, whether there is an activation) of each layer."""
    pairs = zip(problem.widths, problem.widths[1:], problem.activations, strict=False)
    return [(K, N, activation != "identity") for K, N, activation in pairs]


def _eager(problem: Problem, sheet: Datasheet) -> Work:
    host = EAGER_TRAINED_OP if problem.training else EAGER_OP
    ops, device = 0, 0.0
    for K, N, active in _layers(problem):
        size = problem.M * N
        ops += 1 + active
        device += _product(problem, sheet, N, K) + active * _traffic(problem, sheet, 2 * size)
        if problem.training:  # the activation's derivative, both products, the bias's sum
            ops += 3 + active
            device += 2 * _product(problem, sheet, N, K) + _traffic(problem, sheet, (3 * active + 1) * size)
    return Work(ops * host, device + ops * KERNEL)


def _ours(problem: Problem, arch: int, kernels: Kernels) -> Work:
    """One kernel forward, two where the product is left to cuBLAS, and three backward."""
    sheet, share = datasheet(arch), _share(problem, arch, kernels)
    launches = 1 + 3 * problem.training
    layers = len(problem.activations)
    host = kernels.choice + launches * kernels.launch
    host += problem.training * (2 * FUNCTION + 3 * layers * kernels.layer)
    if layers > 1:
        return Work(host, _stack(problem, sheet, _speeds(problem, kernels), share) + launches * KERNEL)
    speeds = _speeds(problem, kernels)
    fused, apart = _forward(problem, sheet, share, speeds.step)
    leaves = kernels.leaves_products and apart < fused
    device = launches * KERNEL + (apart if leaves else fused)
    if problem.training:
        loading, writing = _backward(problem, sheet, share, speeds, kernels.widest)
        device += min(loading, writing + KERNEL)
    return Work(host + leaves * (problem.activations[0] != "identity") * kernels.launch, device)


def _speeds(problem: Problem, kernels: Kernels) -> Speeds:
    return kernels.tensor if problem.tensor_cores else kernels.plain


def _share(problem: Problem, arch: int, kernels: Kernels) -> float:
    shares = _speeds(problem, kernels).shares
    return shares[_nearest(shares, arch)]


def _forward(problem: Problem, sheet: Datasheet, share: float, step: float) -> tuple[float, float]:
    """A dense layer's forward pass in one kernel; and as cuBLAS's product, then one kernel more for the activation."""
    ((K, N, active),) = _layers(problem)
    one = max(_product(problem, sheet, N, K, share), step * K / STEP_K)
    return one, _product(problem, sheet, N, K) + active * (_traffic(problem, sheet, 2 * problem.M * N) + KERNEL)


def _backward(problem: Problem, sheet: Datasheet, share: float, speeds: Speeds, widest: float) -> tuple[float, float]:
    """Its backward pass with the derivative applied as both products load; and with dZ written once, for cuBLAS."""
    ((K, N, active),) = _layers(problem)
    size = problem.M * N
    fused = _product(problem, sheet, N, K, share)
    loading = max(speeds.fused, fused + max(fused, speeds.step * N / STEP_K)) + _traffic(
        problem, sheet, 2 * active * size
    )
    if widest < N:
        loading = float("inf")
    writing = 2 * _product(problem, sheet, N, K) + _traffic(problem, sheet, (1 + 2 * active) * size)
    return loading, writing


def _stack(problem: Problem, sheet: Datasheet, speeds: Speeds, share: float) -> float:
    """Hidden outputs stay on chip; they are written for, and read by, the backward pass."""
    outputs, weights = sum(problem.widths[1:]), sum(K * N for K, N, _ in _layers(problem))
    inputs = problem.widths[0]
    rate = share * (sheet.tensor * 2 / problem.dtype.itemsize if problem.tensor_cores else sheet.plain)
    operations = 2e-6 * problem.M * weights / rate
    kept = outputs if problem.training else problem.widths[-1]
    alone = speeds.step * sum(problem.widths[:-1]) / STEP_K
    time = max(operations, _traffic(problem, sheet, problem.M * (inputs + kept) + weights), alone)
    if problem.training:
        traffic = _traffic(problem, sheet, problem.M * (inputs + 2 * outputs) + 2 * weights)
        time += max(2 * operations, traffic, speeds.chain)
    return time
