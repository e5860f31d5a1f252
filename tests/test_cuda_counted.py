"""What the CUDA kernels ask of memory, counted while they are emulated: whole sectors, and no bank twice."""

from __future__ import annotations

import emulated
import pytest
from accuracy import draw
from cuda_operators import ARITHMETICS, Arithmetic, dense, operators, stack

pytestmark = [pytest.mark.usefixtures("one_thread"), emulated.only_emulated]

each_arithmetic = pytest.mark.parametrize("arithmetic", ARITHMETICS, ids=str)
# Aligned, so that only the kernels themselves can waste anything.
CASES = {
    "dense narrow": (dense, 256, (128, 64)),
    "dense wide": (dense, 256, (64, 256)),
    "stack": (stack, 128, (128, 128, 64, 32, 16)),
    "stack that ends wide": (stack, 128, (32, 64, 256)),
}


def count(case: str, arithmetic: Arithmetic, activation: str = "relu") -> emulated.Counted:
    run, M, widths = CASES[case]
    with emulated.counted() as found:
        run(draw(M, widths, activation, arithmetic.dtype), arithmetic.tf32)
    return found[0]


@each_arithmetic
@pytest.mark.parametrize("case", CASES)
def test_whole_sectors_and_no_bank_conflicts(case, arithmetic):
    """Bytes asked for over bytes of the sectors touched; trips to the banks of shared memory over the fewest."""
    for activation in ("relu", "gelu"):
        counted = count(case, arithmetic, activation)
        assert counted.share_of_sectors("global load") >= 0.9
        assert counted.share_of_sectors("global store") >= 0.9
        assert counted.conflicts() <= 1.1


@pytest.mark.parametrize(
    ("case", "launches"),
    [("dense narrow", 1 + 3), ("dense wide", 1 + 4), ("stack", 2 + 3), ("stack that ends wide", 2 + 4)],
)
def test_launches(case, launches):
    """Forward, which `stack` runs twice, and backward."""
    counted = count(case, ARITHMETICS[0])
    assert len(counted.launches) <= launches


def test_counts_of_a_product_are_its_tiles():
    """A block of 64 x 64 with the whole of K: all of x and of weight once, and out once."""
    M, N, K = 64, 64, 128
    problem = draw(M, (K, N), "relu", bias=False)
    with emulated.counted() as found:
        operators.dense_forward(problem.x, problem.weights[0], None, 1, False, False)
    (counted,) = found
    assert len(counted.launches) == 1
    of = {space: sum(site.bytes for site in counted.traffic if site.space == space) for space in emulated.SPACES}
    assert of["global load"] == 4 * (M * K + N * K)
    assert of["global store"] == 4 * M * N
