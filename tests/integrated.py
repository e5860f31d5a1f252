"""What the tests of other packages share: models, plain and fused, and the examples of docs/integrations.md."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accuracy import Worst
from torch import Tensor, nn
from torch.nn import functional as F

import fastenc
from fastenc import FusedDense
from fastenc.convert import chain as chains

DOCS = Path(__file__).parents[1] / "docs" / "integrations.md"

MODULES = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
}


class Net(nn.Module):
    """Layers as most people write them: `[M, 6] -> [M, 3]`; activations are modules, so that all tools see them."""

    def __init__(self, activation: str = "relu") -> None:
        super().__init__()
        self.fc1, self.fc2, self.out = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 3)
        self.act1, self.act2 = MODULES[activation](), MODULES[activation]()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.act2(self.fc2(self.act1(self.fc1(x)))))


def make(model: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model()


def make_x(rows: int = 12) -> Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(rows))


def fused(model: nn.Module) -> nn.Module:
    """The model's copy, fused."""
    return fastenc.fuse(copy.deepcopy(model), verbose=False)


def unfused_layers(layers: Sequence[FusedDense]) -> nn.Sequential:
    """What the layers mean, with copies of their parameters: nn.Linear and the activation's module in turn."""
    parts: list[nn.Module] = []
    for layer in layers:
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        linear.load_state_dict(layer.state_dict())
        parts += [linear, MODULES[layer.activation]()]
    return nn.Sequential(*parts)


def assert_as_accurate(actual: Sequence[Tensor], run: Callable[..., Sequence[Tensor]], plain: nn.Module) -> None:
    """The error rule for what `run(model, dtype)` would give for the plain model, there and in float64."""
    expected, exact = (run(copy.deepcopy(plain).to(dtype), dtype) for dtype in (torch.float32, torch.float64))
    assert_within(actual, expected, exact)


def assert_within(actual: Sequence[Tensor], expected: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    """The error rule over all of some tensors together: each is so small that the largest error in it is chance."""
    for values, others in zip(actual, expected, strict=True):
        assert values.shape == others.shape
    worst = Worst()
    worst.add(*({"all": torch.cat([v.detach().flatten() for v in side])} for side in (actual, expected, exact)))
    worst.check()


def train(model: nn.Module, dtype: torch.dtype, steps: int = 4) -> list[Tensor]:
    """The trainable parameters after some steps of SGD: a loop without any other package."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    x, target = make_x().to(dtype), torch.arange(12) % 3
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def count_fused(monkeypatch: Any) -> list[int]:
    """A list that gets the number of layers of each call of fused code that a model from `fuse` makes."""
    calls: list[int] = []
    dense, encoder = chains.fused_dense, chains.encoder

    def counted_dense(*args: Any) -> Tensor:
        calls.append(1)
        return dense(*args)

    def counted_encoder(x: Tensor, weights: Sequence[Tensor], *args: Any) -> Tensor:
        calls.append(len(weights))
        return encoder(x, weights, *args)

    monkeypatch.setattr(chains, "fused_dense", counted_dense)
    monkeypatch.setattr(chains, "encoder", counted_encoder)
    return calls


def run_example(title: str) -> dict[str, Any]:
    """The names that the example under this heading leaves behind."""
    (section,) = (part for part in DOCS.read_text().split("\n## ") if part.startswith(f"{title}\n"))
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    names: dict[str, Any] = {"__name__": "example"}
    exec(block, names)
    return names
