"""The gradient dZ of a layer's value before its activation, written once, and its sums over the rows."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .activation import differentiate_dropped, dropout_scale
from .device import Target, target
from .reduce import Buffer, reduce
from .weight_gradient import LONGEST_STRIDE

BLOCK_M, BLOCK_N = 32, 64
PROGRAMS = 8  # on each processor: enough loads in flight for the memory
LEAST_ROWS = 256  # of a split: its partial sums are then at most 1/64 of what it reads, in fp32


@triton.jit
def preact_gradient_kernel(
    grad_ptr, saved_ptr, dz_ptr, grad_bias_ptr, seed_ptr,
    M, N,
    stride_gm, stride_gn, stride_sm, stride_sn, stride_split, rows_per_split,
    ACTIVATION: tl.constexpr, P: tl.constexpr, INT64: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dz = grad * ACTIVATION' (and dropout's scale, if P > 0), and grad_bias = dz.sum(0) or one split's part of it.

    grad       [M, N]  fp32 | fp16 | bf16, any strides (in elements)
    saved      [M, N]  dtype of grad, any strides, as `differentiate` wants it; not read if ACTIVATION is "identity"
    dz         [M, N]  dtype of grad, contiguous; None: not written
    grad_bias  [N] from split * stride_split on; None: not written
    seed       [1]     int64; None if P is 0
    grid       (splits, cdiv(N, BLOCK_N)); one program owns BLOCK_N columns over rows_per_split rows

    Sums are fp32, of values that are not rounded.
    """
    split = tl.program_id(0).to(tl.int64)
    first_n = tl.program_id(1).to(tl.int64) * BLOCK_N
    first_m = split * rows_per_split
    end_m = tl.minimum(first_m + rows_per_split, M)
    OFFSET: tl.constexpr = tl.int64 if INT64 else tl.int32
    m = tl.arange(0, BLOCK_M).to(OFFSET)
    n = tl.arange(0, BLOCK_N).to(OFFSET)
    in_n = n < N - first_n
    total = tl.zeros((BLOCK_N,), tl.float32)
    for row in range(first_m, end_m, BLOCK_M):
        inside = (m < end_m - row)[:, None] & in_n[None, :]
        first_g = row * stride_gm + first_n * stride_gn
        dz = tl.load(grad_ptr + first_g + (m[:, None] * stride_gm + n[None, :] * stride_gn), mask=inside, other=0.0)
        dz = dz.to(tl.float32)
        saved = dz
        if ACTIVATION != "identity":
            first_s = row * stride_sm + first_n * stride_sn
            saved = tl.load(
                saved_ptr + first_s + (m[:, None] * stride_sm + n[None, :] * stride_sn), mask=inside, other=0.0
            ).to(tl.float32)
        scale = 1.0
        if P > 0:
            scale = dropout_scale(seed_ptr, 0, row + m, first_n + n, N, P)
        dz = differentiate_dropped(dz, saved, scale, ACTIVATION, P)
        if dz_ptr is not None:
            offsets = row * N + first_n + (m[:, None] * N + n[None, :])
            tl.store(dz_ptr + offsets, dz.to(dz_ptr.dtype.element_ty), mask=inside)
        total += tl.sum(dz, axis=0)
    if grad_bias_ptr is not None:
        grad_bias_ptr += split * stride_split + first_n
        tl.store(grad_bias_ptr + n, total.to(grad_bias_ptr.dtype.element_ty), mask=in_n)


def preact_gradient(
    grad_out: Tensor,
    saved: Tensor | None,
    activation: str,
    output_mask: Sequence[bool],
    dropout: float = 0.0,
    seed: Tensor | None = None,
    int64: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """(dZ [M, N], grad_bias [N]), each None where the mask does not want it, in at most two launches.

    grad_out [M, N], not empty, and saved [M, N] (None for "identity") of any strides. Without activation and dropout,
    dZ is grad_out itself. int64: 64-bit offsets within a tile even where 32 bits would do.
    """
    M, N = grad_out.shape
    want_dz, want_bias = output_mask
    same = activation == "identity" and not dropout
    dz = None if not want_dz else grad_out if same else grad_out.new_empty((M, N))
    grad_bias = grad_out.new_empty(N) if want_bias else None
    if grad_bias is None and (same or dz is None):
        return dz, None
    rows_per_split, splits = split(M, N, target(grad_out.device))
    buffer = Buffer(splits, [grad_bias]) if grad_bias is not None and splits > 1 else None
    strides = (*grad_out.stride(), *(grad_out if saved is None else saved).stride())
    preact_gradient_kernel[(splits, triton.cdiv(N, BLOCK_N))](
        grad_out, saved, None if same else dz, buffer.sums if buffer else grad_bias, seed if dropout else None,
        M, N, *strides, buffer.stride if buffer else 0, rows_per_split,
        ACTIVATION=activation,
        P=dropout,
        INT64=int64 or max(*strides, N) > LONGEST_STRIDE,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        num_warps=8 if dropout else 4,  # its random numbers take registers
    )  # fmt: skip
    reduce(buffer.partials if buffer else [])
    return dz, grad_bias


def split(M: int, N: int, facts: Target) -> tuple[int, int]:
    """(rows of a split, splits): splits for PROGRAMS on every processor, if each has rows enough."""
    wanted = min(M // LEAST_ROWS, triton.cdiv(PROGRAMS * facts.processors, triton.cdiv(N, BLOCK_N)))
    rows = triton.cdiv(triton.cdiv(M, max(1, wanted)), BLOCK_M) * BLOCK_M
    return rows, triton.cdiv(M, rows)
