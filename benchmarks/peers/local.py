"""Peers in PyTorch itself, for layers of Linear and relu run forward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..harness import Results, Side
from ..stacks import with_relus

# As torch.compile's documentation has it for inference on a CPU: weights are constants, and C++ products are tried.
FREEZING = {"freezing": True, "max_autotune": True, "max_autotune_gemm_backends": "CPP,ATEN"}


def addmm_activation(layers: Sequence[nn.Linear], x: Tensor) -> Side:
    """torch._addmm_activation, the product with its bias and relu in one operator. Its relu turns NaN into 0."""

    def call() -> Results:
        out = x
        for layer in layers:
            out = torch._addmm_activation(layer.bias, out, layer.weight.t())
        return (out,)

    return Side(call)


def compiled(layers: Sequence[nn.Linear], x: Tensor) -> Side:
    """torch.compile as it is."""
    model = torch.compile(with_relus(layers))
    return Side(lambda: (model(x),))


def inductor_linear(layers: Sequence[nn.Linear], x: Tensor) -> Side | str:
    """Inductor's fused linear on the CPU, with weights frozen and packed."""
    if x.device.type != "cpu":
        return "Inductor's fused linear is for the CPU"
    model = torch.compile(with_relus(layers), options=FREEZING)
    return Side(lambda: (model(x),))
