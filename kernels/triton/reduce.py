"""The sum of partial gradients, in a fixed order: the same bits on every run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512  # elements of a gradient that one program sums
TOGETHER = 8  # partials loaded at once


class Partials(NamedTuple):
    """Partial sums of one gradient `out`: row i of `sums` [count, stride] has the i-th of them from `offset` on."""

    sums: Tensor  # fp32
    offset: int
    out: Tensor  # contiguous


class Buffer:
    """Memory for `count` partial sums of several gradients: fp32, each gradient's 64-byte aligned in its row."""

    def __init__(self, count: int, gradients: Sequence[Tensor]) -> None:
        self.offsets: list[int] = []
        self.stride = 0
        for gradient in gradients:
            self.offsets.append(self.stride)
            self.stride += -(-gradient.numel() // 16) * 16
        self.sums = torch.empty((count, self.stride), dtype=torch.float32, device=gradients[0].device)
        self.partials = [
            Partials(self.sums, offset, gradient) for offset, gradient in zip(self.offsets, gradients, strict=True)
        ]


@triton.jit
def reduce_kernel(sums, outs, counts, strides, offsets, sizes, BLOCK: tl.constexpr, TOGETHER: tl.constexpr):
    """outs[i] = the sum over counts[i] rows of sums[i][:, offsets[i] : offsets[i] + sizes[i]].

    sums   [counts[i], strides[i]]  fp32, contiguous; a tuple, as all arguments in the plural
    outs   [sizes[i]]               any dtype, contiguous
    grid   (sum of cdiv(sizes[i], BLOCK),); one program owns BLOCK elements of one of outs
    """
    block = tl.program_id(0)
    for i in tl.static_range(len(outs)):
        blocks = tl.cdiv(sizes[i], BLOCK)
        if (block >= 0) & (block < blocks):
            columns = block * BLOCK + tl.arange(0, BLOCK)
            total = tl.zeros((BLOCK,), tl.float32)
            for first in range(0, counts[i], TOGETHER):
                rows = first + tl.arange(0, TOGETHER)
                part = tl.load(
                    sums[i] + offsets[i] + rows[:, None].to(tl.int64) * strides[i] + columns[None, :],
                    mask=(rows[:, None] < counts[i]) & (columns[None, :] < sizes[i]),
                    other=0.0,
                )
                total += tl.sum(part, axis=0)
            tl.store(outs[i] + columns, total.to(outs[i].dtype.element_ty), mask=columns < sizes[i])
        block -= blocks


def reduce(partials: Sequence[Partials]) -> None:
    """Write the sum of each of the partial sums into its `out`: one launch, or none if there are none."""
    if not partials:
        return
    sizes = tuple(p.out.numel() for p in partials)
    grid = (sum(triton.cdiv(size, BLOCK) for size in sizes),)
    reduce_kernel[grid](
        tuple(p.sums for p in partials),
        tuple(p.out for p in partials),
        tuple(p.sums.shape[0] for p in partials),
        tuple(p.sums.shape[1] for p in partials),
        tuple(p.offset for p in partials),
        sizes,
        BLOCK=BLOCK,
        TOGETHER=TOGETHER,
        num_warps=4,
        maxnreg=255,
    )
