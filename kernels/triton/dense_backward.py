"""The dense layer's backward pass: the gradients of x, weight and bias in at most three launches of our kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .dense_input_gradient import dense_input_gradient
from .device import uses_tensor_cores
from .preact_gradient import preact_gradient
from .reduce import reduce
from .weight_gradient import Layer, sums_by_cublas, weight_gradient


def is_wide(M: int, N: int, K: int, dtype: torch.dtype) -> bool:
    """Whether to write dZ [M, N] once, and leave the products to ATen, for a layer of K inputs and N outputs.

    Few rows: by counting elements, with C = K / 128 tiles along K, each of which loads all rows of dZ's factors:

    - Fused, both products load grad_out and saved for each tile and apply the derivative again: 2 * 2 * M * N * C.
      Written once, dZ costs 3 * M * N, then one load for each tile: 3 * M * N + 2 * M * N * C. Fused is less if
      C < 1.5, that is for K <= 128.
    - The tiles of the same rows run together, so all loads but the first come from the L2 cache, beside which x and
      grad_x (M * K = M * 128 * C each) go through the memory. 2 * M * N * C elements from a cache of at least twice the
      memory's bandwidth hide behind M * 128 * C from the memory if N <= 128.

    So fused loses where both N and K are above 128; there cuBLAS, which ATen calls, is the better product as well. fp32
    without tensor cores is bound by arithmetic: writing dZ takes about the time of a product with K = 32 (A100:
    12 bytes at 2 TB/s against 2 K operations at 19.5 TFLOP/s), so cuBLAS is left to it as soon as both are above 64.

    Many rows, on tensor cores: see `sums_by_cublas`.
    """
    tensor_cores = uses_tensor_cores(dtype)
    return sums_by_cublas(M, dtype) or min(N, K) > (128 if tensor_cores else 64)


def dense_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    saved: Tensor,
    activation: str,
    output_mask: Sequence[bool],
    dropout: float = 0.0,
    seed: Tensor | None = None,
    int64: bool = False,
    wide: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_x [M, K], grad_weight [N, K], grad_bias [N]); what `output_mask` leaves out is an empty tensor.

    Args:
        grad_out: [M, N] fp32, fp16 or bf16, any strides, 0 included, as all matrices here.
        x: [M, K], read for grad_weight only; weight: [N, K], read for grad_x only.
        saved: [M, N], the value before the activation if it is in SAVES_PREACT, else `out`; not read for "identity".
        dropout, seed: as given to `dense_forward`.
        int64: 64-bit offsets within a tile even where 32 bits would do.
        wide: None for `is_wide`.
    """
    want_x, want_weight, want_bias = output_mask
    (M, N), K = grad_out.shape, weight.shape[1]
    if M == 0 or N == 0:
        return (
            _zeros(grad_out, (M, K), want_x),
            _zeros(grad_out, (N, K), want_weight),
            _zeros(grad_out, (N,), want_bias),
        )
    needed = None if activation == "identity" else saved
    grad_x = grad_weight = grad_bias = None
    if is_wide(M, N, K, grad_out.dtype) if wide is None else wide:
        wanted = (want_x or want_weight, want_bias)
        dz, grad_bias = preact_gradient(grad_out, needed, activation, wanted, dropout, seed, int64)
        if dz is not None:
            grad_x = torch.mm(dz, weight) if want_x else None
            grad_weight = torch.mm(dz.t(), x) if want_weight else None
    else:
        if want_x:
            grad_x = dense_input_gradient(grad_out, needed, weight, activation, dropout, seed, int64)
        if want_weight:
            grad_weight = grad_out.new_empty((N, K))
            grad_bias = grad_out.new_empty(N) if want_bias else None
            layer = Layer(grad_out, needed, x, activation, grad_weight, grad_bias, dropout)
            reduce(weight_gradient([layer], seed if dropout else None, int64))
        elif want_bias:
            _, grad_bias = preact_gradient(grad_out, needed, activation, (False, True), dropout, seed, int64)
    return _or_empty(grad_x, grad_out), _or_empty(grad_weight, grad_out), _or_empty(grad_bias, grad_out)


def _or_empty(gradient: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if gradient is None else gradient


def _zeros(like: Tensor, shape: tuple[int, ...], wanted: bool) -> Tensor:
    return like.new_zeros(shape if wanted else (0,))
