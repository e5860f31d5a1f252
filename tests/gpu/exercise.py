"""A small program that launches every kernel of the Triton backend once, for compute-sanitizer to look at.

    compute-sanitizer --tool memcheck python tests/gpu/exercise.py

`python tests/gpu/exercise.py --device cpu --backend reference` runs it anywhere, to try the program itself.
"""

from __future__ import annotations

import argparse
import itertools

import torch

import fastenc

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


def run(model: torch.nn.Module, x: torch.Tensor) -> None:
    x.requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="triton")
    arguments = parser.parse_args()
    with fastenc.use_backend(arguments.backend):
        print(f"{exercise(arguments.device)} calls, forward and backward, on {arguments.device}")


if __name__ == "__main__":
    main()
