"""The gradients of weights and biases: sums over all rows, cut into splits where there are too few tiles for the GPU.

A layer's output gradient is turned into that of its pre-activation, dZ, as its tiles are loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import differentiate_dropped, dropout_scale
from .configs import Config, pipelined_bytes, shortlist
from .device import Target, precision, target, uses_tensor_cores
from .reduce import Buffer, Partials
from .tuning import config_for

# A tile's offsets from its first element fit 32 bits if no stride is longer.
LONGEST_STRIDE = 1 << 22
# The partial sums of a split, written and read again, may be this share of what the split reads.
PARTIALS_SHARE = 1 / 10
MOST_ROWS, LEAST_ROWS = 4096, 256  # of a split


# Rows from which on cuBLAS, which splits such sums better, makes dZ.T @ input on tensor cores from a dZ in memory.
CUBLAS_ROWS = 1024


class Layer(NamedTuple):
    """What the gradients of one layer's parameters are made of. `M` rows."""

    grad: Tensor  # [M, N], of the output
    saved: Tensor | None  # [M, N], as `differentiate` wants it; None if the activation is "identity"
    input: Tensor  # [M, K]
    activation: str
    grad_weight: Tensor | None  # [N, K] contiguous, to be written; None if not wanted
    grad_bias: Tensor | None  # [N] contiguous, to be written; None if not wanted
    dropout: float = 0.0
    index: int = 0  # for dropout's random numbers


@triton.jit
def weight_gradient_kernel(
    grads, saveds, inputs, grad_weights, grad_biases, seed_ptr,
    M, Ns, Ks,
    strides_gm, strides_gn, strides_sm, strides_sn, strides_im, strides_ik,
    weight_offsets, bias_offsets, stride_split, rows_per_split,
    ACTIVATIONS: tl.constexpr, DROPOUTS: tl.constexpr, INDICES: tl.constexpr,
    PRECISION: tl.constexpr, INT64: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad_weights[i] = dZ.T @ inputs[i] and grad_biases[i] = dZ.sum(0), or the partial sums of one split of the rows.

    grads, saveds  [M, Ns[i]]  fp32 | fp16 | bf16, any strides (in elements); tuples, as all arguments in the plural
    inputs         [M, Ks[i]]  dtype of grads, any strides
    grad_weights   [Ns[i], Ks[i]] from weight_offsets[i] + split * stride_split on, contiguous; None: not wanted
    grad_biases    [Ns[i]] likewise
    grid           (tiles of all layers, splits); one program owns a [BLOCK_N, BLOCK_K] tile of one layer's gradient
                   over rows_per_split rows; the bias belongs to the programs of the first tile along K

    Sums are fp32; dZ is rounded to the dtype of grads for the product only.
    """
    tile = tl.program_id(0)
    split = tl.program_id(1).to(tl.int64)
    for i in tl.static_range(len(grads)):
        tiles_k = 1 if grad_weights[i] is None else tl.cdiv(Ks[i], BLOCK_K)
        tiles = tiles_k * tl.cdiv(Ns[i], BLOCK_N)
        if (tile >= 0) & (tile < tiles):
            _one_tile(
                tile // tiles_k, tile % tiles_k, split,
                grads[i], saveds[i], inputs[i], grad_weights[i], grad_biases[i], seed_ptr,
                M, Ns[i], Ks[i],
                strides_gm[i], strides_gn[i], strides_sm[i], strides_sn[i], strides_im[i], strides_ik[i],
                weight_offsets[i], bias_offsets[i], stride_split, rows_per_split,
                ACTIVATIONS[i], DROPOUTS[i], INDICES[i], PRECISION, INT64, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        tile -= tiles


@triton.jit
def _one_tile(
    tile_n, tile_k, split,
    grad_ptr, saved_ptr, input_ptr, grad_weight_ptr, grad_bias_ptr, seed_ptr,
    M, N, K,
    stride_gm, stride_gn, stride_sm, stride_sn, stride_im, stride_ik,
    weight_offset, bias_offset, stride_split, rows_per_split,
    ACTIVATION: tl.constexpr, P: tl.constexpr, INDEX: tl.constexpr,
    PRECISION: tl.constexpr, INT64: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    first_n = (tile_n * BLOCK_N).to(tl.int64)
    first_k = (tile_k * BLOCK_K).to(tl.int64)
    first_m = split * rows_per_split
    end_m = tl.minimum(first_m + rows_per_split, M)
    OFFSET: tl.constexpr = tl.int64 if INT64 else tl.int32
    m = tl.arange(0, BLOCK_M).to(OFFSET)
    n = tl.arange(0, BLOCK_N).to(OFFSET)
    k = tl.arange(0, BLOCK_K).to(OFFSET)
    in_n = n < N - first_n
    in_k = k < K - first_k
    grad_ptr += first_n * stride_gn
    input_ptr += first_k * stride_ik
    if ACTIVATION != "identity":
        saved_ptr += first_n * stride_sn

    sum_weight = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    sum_bias = tl.zeros((BLOCK_N,), tl.float32)
    for row in range(first_m, end_m, BLOCK_M):
        in_m = m < end_m - row
        in_mn = in_m[:, None] & in_n[None, :]
        grad = tl.load(grad_ptr + row * stride_gm + m[:, None] * stride_gm + n[None, :] * stride_gn, in_mn, other=0.0)
        if ACTIVATION != "identity" or P > 0:
            scale = 1.0
            saved = grad
            if ACTIVATION != "identity":
                saved = tl.load(
                    saved_ptr + row * stride_sm + m[:, None] * stride_sm + n[None, :] * stride_sn, in_mn, other=0.0
                )
            if P > 0:
                scale = dropout_scale(seed_ptr, INDEX, row + m, first_n + n, N, P)
            dz = differentiate_dropped(grad.to(tl.float32), saved.to(tl.float32), scale, ACTIVATION, P)
            dz = tl.where(in_mn, dz, 0.0)
        else:
            dz = grad
        if grad_weight_ptr is not None:
            x = tl.load(
                input_ptr + row * stride_im + m[:, None] * stride_im + k[None, :] * stride_ik,
                in_m[:, None] & in_k[None, :],
                other=0.0,
            )
            sum_weight = tl.dot(tl.trans(dz.to(x.dtype)), x, sum_weight, input_precision=PRECISION)
        if grad_bias_ptr is not None:
            if tile_k == 0:
                sum_bias += tl.sum(dz.to(tl.float32), axis=0)

    if grad_weight_ptr is not None:
        grad_weight_ptr += weight_offset + split * stride_split + first_n * K + first_k
        tl.store(
            grad_weight_ptr + n[:, None].to(tl.int64) * K + k[None, :],
            sum_weight.to(grad_weight_ptr.dtype.element_ty),
            mask=in_n[:, None] & in_k[None, :],
        )
    if grad_bias_ptr is not None:
        grad_bias_ptr += bias_offset + split * stride_split + first_n
        tl.store(grad_bias_ptr + n, sum_bias.to(grad_bias_ptr.dtype.element_ty), mask=in_n & (tile_k == 0))


def weight_gradient(
    layers: Sequence[Layer], seed: Tensor | None = None, int64: bool = False, config: Config | None = None
) -> list[Partials]:
    """Write the wanted gradients of the layers' parameters, in one launch.

    Returns: what `reduce` has still to add up; nothing if the rows were not split.
    int64: 64-bit offsets within a tile even where 32 bits would do.
    """
    layers = [
        layer._replace(grad_weight=None) if layer.grad_weight is not None and layer.grad_weight.numel() == 0 else layer
        for layer in layers
    ]
    layers = [layer for layer in layers if layer.grad_weight is not None or layer.grad_bias is not None]
    if not layers:
        return []
    M = layers[0].grad.shape[0]
    dtype = layers[0].grad.dtype
    sizes = [(layer.grad.shape[1], layer.input.shape[1] if layer.grad_weight is not None else 0) for layer in layers]
    if config is None:
        facts = target(layers[0].grad.device)
        config = config_for(
            "weight_gradient",
            layers[0].grad,
            (M, *sizes, tuple(layer.activation for layer in layers)),
            lambda: default_config(M, sizes, dtype, facts),
            lambda: candidates(M, sizes, dtype, facts),
            lambda candidate: weight_gradient(layers, seed, int64, candidate),
        )
    config = dict(config)
    splits = config.pop("splits")
    rows_per_split = triton.cdiv(triton.cdiv(M, splits), config["BLOCK_M"]) * config["BLOCK_M"]
    splits = triton.cdiv(M, rows_per_split)

    gradients = [g for layer in layers for g in (layer.grad_weight, layer.grad_bias) if g is not None]
    buffer = Buffer(splits, gradients) if splits > 1 else None
    offsets = iter(buffer.offsets if buffer else [0] * len(gradients))
    destinations: list[list[Tensor | None]] = [[], []]
    starts: list[list[int]] = [[], []]
    for layer in layers:
        for i, gradient in enumerate((layer.grad_weight, layer.grad_bias)):
            destinations[i].append(gradient if gradient is None or buffer is None else buffer.sums)
            starts[i].append(0 if gradient is None else next(offsets))

    saveds = [layer.grad if layer.saved is None else layer.saved for layer in layers]
    strides = [
        tuple(tensor.stride(d) for tensor in tensors)
        for tensors in ([layer.grad for layer in layers], saveds, [layer.input for layer in layers])
        for d in (0, 1)
    ]
    grid = (sum(_tiles(N, K, config) for N, K in sizes), splits)
    weight_gradient_kernel[grid](
        tuple(layer.grad for layer in layers),
        tuple(saveds),
        tuple(layer.input for layer in layers),
        tuple(destinations[0]),
        tuple(destinations[1]),
        seed,
        M,
        tuple(N for N, _ in sizes),
        tuple(K for _, K in sizes),
        *strides,
        tuple(starts[0]),
        tuple(starts[1]),
        buffer.stride if buffer else 0,
        rows_per_split,
        tuple(layer.activation for layer in layers),
        tuple(layer.dropout for layer in layers),
        tuple(layer.index for layer in layers),
        PRECISION=precision(dtype),
        INT64=int64 or any(stride > LONGEST_STRIDE for of_all in strides for stride in of_all),
        **config,
    )
    return buffer.partials if buffer else []


def sums_by_cublas(M: int, dtype: torch.dtype) -> bool:
    """Whether the product of a weight's gradient over M rows is left to ATen.

    Measured on an H200 in bf16, N = 128, K = 784: at 65,536 rows this kernel takes 200 us (125 with the best of 30
    configurations) and cuBLAS 40; at 4,096 rows 39 and 9; at 256 rows the kernel takes 4, less than a launch apart.
    """
    return uses_tensor_cores(dtype) and M >= CUBLAS_ROWS


def _tiles(N: int, K: int, config: Config) -> int:
    return triton.cdiv(N, config["BLOCK_N"]) * max(1, triton.cdiv(K, config["BLOCK_K"]))


def default_splits(M: int, sizes: Sequence[tuple[int, int]], itemsize: int, tiles: int, facts: Target) -> int:
    """Splits for two programs on each processor, if each split then has rows enough for its partial sums' traffic."""
    partials = sum(N * (K + 1) for N, K in sizes) * 8  # bytes: fp32, written and read
    row = sum(N + K for N, K in sizes) * itemsize
    rows = min(max(int(partials / (row * PARTIALS_SHARE)), LEAST_ROWS), MOST_ROWS)
    return max(1, min(M // rows, triton.cdiv(2 * facts.processors, tiles)))


def default_config(M: int, sizes: Sequence[tuple[int, int]], dtype: torch.dtype, facts: Target) -> Config:
    """The largest tiles that still give every other processor one; smaller in fp32."""
    size = 64 if dtype.itemsize == 2 else 32
    config = {"BLOCK_M": 64 if dtype.itemsize == 2 else 32, "BLOCK_N": size, "BLOCK_K": size}
    config.update(num_warps=4, num_stages=4 if dtype.itemsize == 2 else 3, maxnreg=255)

    def programs() -> int:
        tiles = sum(_tiles(N, K, config) for N, K in sizes)
        return tiles * default_splits(M, sizes, dtype.itemsize, tiles, facts)

    for name in ("BLOCK_K", "BLOCK_N"):
        if programs() < facts.processors // 2:
            config[name] = 32 if size == 64 else 16
    tiles = sum(_tiles(N, K, config) for N, K in sizes)
    config["splits"] = default_splits(M, sizes, dtype.itemsize, tiles, facts)
    return config


def candidates(M: int, sizes: Sequence[tuple[int, int]], dtype: torch.dtype, facts: Target) -> list[Config]:
    """The default, then other tiles and numbers of splits."""
    configs = [default_config(M, sizes, dtype, facts)]
    for block_n, block_k, block_m, warps in ((32, 32, 64, 4), (64, 32, 64, 4), (64, 64, 64, 4), (128, 64, 64, 8)):
        if dtype.itemsize == 4:
            block_n, block_k, block_m = block_n // 2, block_k // 2, block_m // 2
        tiles = sum(_tiles(N, K, {"BLOCK_N": block_n, "BLOCK_K": block_k}) for N, K in sizes)
        for per_processor in (1, 2, 4):
            splits = max(1, min(M // block_m, triton.cdiv(per_processor * facts.processors, tiles)))
            config = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
            configs.append({**config, "num_warps": warps, "num_stages": 3, "maxnreg": 255, "splits": splits})
    needs = [
        pipelined_bytes(c, dtype.itemsize, (c["BLOCK_M"], c["BLOCK_K"]), (2 * c["BLOCK_M"], c["BLOCK_N"]))
        for c in configs
    ]
    return shortlist(configs, needs, facts)
