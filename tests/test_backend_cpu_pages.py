"""Large results of the CPU kernels ask for huge pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import fastenc
from fastenc.backends import cpu

SMAPS = Path("/proc/self/smaps")
pytestmark = pytest.mark.skipif(
    cpu.why_unavailable() is not None or not Path("/sys/kernel/mm/transparent_hugepage").exists(),
    reason="the kernels are not built, or this system has no huge pages",
)
FRESH = 32 * 2**20 // 4  # fp32 numbers, as kFreshBytes of csrc/pages.h


def asks_for_huge_pages(tensor: torch.Tensor) -> bool:
    """Whether the middle of its memory is marked for them."""
    address = tensor.data_ptr() + tensor.nbytes // 2
    for mapping in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", SMAPS.read_text()):
        begin, end = (int(number, 16) for number in mapping.split(" ", 1)[0].split("-"))
        if begin <= address < end:
            return " hg" in mapping.rsplit("VmFlags:", 1)[1]
    raise AssertionError("its memory is nowhere")


def test_a_large_output_and_its_gradient_of_x_do() -> None:
    x = torch.rand(FRESH // 128, 256, requires_grad=True)
    with fastenc.use_backend("cpu"):
        out = fastenc.FusedDense(256, 128, activation="relu")(x)
        out.sum().backward()
    assert x.grad is not None
    assert asks_for_huge_pages(out)
    assert asks_for_huge_pages(x.grad)


@pytest.mark.parametrize(("rows", "asks"), [(FRESH // 128, True), (FRESH // 256, False)])
def test_the_operators_of_the_stable_abi_do(rows: int, asks: bool) -> None:
    weight = torch.rand(128, 64)
    out, _ = cpu.dense_forward(torch.rand(rows, 64), weight, None, "relu", False)
    assert asks_for_huge_pages(out) is asks
