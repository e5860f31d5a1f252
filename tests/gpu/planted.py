"""A kernel in configurations with known faults, which the tests of the report must find."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from launching import Case


@triton.jit
def product_kernel(
    x_ptr, y_ptr, out_ptr, K, stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = x @ y.T of one tile; x [BLOCK_M, K], y [BLOCK_N, K], out [BLOCK_M, BLOCK_N], all contiguous; grid (1,)."""
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        inner = k + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + rows[:, None] * stride + inner[None, :])
        y = tl.load(y_ptr + columns[:, None] * stride + inner[None, :])
        sums = tl.dot(x, tl.trans(y), sums, input_precision=PRECISION)
    tl.store(out_ptr + rows[:, None] * BLOCK_N + columns[None, :], sums)


@triton.jit
def gradients_kernel(
    x_ptr, weight_ptr, dz_ptr, grad_ptr, sums_ptr, M,
    BLOCK_M: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """grad = dz @ weight, sums = dz.T @ x in one loop over the rows; x [M, K], dz [M, N], weight [N, K]; grid (1,)."""
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, N), tl.arange(0, K)
    weight = tl.load(weight_ptr + n[:, None] * K + k[None, :])
    sums = tl.zeros((N, K), tl.float32)
    for row in range(0, M, BLOCK_M):
        dz = tl.load(dz_ptr + (row + m)[:, None] * N + n[None, :])
        x = tl.load(x_ptr + (row + m)[:, None] * K + k[None, :])
        sums = tl.dot(tl.trans(dz), x, sums)
        tl.store(grad_ptr + (row + m)[:, None] * K + k[None, :], tl.dot(dz, weight).to(x.dtype))
    tl.store(sums_ptr + n[:, None] * K + k[None, :], sums)


def product(
    dtype: torch.dtype, block: int, num_warps: int, num_stages: int, stride: int = 512, precision: str = "ieee"
) -> None:
    x = torch.empty(block, 512, dtype=dtype, device="meta")
    config = {"BLOCK_M": block, "BLOCK_N": block, "BLOCK_K": 64, "num_warps": num_warps, "num_stages": num_stages}
    product_kernel[(1,)](x, x, x, 512, stride, PRECISION=precision, **config)


def gradients(dtype: torch.dtype) -> None:
    x = torch.empty(512, 128, dtype=dtype, device="meta")
    sums = torch.empty(64, 128, dtype=torch.float32, device="meta")
    gradients_kernel[(1,)](x, x, x, x, sums, 512, BLOCK_M=32, K=128, N=64, num_warps=8, num_stages=2)


# Named for the fault that the test must see; "nothing" has none.
CASES = (
    Case("nothing", lambda dtype: product(dtype, 64, 4, 3), ("bf16",)),
    Case("spills", lambda dtype: product(dtype, 256, 4, 1), ("bf16",), (80,)),
    Case("does_not_fit", lambda dtype: product(dtype, 256, 8, 4), ("bf16",), (80,)),
    Case("waits_for_loads", lambda dtype: product(dtype, 64, 4, 3, 511), ("bf16",), (80,)),
    Case("multiplies_in_tf32", lambda dtype: product(dtype, 64, 4, 3, 512, "tf32"), ("fp32",), (80,)),
    Case("multiplies_slowly", lambda dtype: product(dtype, 32, 4, 3), ("tf32",), (80,)),
    Case("refills_what_is_read", gradients, ("bf16",), (90,)),
)
