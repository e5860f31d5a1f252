"""The dense layer's forward pass: product, bias, activation and dropout in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .activation import SAVES_PREACT, activate, dropout_scale
from .configs import MAX_CANDIDATES, Config
from .dense_tiles import GROUP, Product, default_tiles, tile_candidates
from .device import Target, precision, target
from .tuning import config_for
from .weight_gradient import LONGEST_STRIDE

# Descriptors take a few microseconds of host time to make: a product must be as large as one that takes a GPU longer.
LEAST_DESCRIBED = 1 << 32  # M * N * K


@triton.jit
def grouped_tile(tile, rows, columns, GROUP: tl.constexpr):
    """(row, column) of the tile with this number, of rows x columns tiles.

    Tiles with numbers near each other lie in a few rows and a few columns, so that they share what they load.
    """
    first_row = tile // (GROUP * columns) * GROUP
    group = tl.minimum(rows - first_row, GROUP)
    within = tile % (GROUP * columns)
    return first_row + within % group, within // group


@triton.jit
def _finish_tile(
    total, bias_ptr, out_ptr, preact_ptr, seed_ptr,
    first_m, first_n, M, N, stride_b,
    ACTIVATION: tl.constexpr, P: tl.constexpr, INT64: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the bias to a tile of products, activate, drop, and store: one rounding each for out and preact."""
    OFFSET: tl.constexpr = tl.int64 if INT64 else tl.int32
    m = tl.arange(0, BLOCK_M).to(OFFSET)
    n = tl.arange(0, BLOCK_N).to(OFFSET)
    in_n = n < tl.minimum(N - first_n, BLOCK_N).to(OFFSET)
    inside = (m < tl.minimum(M - first_m, BLOCK_M).to(OFFSET))[:, None] & in_n[None, :]
    first = first_m * N + first_n
    offsets = m[:, None] * N + n[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + first_n * stride_b + n * stride_b, mask=in_n, other=0.0)
        total += bias.to(tl.float32)[None, :]
    if preact_ptr is not None:
        tl.store(preact_ptr + first + offsets, total.to(preact_ptr.dtype.element_ty), mask=inside)
    total = activate(total, ACTIVATION)
    if P > 0:
        total *= dropout_scale(seed_ptr, 0, first_m + m, first_n + n, N, P)
    tl.store(out_ptr + first + offsets, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def dense_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, preact_ptr, seed_ptr,
    M, N, K,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_b,
    ACTIVATION: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr, INT64: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = dropout(ACTIVATION(x @ weight.T + bias)); also the value before ACTIVATION, into preact.

    x       [M, K]  fp32 | fp16 | bf16, any strides (in elements)
    weight  [N, K]  dtype of x, any strides
    bias    [N]     dtype of x, any stride; None: no bias
    out     [M, N]  dtype of x, contiguous
    preact  [M, N]  dtype of x, contiguous; None: not written
    seed    [1]     int64; None if P, the probability of dropping, is 0
    grid    (cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N),); one program owns one tile of out and of preact

    Sums are fp32. Offsets of tiles are 64-bit, those within a tile only if INT64.
    """
    tile_m, tile_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    first_m = tile_m.to(tl.int64) * BLOCK_M
    first_n = tile_n.to(tl.int64) * BLOCK_N
    OFFSET: tl.constexpr = tl.int64 if INT64 else tl.int32
    m = tl.arange(0, BLOCK_M).to(OFFSET)
    n = tl.arange(0, BLOCK_N).to(OFFSET)
    k = tl.arange(0, BLOCK_K).to(OFFSET)
    in_m = (m < tl.minimum(M - first_m, BLOCK_M).to(OFFSET))[:, None]
    in_n = (n < tl.minimum(N - first_n, BLOCK_N).to(OFFSET))[:, None]
    x_ptr += first_m * stride_xm
    weight_ptr += first_n * stride_wn

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first_k in range(0, K, BLOCK_K):
        in_k = (k < K - first_k)[None, :]
        start_k = tl.cast(first_k, tl.int64)
        x = tl.load(
            x_ptr + start_k * stride_xk + (m[:, None] * stride_xm + k[None, :] * stride_xk), mask=in_m & in_k, other=0.0
        )
        weight = tl.load(
            weight_ptr + start_k * stride_wk + (n[:, None] * stride_wn + k[None, :] * stride_wk),
            mask=in_n & in_k,
            other=0.0,
        )
        total = tl.dot(x, tl.trans(weight), total, input_precision=PRECISION)
    _finish_tile(
        total, bias_ptr, out_ptr, preact_ptr, seed_ptr,
        first_m, first_n, M, N, stride_b,
        ACTIVATION, P, INT64, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def dense_forward_descriptor_kernel(
    x_descriptor, weight_descriptor, bias_ptr, out_ptr, preact_ptr, seed_ptr,
    M, N, K,
    stride_b,
    ACTIVATION: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr, INT64: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As `dense_forward_kernel`, with x and weight loaded by the hardware's tensor copies, and persistent.

    x_descriptor       of x [M, K], in blocks [BLOCK_M, BLOCK_K]; zero outside
    weight_descriptor  of weight [N, K], in blocks [BLOCK_N, BLOCK_K]; zero outside
    grid               (any number,); program i owns tiles i, i + number, ... of out and of preact
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = grouped_tile(tile, tiles_m, tiles_n, GROUP)
        first_m = tile_m * BLOCK_M
        first_n = tile_n * BLOCK_N
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for first_k in range(0, K, BLOCK_K):
            x = x_descriptor.load([first_m, first_k])
            weight = weight_descriptor.load([first_n, first_k])
            total = tl.dot(x, tl.trans(weight), total, input_precision=PRECISION)
        _finish_tile(
            total, bias_ptr, out_ptr, preact_ptr, seed_ptr,
            first_m.to(tl.int64), first_n.to(tl.int64), M, N, stride_b,
            ACTIVATION, P, INT64, BLOCK_M, BLOCK_N,
        )  # fmt: skip


def dense_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    save: bool,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    int64: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, preact) for `out = dropout(activation(x @ weight.T + bias))`, in one launch; none if out is empty.

    Args:
        x: [M, K] fp32, fp16 or bf16, any strides.
        weight: [N, K], bias: [N] or None; dtype of x, any strides.
        save: return the value before the activation, if the derivative is of it; else preact is empty.
        dropout: the probability of dropping an element of out; the others are scaled by 1 / (1 - dropout).
        seed: int64 [1], read only for dropout.
        int64: 64-bit offsets within a tile even where 32 bits would do.
        config: block sizes; None for those that are known to be good.
    """
    (M, K), N = x.shape, weight.shape[0]
    out = x.new_empty((M, N))
    preact = x.new_empty((M, N)) if save and activation in SAVES_PREACT else None
    result = out, x.new_empty(0) if preact is None else preact
    if M == 0 or N == 0:
        return result
    describable = _describable(x) and _describable(weight)
    if config is None:
        facts = target(x.device)
        product = Product(M, N, K, x.dtype, precision(x.dtype), dropout=dropout > 0)
        config = config_for(
            "dense_forward",
            x,
            (M, N, K, x.stride(1) == 1, weight.stride(1) == 1, describable, dropout > 0),
            lambda: default_config(product, describable, facts),
            lambda: candidates(product, describable, facts),
            lambda candidate: dense_forward(x, weight, bias, activation, save, dropout, seed, int64, candidate),
        )
    config = dict(config)
    described = config.pop("described", 0)
    strides = (*x.stride(), *weight.stride())
    stride_b = 1 if bias is None else bias.stride(0)
    rest = {
        "ACTIVATION": activation,
        "P": dropout,
        "PRECISION": precision(x.dtype),
        "INT64": int64 or max(*strides, stride_b, N) > LONGEST_STRIDE,
        "GROUP": GROUP,
        **config,
    }
    tiles = triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(N, config["BLOCK_N"])
    seed = seed if dropout else None
    if described:
        dense_forward_descriptor_kernel[(min(tiles, target(x.device).processors),)](
            TensorDescriptor.from_tensor(x, [config["BLOCK_M"], config["BLOCK_K"]]),
            TensorDescriptor.from_tensor(weight, [config["BLOCK_N"], config["BLOCK_K"]]),
            bias, out, preact, seed, M, N, K, stride_b, **rest,
        )  # fmt: skip
    else:
        dense_forward_kernel[(tiles,)](x, weight, bias, out, preact, seed, M, N, K, *strides, stride_b, **rest)
    return result


def _describable(matrix: Tensor) -> bool:
    """Whether the hardware's tensor copies can load it: rows apart and 16-byte aligned, elements of a row adjacent."""
    (rows, columns), (row, column) = matrix.shape, matrix.stride()
    size = matrix.element_size()
    return (
        column == 1
        and row >= columns > 0
        and row * size % 16 == 0
        and matrix.data_ptr() % 16 == 0
        and max(rows, columns, row) < 1 << 31
    )


def default_config(product: Product, describable: bool, facts: Target) -> Config:
    """Block sizes by shape; persistent and with descriptors if that can be, and the product is large.

    Not measured: that descriptors pay on every GPU that has them, for products of LEAST_DESCRIBED. The random numbers
    of dropout leave the persistent kernel too few registers.
    """
    large = product.rows * product.columns * product.depth >= LEAST_DESCRIBED
    if describable and _has_descriptors(product, facts) and large and not product.dropout:
        return _described(default_tiles(product._replace(described=True), facts))
    return _named(default_tiles(product, facts))


def candidates(product: Product, describable: bool, facts: Target) -> list[Config]:
    """The default, then other tiles, half of them with descriptors where they can be had."""
    configs = [_named(tiles) for tiles in tile_candidates(product, facts)]
    if describable and _has_descriptors(product, facts):
        described = [_described(tiles) for tiles in tile_candidates(product._replace(described=True), facts)]
        configs = described[: MAX_CANDIDATES // 2] + configs
    default = default_config(product, describable, facts)
    return [default, *(config for config in configs if config != default)][:MAX_CANDIDATES]


def _described(tiles: Config) -> Config:
    return _named(tiles) | {"described": 1}


def _has_descriptors(product: Product, facts: Target) -> bool:
    return facts.arch >= 90 and product.tensor_cores


def _named(tiles: Config) -> Config:
    """With the kernel's names for a product's rows, columns and depth."""
    names = {"rows": "BLOCK_M", "columns": "BLOCK_N", "depth": "BLOCK_K"}
    return {names.get(name, name): value for name, value in tiles.items()}
