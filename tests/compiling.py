"""What the tests of torch.compile(model, backend="fastenc") share: compiling in a moment, and nets of whole numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from fastenc.dynamo.fusing import Found, fuse_graph


def light(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
    """All of the backend but Inductor's code generation, which takes seconds."""
    fuse_graph(module.graph)
    module.recompile()
    return torch._dynamo.lookup_backend("aot_eager")(module, inputs)


def compiled(function: Callable, **arguments: object) -> Callable:
    return torch.compile(function, backend=light, fullgraph=True, **arguments)


def fused(found: Iterable[Found]) -> list[str]:
    return [part.layers for part in found if part.reason is None]


def integers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(-2, 3, shape).to(dtype)


def net(*widths: int, end: bool = True) -> nn.Sequential:
    layers = [m for k, n in itertools.pairwise(widths) for m in (nn.Linear(k, n), nn.ReLU(), nn.Dropout(0.5))]
    model = nn.Sequential(*layers[: None if end else -2]).eval()
    for parameter in model.parameters():
        parameter.data = integers(*parameter.shape)
    return model
