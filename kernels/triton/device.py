"""What the launchers ask of the device: its kind, whether kernels are interpreted, and how fp32 products are made."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton


class Target(NamedTuple):
    """The facts of a GPU that choose a configuration."""

    arch: int  # 10 * major + minor of the compute capability
    processors: int  # streaming multiprocessors
    shared_memory: int  # bytes that one block may have


# One GPU of each architecture, for compiling ahead of time: A100, A40, L40, H100, B200, RTX 5090. The shared memory is
# that of the CUDA C++ programming guide, table of compute capabilities.
TARGETS: dict[int, Target] = {
    80: Target(80, 108, 166_912),
    86: Target(86, 84, 101_376),
    89: Target(89, 142, 101_376),
    90: Target(90, 132, 232_448),
    100: Target(100, 148, 232_448),
    120: Target(120, 170, 101_376),
}

_assumed = TARGETS[80]


def target(device: torch.device) -> Target:
    """The facts of `device`; for the CPU, where kernels are interpreted, those that `assumed` set."""
    return _properties(device.index) if device.type == "cuda" else _assumed


@functools.cache
def _properties(index: int | None) -> Target:
    properties = torch.cuda.get_device_properties(index)
    return Target(
        10 * properties.major + properties.minor,
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
    )


@contextlib.contextmanager
def assumed(facts: Target) -> Iterator[None]:
    """Choose configurations for this GPU meanwhile, where tensors are on the CPU."""
    global _assumed
    before, _assumed = _assumed, facts
    try:
        yield
    finally:
        _assumed = before


def interpreted() -> bool:
    """Whether Triton interprets the kernels, on tensors of the CPU, and does not compile them."""
    return triton.knobs.runtime.interpret


def precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies: "tf32" for fp32 where PyTorch's setting for matmul allows it, else "ieee"."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def uses_tensor_cores(dtype: torch.dtype) -> bool:
    """Whether products in this dtype are made on tensor cores."""
    return dtype.itemsize == 2 or precision(dtype) == "tf32"
