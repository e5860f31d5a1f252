"""The launches whose machine code is on record: realistic sizes, and odd ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from fastenc.kernels.dense_backward import dense_backward
from fastenc.kernels.dense_forward import dense_forward
from fastenc.kernels.encoder_backward import encoder_backward
from fastenc.kernels.encoder_forward import encoder_forward
from launching import AMD, ARCHS, Case
from torch import Tensor

# Every kernel in every dtype on every architecture, the others where they differ most: each record takes a second.
ALSO_AMD = (*ARCHS, *AMD)
SOME = (80, 90, 100)
HALF = ("bf16",)
NO_FP16 = ("bf16", "fp32", "tf32")
BOTH = ("bf16", "fp32")
ENCODER = (784, 128, 64, 32, 16)
SMALL = (100, 128, 64, 32, 16)
AUTOENCODER = (784, 128, 64, 32, 16, 32, 64, 128, 784)
MIRRORED = ("relu",) * 7 + ("identity",)


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def dense(
    M: int, K: int, N: int, activation: str, dropout: float, dtype: torch.dtype, transposed: bool = False
) -> None:
    """A layer of K inputs and N outputs in training: forward and all gradients."""
    x = empty(K, M, dtype=dtype).t() if transposed else empty(M, K, dtype=dtype)
    weight, bias = empty(N, K, dtype=dtype), empty(N, dtype=dtype)
    seed = empty(1, dtype=torch.int64) if dropout else None
    out, preact = dense_forward(x, weight, bias, activation, True, dropout, seed)
    saved = preact if preact.numel() else out
    dense_backward(torch.empty_like(out), x, weight, saved, activation, (True, True, True), dropout, seed)


def stack(
    M: int,
    widths: Sequence[int],
    activations: str | Sequence[str],
    dtype: torch.dtype,
    dropout: float = 0.0,
    train: bool = True,
) -> None:
    """A stack of layers: forward, and if it trains the gradients of all parameters."""
    depth = len(widths) - 1
    names = (activations,) * depth if isinstance(activations, str) else tuple(activations)
    x = empty(M, widths[0], dtype=dtype)
    weights = [empty(widths[i + 1], widths[i], dtype=dtype) for i in range(depth)]
    biases = [empty(width, dtype=dtype) for width in widths[1:]]
    dropouts = (dropout,) * depth
    seed = empty(1, dtype=torch.int64) if dropout else None
    results = encoder_forward(x, weights, biases, names, "needed" if train else "nothing", dropouts, seed)
    if train:
        mask = (False, *(True,) * 2 * depth)
        grad_out = empty(M, widths[-1], dtype=dtype)
        encoder_backward(grad_out, x, weights, biases, results, names, mask, dropouts, seed)


CASES = (
    Case(
        "784-128 relu, 512 rows",
        lambda dtype: dense(512, 784, 128, "relu", 0.0, dtype),
        archs=ALSO_AMD,
        searched=True,
    ),
    Case("784-128 relu, 32 rows", lambda dtype: dense(32, 784, 128, "relu", 0.0, dtype), HALF),
    Case(
        "1024-4096 gelu, 8192 rows",
        lambda dtype: dense(8192, 1024, 4096, "gelu", 0.0, dtype),
        NO_FP16,
        ALSO_AMD,
        searched=True,
    ),
    Case("128-64 gelu, 512 rows", lambda dtype: dense(512, 128, 64, "gelu", 0.0, dtype), BOTH),
    Case("784-128 relu dropped, 512 rows", lambda dtype: dense(512, 784, 128, "relu", 0.1, dtype), HALF),
    Case("784-128 relu, 512 rows, transposed", lambda dtype: dense(512, 784, 128, "relu", 0.0, dtype, True), HALF),
    Case("77-33 relu, 101 rows", lambda dtype: dense(101, 77, 33, "relu", 0.0, dtype), BOTH, aligned=False),
    Case(
        "encoder of 784 relu, 4096 rows",
        lambda dtype: stack(4096, ENCODER, "relu", dtype),
        archs=ALSO_AMD,
        searched=True,
    ),
    Case("encoder of 784 relu, inference", lambda dtype: stack(4096, ENCODER, "relu", dtype, train=False), HALF),
    Case("encoder of 784 relu dropped, 512 rows", lambda dtype: stack(512, ENCODER, "relu", dtype, 0.1), HALF),
    Case("encoder of 100 gelu, 4096 rows", lambda dtype: stack(4096, SMALL, "gelu", dtype), HALF, aligned=False),
    Case("autoencoder of 784 relu, 4096 rows", lambda dtype: stack(4096, AUTOENCODER, MIRRORED, dtype), BOTH, SOME),
    Case("8 layers of 128 silu, 4096 rows", lambda dtype: stack(4096, (128,) * 9, "silu", dtype), HALF, SOME),
)
