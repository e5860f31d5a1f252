"""The gradient of a dense layer's input, with the activation's derivative applied as tiles are loaded."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .activation import differentiate_dropped, dropout_scale
from .configs import Config
from .dense_forward import grouped_tile
from .dense_tiles import GROUP, Product, default_tiles, tile_candidates
from .device import Target, precision, target
from .tuning import config_for
from .weight_gradient import LONGEST_STRIDE


@triton.jit
def dense_input_gradient_kernel(
    grad_ptr, saved_ptr, weight_ptr, grad_x_ptr, seed_ptr,
    M, N, K,
    stride_gm, stride_gn, stride_sm, stride_sn, stride_wn, stride_wk,
    ACTIVATION: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr, INT64: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad_x = dZ @ weight, where dZ = grad * ACTIVATION' (and dropout's scale, if P > 0).

    grad    [M, N]  fp32 | fp16 | bf16, any strides (in elements)
    saved   [M, N]  dtype of grad, any strides, as `differentiate` wants it; not read if ACTIVATION is "identity"
    weight  [N, K]  dtype of grad, any strides
    grad_x  [M, K]  dtype of grad, contiguous
    seed    [1]     int64; None if P is 0
    grid    (cdiv(M, BLOCK_M) * cdiv(K, BLOCK_K),); one program owns one tile of grad_x

    Sums are fp32; dZ is rounded to the dtype of grad for the product.
    """
    tile_m, tile_k = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K), GROUP)
    first_m = tile_m.to(tl.int64) * BLOCK_M
    first_k = tile_k.to(tl.int64) * BLOCK_K
    OFFSET: tl.constexpr = tl.int64 if INT64 else tl.int32
    m = tl.arange(0, BLOCK_M).to(OFFSET)
    n = tl.arange(0, BLOCK_N).to(OFFSET)
    k = tl.arange(0, BLOCK_K).to(OFFSET)
    in_m = (m < tl.minimum(M - first_m, BLOCK_M).to(OFFSET))[:, None]
    in_k = (k < tl.minimum(K - first_k, BLOCK_K).to(OFFSET))[None, :]
    grad_ptr += first_m * stride_gm
    weight_ptr += first_k * stride_wk
    if ACTIVATION != "identity":
        saved_ptr += first_m * stride_sm

    total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for first_n in range(0, N, BLOCK_N):
        in_n = n < N - first_n
        start_n = tl.cast(first_n, tl.int64)
        inside = in_m & in_n[None, :]
        # Where it is masked, dZ is 0: every derivative at 0 is finite.
        dz = tl.load(
            grad_ptr + start_n * stride_gn + (m[:, None] * stride_gm + n[None, :] * stride_gn), mask=inside, other=0.0
        )
        if ACTIVATION != "identity" or P > 0:
            saved = dz
            if ACTIVATION != "identity":
                saved = tl.load(
                    saved_ptr + start_n * stride_sn + (m[:, None] * stride_sm + n[None, :] * stride_sn),
                    mask=inside,
                    other=0.0,
                )
            scale = 1.0
            if P > 0:
                scale = dropout_scale(seed_ptr, 0, first_m + m, start_n + n, N, P)
            dz = differentiate_dropped(dz.to(tl.float32), saved.to(tl.float32), scale, ACTIVATION, P)
        weight = tl.load(
            weight_ptr + start_n * stride_wn + (n[:, None] * stride_wn + k[None, :] * stride_wk),
            mask=in_n[:, None] & in_k,
            other=0.0,
        )
        total = tl.dot(dz.to(weight.dtype), weight, total, input_precision=PRECISION)
    grad_x_ptr += first_m * K + first_k
    tl.store(grad_x_ptr + (m[:, None] * K + k[None, :]), total.to(grad_x_ptr.dtype.element_ty), mask=in_m & in_k)


def dense_input_gradient(
    grad_out: Tensor,
    saved: Tensor | None,
    weight: Tensor,
    activation: str,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    int64: bool = False,
    config: Config | None = None,
) -> Tensor:
    """grad_x [M, K] from grad_out [M, N], saved [M, N] (None for "identity") and weight [N, K], in one launch.

    Any strides. int64: 64-bit offsets within a tile even where 32 bits would do.
    """
    (M, N), K = grad_out.shape, weight.shape[1]
    grad_x = grad_out.new_empty((M, K))
    if M == 0 or K == 0:
        return grad_x
    if config is None:
        facts = target(grad_out.device)
        left = 1 if saved is None else 2
        product = Product(M, K, N, grad_out.dtype, precision(grad_out.dtype), left, dropout > 0)
        config = config_for(
            "dense_input_gradient",
            grad_out,
            (M, N, K, activation, grad_out.stride(1) == 1, weight.stride(1) == 1, dropout > 0),
            lambda: _named(default_tiles(product, facts)),
            lambda: candidates(product, facts),
            lambda candidate: dense_input_gradient(
                grad_out, saved, weight, activation, dropout, seed, int64, candidate
            ),
        )
    strides = (*grad_out.stride(), *(grad_out if saved is None else saved).stride(), *weight.stride())
    dense_input_gradient_kernel[(triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(K, config["BLOCK_K"]),)](
        grad_out, saved, weight, grad_x, seed if dropout else None, M, N, K, *strides,
        ACTIVATION=activation,
        P=dropout,
        PRECISION=precision(grad_out.dtype),
        INT64=int64 or max(*strides, K) > LONGEST_STRIDE,
        GROUP=GROUP,
        **config,
    )  # fmt: skip
    return grad_x


def candidates(product: Product, facts: Target) -> list[Config]:
    """The default, then other tiles."""
    return [_named(tiles) for tiles in tile_candidates(product, facts)]


def _named(tiles: Config) -> Config:
    """With the kernel's names for a product's rows, columns and depth."""
    names = {"rows": "BLOCK_M", "columns": "BLOCK_K", "depth": "BLOCK_N"}
    return {names.get(name, name): value for name, value in tiles.items()}
