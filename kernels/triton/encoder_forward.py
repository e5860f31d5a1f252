"""A narrow stack of layers in one launch, hidden activations on chip."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import SAVES_PREACT, activate, dropout_scale
from .configs import Config, pipelined_bytes, shortlist
from .device import Target, precision, target
from .encoder_plan import kept, padded
from .tiles import times_matrix
from .tuning import config_for
from .weight_gradient import LONGEST_STRIDE


@triton.jit
def add_bias(z, bias_ptr, width, WIDTH: tl.constexpr):
    """z [:, WIDTH] + bias [width], contiguous; bias_ptr may be None."""
    if bias_ptr is not None:
        n = tl.arange(0, WIDTH)
        z += tl.load(bias_ptr + n, mask=n < width, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit
def finish(z, width, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr):
    """ACTIVATION(z), and 0 in the columns from `width` on, where it may not be: sigmoid(0) = 0.5."""
    out = activate(z, ACTIVATION)
    if ACTIVATION == "sigmoid" and width != WIDTH:
        out = tl.where(tl.arange(0, WIDTH)[None, :] < width, out, 0.0)
    return out


@triton.jit
def encoder_forward_kernel(
    x_ptr, weights, biases, outs, preacts, seed_ptr,
    M, K,
    stride_xm, stride_xk, strides_wn, strides_wk,
    WIDTHS: tl.constexpr, TILES: tl.constexpr, ACTIVATIONS: tl.constexpr, DROPOUTS: tl.constexpr,
    PRECISION: tl.constexpr, INT64: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """outs[i] = ACTIVATIONS[i](outs[i - 1] @ weights[i].T + biases[i]), with outs[-1] = x; then dropout, if any.

    x        [M, K]                    fp32 | fp16 | bf16, any strides (in elements)
    weights  [WIDTHS[i], WIDTHS[i-1]]  dtype of x, any strides; a tuple, as all arguments in the plural
    biases   [WIDTHS[i]]               dtype of x, contiguous, or None
    outs     [M, WIDTHS[i]]            dtype of x, contiguous; None: not written
    preacts  [M, WIDTHS[i]]            the values before the activation, likewise
    TILES    WIDTHS padded to powers of two; for a last layer wider than WIDEST, its tiles are [BLOCK_M, BLOCK_N]
    grid     (cdiv(M, BLOCK_M),); one program owns BLOCK_M rows through all layers

    Sums are fp32; each layer's output is rounded to the dtype of x, as if it went through memory.
    """
    DEPTH: tl.constexpr = len(WIDTHS)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    OFFSET: tl.constexpr = tl.int64 if INT64 else tl.int32
    first_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    m = tl.arange(0, BLOCK_M).to(OFFSET)
    in_m = m < M - first_m
    rows = first_m + m

    n = tl.arange(0, TILES[0]).to(OFFSET)
    k = tl.arange(0, BLOCK_K).to(OFFSET)
    in_n = n < WIDTHS[0]
    x_ptrs = x_ptr + first_m * stride_xm + m[:, None] * stride_xm + k[None, :] * stride_xk
    weight_ptrs = weights[0] + n[:, None] * strides_wn[0] + k[None, :] * strides_wk[0]
    z = tl.zeros((BLOCK_M, TILES[0]), tl.float32)
    for left in range(K, 0, -BLOCK_K):
        x = tl.load(x_ptrs, mask=in_m[:, None] & (k[None, :] < left), other=0.0)
        weight = tl.load(weight_ptrs, mask=in_n[:, None] & (k[None, :] < left), other=0.0)
        z = tl.dot(x, tl.trans(weight), z, input_precision=PRECISION)
        x_ptrs += BLOCK_K * tl.cast(stride_xk, tl.int64)
        weight_ptrs += BLOCK_K * tl.cast(strides_wk[0], tl.int64)
    h = _close_layer(
        z, biases[0], outs[0], preacts[0], seed_ptr, rows, in_m, 0,
        WIDTHS[0], TILES[0], ACTIVATIONS[0], DROPOUTS[0], DTYPE,
    )  # fmt: skip

    for i in tl.static_range(1, DEPTH):
        if TILES[i] <= 128:
            z = times_matrix(
                h, weights[i], strides_wk[i], strides_wn[i], WIDTHS[i - 1], WIDTHS[i],
                tl.zeros((BLOCK_M, TILES[i]), tl.float32), TILES[i - 1], TILES[i], PRECISION, True, INT64,
            )  # fmt: skip
            h = _close_layer(
                z, biases[i], outs[i], preacts[i], seed_ptr, rows, in_m, i,
                WIDTHS[i], TILES[i], ACTIVATIONS[i], DROPOUTS[i], DTYPE,
            )  # fmt: skip
        else:
            _wide_layer(
                h, weights[i], biases[i], outs[i], preacts[i], seed_ptr, rows, in_m, strides_wn[i], strides_wk[i], i,
                WIDTHS[i], WIDTHS[i - 1], TILES[i - 1], ACTIVATIONS[i], DROPOUTS[i], DTYPE, PRECISION, INT64, BLOCK_N,
            )  # fmt: skip


@triton.jit
def _wide_layer(
    h, weight_ptr, bias_ptr, out_ptr, preact_ptr, seed_ptr, rows, in_m, stride_wn, stride_wk,
    LAYER: tl.constexpr, WIDTH: tl.constexpr, WIDTH_BELOW: tl.constexpr, TILE_BELOW: tl.constexpr,
    ACTIVATION: tl.constexpr, P: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, INT64: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    for first_n in range(0, WIDTH, BLOCK_N):
        z = times_matrix(
            h, weight_ptr + tl.cast(first_n, tl.int64) * stride_wn, stride_wk, stride_wn, WIDTH_BELOW, WIDTH - first_n,
            tl.zeros((h.shape[0], BLOCK_N), tl.float32), TILE_BELOW, BLOCK_N, PRECISION, True, INT64,
        )  # fmt: skip
        n = first_n + tl.arange(0, BLOCK_N)
        in_n = n < WIDTH
        in_mn = in_m[:, None] & in_n[None, :]
        if bias_ptr is not None:
            z += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
        offsets = rows.to(tl.int64)[:, None] * WIDTH + n[None, :]
        if preact_ptr is not None:
            tl.store(preact_ptr + offsets, z.to(DTYPE), mask=in_mn)
        out = activate(z, ACTIVATION)
        if P > 0:
            out *= dropout_scale(seed_ptr, LAYER, rows, n, WIDTH, P)
        tl.store(out_ptr + offsets, out.to(DTYPE), mask=in_mn)


@triton.jit
def _close_layer(
    z, bias_ptr, out_ptr, preact_ptr, seed_ptr, rows, in_m,
    LAYER: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, ACTIVATION: tl.constexpr, P: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    n = tl.arange(0, TILE)
    in_mn = in_m[:, None] & (n[None, :] < WIDTH)
    offsets = rows.to(tl.int64)[:, None] * WIDTH + n[None, :]
    z = add_bias(z, bias_ptr, WIDTH, TILE)
    if preact_ptr is not None:
        tl.store(preact_ptr + offsets, z.to(DTYPE), mask=in_mn)
    out = finish(z, WIDTH, TILE, ACTIVATION)
    if P > 0:
        out *= dropout_scale(seed_ptr, LAYER, rows, n, WIDTH, P)
    out = out.to(DTYPE)
    if out_ptr is not None:
        tl.store(out_ptr + offsets, out, mask=in_mn)
    return out


def encoder_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[str],
    save: str = "all",
    dropouts: Sequence[float] | None = None,
    seed: Tensor | None = None,
    int64: bool = False,
    config: Config | None = None,
) -> list[Tensor | None]:
    """A narrow stack (`is_narrow`) on x [M, K], in one launch.

    save: "all" gives the outputs of all layers, then the pre-activations of those that need them; "needed" leaves out
        what `encoder_backward` finds again on chip; "nothing" keeps the last output alone (`encoder_plan.kept`).
    dropouts: of each layer's output, the probability of dropping; seed: int64 [1] on x's device.
    int64: 64-bit offsets within a tile even where 32 bits would do.

    Returns: as `fastenc::encoder_forward`, with None for what is left out.
    """
    M, K = x.shape
    widths = tuple(weight.shape[0] for weight in weights)
    if config is None:
        facts = target(x.device)
        config = config_for(
            "encoder_forward",
            x,
            (M, K, widths, tuple(activations), save),
            lambda: default_config(x.dtype),
            lambda: candidates(widths, x.dtype, facts),
            lambda candidate: encoder_forward(x, weights, biases, activations, save, dropouts, seed, int64, candidate),
        )
    keeps = kept(save, widths, activations, x.dtype.itemsize)
    outs = [x.new_empty((M, width)) if out else None for width, (out, _) in zip(widths, keeps, strict=True)]
    preacts = [x.new_empty((M, width)) if preact else None for width, (_, preact) in zip(widths, keeps, strict=True)]
    if M > 0:
        strides = x.stride(), *zip(*(weight.stride() for weight in weights), strict=True)
        encoder_forward_kernel[(triton.cdiv(M, config["BLOCK_M"]),)](
            x,
            tuple(weights),
            tuple(bias if bias is None else bias.contiguous() for bias in biases),
            tuple(outs),
            tuple(preacts),
            seed,
            M,
            K,
            *strides[0],
            *strides[1:],
            widths,
            tuple(padded(width) for width in widths),
            tuple(activations),
            tuple(dropouts or (0.0,) * len(widths)),
            PRECISION=precision(x.dtype),
            INT64=int64 or any(stride > LONGEST_STRIDE for of_one in strides for stride in of_one),
            **config,
        )
    of_preacts = [z for z, activation in zip(preacts, activations, strict=True) if activation in SAVES_PREACT]
    return outs + of_preacts if save != "nothing" else outs[-1:]


def default_config(dtype: torch.dtype) -> Config:
    """Eight warps: with four, some activations and unaligned rows take more registers than there are."""
    if dtype.itemsize == 4:
        block_k = 16 if precision(dtype) == "ieee" else 32
        return {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": block_k, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3, "maxnreg": 255}


def candidates(widths: Sequence[int], dtype: torch.dtype, facts: Target) -> list[Config]:
    """The default, then other row blocks, warps and depths of the pipeline."""
    half = 2 if dtype.itemsize == 4 else 1
    configs = [default_config(dtype)]
    for block_m, block_k, warps in ((16, 128, 4), (32, 64, 4), (64, 64, 4), (64, 64, 8), (128, 64, 8), (128, 32, 8)):
        for stages in (2, 3, 4):
            config = {"BLOCK_M": max(16, block_m // half), "BLOCK_N": 64 // half, "BLOCK_K": block_k // half}
            configs.append({**config, "num_warps": warps, "num_stages": stages, "maxnreg": 255})
    hidden = padded(widths[0])
    needs = [pipelined_bytes(c, dtype.itemsize, (c["BLOCK_M"], c["BLOCK_K"]), (hidden, c["BLOCK_K"])) for c in configs]
    return shortlist(configs, needs, facts)
