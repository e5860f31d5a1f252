"""A small program that launches every kernel of the GPU backends, for compute-sanitizer to look at.

    compute-sanitizer --tool memcheck python tests/gpu/exercise.py --backend cuda

`python tests/gpu/exercise.py --device cpu --backend reference` runs it anywhere, to try the program itself.
"""

from __future__ import annotations

import argparse
import itertools

import torch

import fastenc
from fastenc.activation import activation_code
from fastenc.backends import BACKENDS

SHAPES = ((1, 1, 1), (64, 64, 64), (67, 129, 65))  # one element, whole tiles, remainders everywhere: M, N, K
STACKS = ((8, (16, 16)), (67, (129, 65, 33, 17)))  # rows, widths
ACTIVATIONS = ("relu", "gelu", "identity")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def exercise(device: str) -> int:
    """Forward and backward of layers and stacks, in training with dropout too. Returns how many calls were made."""
    calls = 0
    for dtype, activation in itertools.product(DTYPES, ACTIVATIONS):
        options = {"activation": activation, "device": device, "dtype": dtype}
        for M, N, K in SHAPES:
            run(fastenc.FusedDense(K, N, **options), torch.randn(M, K, device=device, dtype=dtype))
            calls += 1
        for (M, widths), dropout in itertools.product(STACKS, (0.0, 0.5)):
            encoder = fastenc.Encoder(widths[0], widths[1:], dropout=dropout, **options)
            run(encoder, torch.randn(M, widths[0], device=device, dtype=dtype))
            calls += 1
    return calls


def exercise_operators(device: str) -> int:
    """The dense layer's CUDA kernels where the backend would leave products to cuBLAS; TF32 too."""
    calls = 0
    for dtype, tf32 in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False), (torch.float16, False)):
        for M, N, K in (*SHAPES, (300, 200, 40)):
            x, weight, grad_out = (torch.randn(s, device=device, dtype=dtype) for s in ((M, K), (N, K), (M, N)))
            out, _ = torch.ops.fastenc_cuda.dense_forward(x, weight, None, activation_code("relu"), True, tf32)
            grads = torch.ops.fastenc_cuda.dense_backward(
                grad_out, x, weight, out, activation_code("relu"), True, True, True, tf32
            )
            assert all(bool(grad.isfinite().all()) for grad in grads)
            calls += 1
    return calls


def run(model: torch.nn.Module, x: torch.Tensor) -> None:
    x.requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", help="by default each of cuda and triton that is usable")
    arguments = parser.parse_args()
    usable = [name for name in ("cuda", "triton") if BACKENDS[name].why_unavailable() is None]
    for backend in [arguments.backend] if arguments.backend else usable:
        with fastenc.use_backend(backend):
            calls = exercise(arguments.device)
        if backend == "cuda":
            calls += exercise_operators(arguments.device)
        print(f"{backend}: {calls} calls, forward and backward, on {arguments.device}")
    if not arguments.backend and not usable:
        raise SystemExit("neither the CUDA nor the Triton kernels are usable here; fastenc info tells why")


if __name__ == "__main__":
    main()
