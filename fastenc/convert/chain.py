"""chain(): what rewritten code calls where it called one thing after the other. Decides at each call what to fuse.

`chain(x, fc1, F.relu, dropout, fc2)` is `fc2(dropout(F.relu(fc1(x))))`, whatever the four are. Where some of them are
Linear layers with an activation after them, and nothing else asks to see what lies between, they run as one stack.
"""

from __future__ import annotations

import functools
import importlib
import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..activation import LEAKY_RELU_SLOPE, get_activation
from ..backends import cpu
from ..encoder import has_global_hooks, is_plain
from ..functional import encoder, fused_dense
from ..modules import FusedDense

METHODS = {name: name.rstrip("_") for name in ("relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_")}

# The in-place forms differ only in what becomes of the Linear layer's output, which nobody sees.
_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.leaky_relu: "leaky_relu",
    F.leaky_relu_: "leaky_relu",
    F.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
    torch.sigmoid_: "sigmoid",
    F.tanh: "tanh",
    torch.tanh: "tanh",
    torch.tanh_: "tanh",
    F.gelu: "gelu",
    F.silu: "silu",
}
_FUNCTION_TYPES = (types.FunctionType, types.BuiltinFunctionType)

# Of each class: the option that decides what it computes, and the name of that for each value of the option.
_MODULES: dict[type, tuple[str | None, dict[Any, str]]] = {
    nn.ReLU: (None, {None: "relu"}),
    nn.LeakyReLU: ("negative_slope", {LEAKY_RELU_SLOPE: "leaky_relu"}),
    nn.Sigmoid: (None, {None: "sigmoid"}),
    nn.Tanh: (None, {None: "tanh"}),
    nn.GELU: ("approximate", {"none": "gelu", "tanh": "gelu_tanh"}),
    nn.SiLU: (None, {None: "silu"}),
}
_LAYERS = (nn.Linear, FusedDense)
_TENSORS = (nn.Parameter, Tensor)
# Classes of Hugging Face's transformers: what they compute; None is for what they hold as `act`.
_TRANSFORMERS = {"GELUActivation": None, "GELUTanh": None, "SiLUActivation": "silu"}


def activation_of(step: Any) -> str | None:
    """The name in `ACTIVATIONS` of what `step` does to a tensor; None if it is none of them, or does anything more."""
    kind = type(step)
    if kind in _MODULES:
        option, names = _MODULES[kind]
        return names.get(option and getattr(step, option)) if is_plain(step, kind) else None
    if kind in _FUNCTION_TYPES:
        return _FUNCTIONS.get(step)
    if kind is str:
        return METHODS.get(step)
    if kind is tuple:
        return _activation_of_call(*step)
    if kind is functools.partial:
        return _activation_of_call(step.func, step.args, step.keywords)
    if kind.__module__ == "transformers.activations" and kind.__name__ in _TRANSFORMERS and is_plain(step, kind):
        return _TRANSFORMERS[kind.__name__] or activation_of(step.act)
    return None


def _activation_of_call(function: Any, args: tuple, keywords: dict[str, Any]) -> str | None:
    name = _FUNCTIONS.get(function) if type(function) in _FUNCTION_TYPES else None
    if name in ("relu", "silu"):
        return name if keywords.keys() <= {"inplace"} and len(args) + len(keywords) <= 1 else None
    if name == "leaky_relu":
        # (negative_slope, inplace)
        rest = dict(zip(("negative_slope", "inplace"), args, strict=False), **keywords)
        known = len(args) <= 2 and rest.keys() <= {"negative_slope", "inplace"}
        return name if known and rest.get("negative_slope", LEAKY_RELU_SLOPE) == LEAKY_RELU_SLOPE else None
    if name == "gelu" and not args and keywords.keys() <= {"approximate"}:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(keywords.get("approximate", "none"))
    return name if not args and not keywords else None


def why_not_linear(step: Any) -> str | None:
    """Why a module that multiplies by a weight is not to be fused, in words; None if it may be."""
    kind = type(step)
    if kind not in _LAYERS:
        return f"is a {kind.__name__}, not nn.Linear itself"
    if not is_plain(step, kind):
        return "has hooks, or a forward of its own"
    parameters = step.__dict__["_parameters"]
    weight = parameters.get("weight")
    bias = parameters.get("bias")
    if not _is_ordinary(weight):
        return f"has a weight of a kind that only its own operators know ({type(weight).__name__})"
    return None if bias is None or _is_ordinary(bias) else f"has a bias of a kind of its own ({type(bias).__name__})"


def _is_ordinary(tensor: Tensor | None) -> bool:
    # Not of a subclass (quantised, sharded) and not sparse.
    if type(tensor) in _TENSORS:
        return tensor.layout is torch.strided  # type: ignore[union-attr]
    return torch.compiler.is_compiling() and isinstance(tensor, Tensor) and tensor.layout is torch.strided


def _passes(step: Any) -> bool:
    """Whether `step` gives back what it is given."""
    kind = type(step)
    if kind is nn.Dropout:
        return is_plain(step, kind) and (not step.training or step.p == 0)
    return kind is nn.Identity and is_plain(step, kind)


def call(step: Any, x: Any) -> Any:
    """One step as the original code had it."""
    kind = type(step)
    if kind is str:
        return getattr(x, step)()
    if kind is tuple:
        function, args, keywords = step
        return function(x, *args, **keywords)
    return step(x)


class Run(NamedTuple):
    """Layers that run as one, with the activation after each."""

    layers: list[nn.Module]
    activations: list[str]


def plan(steps: Sequence[Any]) -> list[Any]:
    """The steps as chain() takes them: each as it is, or as part of a Run.

    A Run is of steps that are an nn.Linear or FusedDense and the activation after it, with at least one activation in
    it. Dropout that drops nothing may stand between.
    """
    parts: list[Any] = []
    count = len(steps)
    i = 0
    while i < count:
        layers, activations = [], []
        fuses = False
        end = i
        while end < count and type(layer := steps[end]) in _LAYERS and why_not_linear(layer) is None:
            end += 1
            name = "identity" if type(layer) is nn.Linear else layer.activation
            if name == "identity" and end < count and (after := activation_of(steps[end])) is not None:
                name = after
                end += 1
            layers.append(layer)
            activations.append(name)
            fuses = fuses or name != "identity"
            while end < count and _passes(steps[end]):
                end += 1
        if fuses:
            parts.append(Run(layers, activations))
            i = end
        else:
            parts.append(steps[i])
            i += 1
    return parts


def chain(x: Any, *steps: Any) -> Any:
    """`x = step(x)` for each step, with Linear layers and the activations that follow them in one kernel.

    Args:
        x: what the first step takes; fused where it is a tensor `[..., K]`.
        steps: callables; names of methods of a tensor, as "relu"; or tuples (function, further arguments, keywords).
    """
    compiling = torch.compiler.is_compiling()
    # torch.jit.trace is to record PyTorch's own operators.
    if has_global_hooks() or (not compiling and torch._C._is_tracing()):
        for step in steps:
            x = call(step, x)
        return x
    if not compiling and type(x) in _TENSORS and (reader := _reader()) and (stack := reader.read(steps)):
        return _run(x, *stack)
    for part in plan(steps):
        if type(part) is not Run:
            x = call(part, x)
        elif type(x) not in _TENSORS and not compiling:  # of a subclass that has its own way with operators
            for layer, name in zip(part.layers, part.activations, strict=True):
                x = layer(x)
                if type(layer) is not FusedDense:
                    x = get_activation(name).forward(x)
        else:
            parameters = [layer._parameters for layer in part.layers]
            weights: list[Any] = [of_layer["weight"] for of_layer in parameters]
            x = _run(x, weights, [of_layer["bias"] for of_layer in parameters], part.activations)
    return x


def _run(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], activations: list[str]) -> Tensor:
    if len(weights) == 1:
        return fused_dense(x, weights[0], biases[0], activations[0])
    return encoder(x, weights, biases, activations)


@functools.cache
def _reader() -> Any:
    """What does the work of `plan` faster where the steps are one Run of plain modules; None where it is not built."""
    if cpu.why_unavailable():
        return None
    extension = importlib.import_module("fastenc._C")
    return extension.StepReader(
        linear=nn.Linear,
        dense=FusedDense,
        tensors=_TENSORS,
        strided=torch.strided,
        modules=_MODULES,
        others={**_FUNCTIONS, **METHODS},
    )
