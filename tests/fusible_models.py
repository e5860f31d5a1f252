"""Models in the many ways that people write them, each with what `fuse` should make of it."""

from __future__ import annotations

import contextlib
import itertools
from functools import partial, wraps

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def layers(*widths: int) -> list[nn.Linear]:
    return [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]


class Layers(nn.Module):
    """fc1, fc2 and fc3: 6 -> 8 -> 8 -> 4."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = layers(6, 8, 8, 4)


class Nested(Layers):
    fused = ("fc1 + relu -> fc2 + gelu -> fc3",)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.gelu(self.fc2(F.relu(self.fc1(x)))))


class Statements(Layers):
    fused = ("fc1 + silu -> fc2 + tanh -> fc3",)

    def forward(self, x: Tensor) -> Tensor:
        """Reassigned, renamed, annotated."""
        x = self.fc1(x)
        x = F.silu(x, inplace=True)
        hidden: Tensor = self.fc2(x)
        squashed = torch.tanh(hidden)
        return self.fc3(squashed)


class Methods(Layers):
    fused = ("fc1 + relu", "fc2 + sigmoid -> fc3")

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 2)) + self.fc1(x).relu()
        return self.tail(x)

    def tail(self, x: Tensor) -> Tensor:
        return self.fc3(self.fc2(x).sigmoid_())


class Attributes(nn.Module):
    """Activations held as modules and as functions, dropout between."""

    fused = ("fc1 + leaky_relu -> fc2 + gelu_tanh",)  # in eval mode

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = layers(6, 8, 4)
        self.act1 = nn.LeakyReLU(inplace=True)
        self.drop = nn.Dropout(0.25)
        self.act2 = partial(F.gelu, approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        return self.act2(self.fc2(self.drop(self.act1(self.fc1(x)))))


class Looped(nn.Module):
    fused = ("inner.0 + relu -> inner.1 + relu -> inner.2 + relu -> out",)

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList(layers(6, 8, 8, 8))
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.inner:
            x = F.relu(layer(x))
        return self.out(x)


class LoopedWithSkips(nn.Module):
    """As a NeRF: what meets what is known when it runs."""

    fused = ()
    later = 1

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(14, 8)])
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for i, layer in enumerate(self.inner):
            h = layer(h)
            h = F.relu(h)
            if i == 1:
                h = torch.cat([x, h], -1)
        return self.out(h)


class ByIndex(nn.Module):
    fused = ("blocks.0 + relu -> blocks.1 + relu", "heads.last + tanh")

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(layers(6, 8, 8))
        self.heads = nn.ModuleDict({"last": nn.Linear(8, 4)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        x = F.relu(x)
        x = torch.relu(self.blocks[-1](x))
        x = x * 2
        return torch.tanh(self.heads["last"](x))


class DynamicControlFlow(Layers):
    fused = ("fc1 + relu", "fc2 + relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(x))
        if x.sum() > 0:
            x = F.relu(self.fc2(x))
        return self.fc3(x)


class UsedBetween(Layers):
    """fc1's output is used before the activation: left alone. fc2's is not."""

    fused = ("fc2 + relu",)

    def forward(self, x: Tensor) -> Tensor:
        before = self.fc1(x)
        x = F.relu(before)
        x = F.relu(self.fc2(x)) + before
        return self.fc3(x)


class SharedLinear(nn.Module):
    """One layer, two activations."""

    fused = ("fc + relu -> fc + tanh",)

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(F.relu(self.fc(x))))


class Private(Layers):
    """Names that Python changes within a class, super(), and a variable from around it."""

    fused = ("_Private__first + relu -> fc2 + relu",)

    def __init__(self) -> None:
        super().__init__()
        self.__first = self.fc1
        del self.fc1

    def forward(self, x: Tensor, scale: float = 2.0, *, shift: float = 1.0) -> Tensor:
        x = F.relu(self.__first(x))
        x = F.relu(self.fc2(x))
        assert super().extra_repr() == ""
        return self.fc3(x * scale + shift)


def doubled(function):
    @wraps(function)
    def wrapper(self, x):
        assert wrapper.__name__ == "forward"
        return 2 * function(self, x)

    return wrapper


class Decorated(Layers):
    fused = ("fc1 + relu -> fc2 + relu -> fc3",)

    @doubled
    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


class Inherited(Decorated):
    """The method comes from a base."""


class Guarded(Layers):
    """After an exception the variable would have another value: statements within try stay apart."""

    fused = ("fc1 + relu -> fc2 + relu -> fc3",)

    def forward(self, x: Tensor) -> Tensor:
        try:
            x = self.fc1(x)
            x = x.relu()
        except ZeroDivisionError:
            pass
        with contextlib.suppress(ZeroDivisionError):
            x = F.relu(x)
        with torch.autocast("cpu", enabled=False):
            x = self.fc2(F.relu(self.fc1(x[..., :6])))
            x = F.relu(x)
            x = self.fc3(x)
        return x


class Closure(Layers):
    """A variable that another function sees is not merged away."""

    fused = ("fc2 + relu -> fc3",)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        seen = lambda: h  # noqa: E731
        h = F.relu(h)
        return self.fc3(F.relu(self.fc2(seen())))


class Gated(nn.Module):
    """As in a Llama: an activation after one of two layers."""

    fused = ("gate + silu",)

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 8, bias=False), nn.Linear(6, 8), nn.Linear(8, 4)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class Listed(nn.Module):
    """Layers in a comprehension, and other slopes and forms that are not ours."""

    fused = ()
    later = 1

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(6, 4) for _ in range(3))
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = sum(F.relu(branch(x)) for branch in self.branches)
        return F.leaky_relu(self.fc(x), 0.3)


class Sequential(nn.Sequential):
    """A subclass with a forward of its own beside the one it inherits."""

    fused = ("0 + relu -> 2 + relu",)

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(inplace=True))


class InSequential(nn.Module):
    fused = ("body.0 + relu -> body.3 + sigmoid",)  # in eval mode

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4), nn.Sigmoid(), nn.LayerNorm(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


MODELS = [
    Nested, Statements, Methods, Attributes, Looped, LoopedWithSkips, ByIndex, DynamicControlFlow, UsedBetween,
    SharedLinear, Private, Decorated, Inherited, Guarded, Closure, Gated, Listed, Sequential, InSequential,
]  # fmt: skip
