"""Layers in a graph of torch.fx, as Dynamo writes it: linear and the activation after it, and straight chains of them.

The graph is of PyTorch's own functions, not yet functional: what is found must have no other reader, and nothing may
run between its parts that could change what they read.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from ..activation import LEAKY_RELU_SLOPE

NO_ACTIVATION = "no activation of ours follows"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# What runs an activation, as a function of PyTorch or a method of a tensor, in place or not.
_CALLS: dict[Any, str] = {
    **dict.fromkeys((torch.relu, torch.relu_, F.relu, "relu", "relu_"), "relu"),
    **dict.fromkeys((torch.sigmoid, torch.sigmoid_, F.sigmoid, "sigmoid", "sigmoid_"), "sigmoid"),
    **dict.fromkeys((torch.tanh, torch.tanh_, F.tanh, "tanh", "tanh_"), "tanh"),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), "leaky_relu"),
    F.gelu: "gelu",
    F.silu: "silu",
}
# Of what else may run between the layers of a chain: nothing here writes into a tensor.
_PURE: set[Any] = {operator.getitem, operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv}
_PURE |= {"size", "item", torch._C._is_autocast_available}


@dataclass(frozen=True)
class Layer:
    """`activation(x @ weight.T + bias)`: the nodes of it."""

    linear: fx.Node
    out: fx.Node  # of the activation; without one, that of linear
    activation: str
    dropouts: tuple[fx.Node, ...] = ()  # between the layer below and it; they drop nothing

    @property
    def inputs(self) -> list[Any]:
        """x, weight and bias."""
        return _arguments(self.linear, ("input", "weight", "bias"))


def value(node: fx.Node | None) -> Any:
    """The fake tensor (or number) that stands for what the node gives; None if there is none."""
    return None if node is None else node.meta.get("example_value", node.meta.get("val"))


def known(size: int | torch.SymInt) -> int | None:
    """The size, if it is the same in all calls of the graph."""
    return size if isinstance(size, int) else size.node.maybe_as_int()


def find(graph: fx.Graph) -> tuple[list[list[Layer]], list[tuple[fx.Node, str]]]:
    """The chains (most have one layer) with an activation in them, and each other linear with the reason in words."""
    left: list[tuple[fx.Node, str]] = []
    layers: list[Layer] = []
    for node in graph.nodes:
        if node.op == "call_function" and node.target is F.linear:
            layer = _layer(node)
            if isinstance(layer, str):
                left.append((node, layer))
            else:
                layers.append(layer)
    harmful = _count_harmful(graph, layers)
    layers = [
        layer
        if _is_quiet(harmful, layer.linear, layer.out)
        else replace(layer, out=layer.linear, activation="identity")
        for layer in layers
    ]
    chains: list[list[Layer]] = []
    ending: dict[fx.Node, list[Layer]] = {}
    for layer in layers:
        below, dropouts = _source(layer)
        chain = None if below is None else ending.pop(below, None)
        if chain is not None and _is_quiet(harmful, chain[0].linear, layer.out):
            chain.append(replace(layer, dropouts=dropouts))
        else:
            chain = [layer]
            chains.append(chain)
        ending[layer.out] = chain
    for chain in chains:
        if all(layer.activation == "identity" for layer in chain):
            left += [(layer.linear, _why_no_activation(layer)) for layer in chain]
    return [chain for chain in chains if any(layer.activation != "identity" for layer in chain)], left


def _layer(node: fx.Node) -> Layer | str:
    """The layer of this linear, or why there is none, in words."""
    x, weight, bias = _arguments(node, ("input", "weight", "bias"))
    if reason := _why_not(value(node), value(x), value(weight), value(bias), bias is not None):
        return reason
    user = next(iter(node.users)) if len(node.users) == 1 else None
    name = activation_of(user)
    if user is None or name is None or not _is_kept(node, user):
        return Layer(node, node, "identity")
    return Layer(node, user, name)


def _arguments(node: fx.Node, names: tuple[str, ...]) -> list[Any]:
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return [given.get(name) for name in names]


def _is_kept(node: fx.Node, user: fx.Node) -> bool:
    """Whether the user's result has the dtype of node's, which it reads first; autocast casts some functions."""
    before, after = value(node), value(user)
    return user.args[0] is node and _is_plain(after) and after.dtype == before.dtype


def _is_plain(tensor: Any) -> bool:
    """Whether a dense tensor without anything special about it is meant: no subclass, nor one within vmap or grad."""
    return (
        type(tensor) is FakeTensor
        and tensor.layout == torch.strided
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def _why_not(out: Any, x: Any, weight: Any, bias: Any, has_bias: bool) -> str | None:
    tensors = [x, weight, bias] if has_bias else [x, weight]
    if not all(_is_plain(tensor) for tensor in (out, *tensors)):
        return "not of plain dense tensors"
    if out.device.type not in ("cpu", "cuda") or any(tensor.device != out.device for tensor in tensors):
        return f"no kernels for tensors on {out.device}"
    if out.dtype not in DTYPES or any(tensor.dtype not in DTYPES for tensor in tensors):
        return f"no kernels for {x.dtype}"
    if weight.dim() != 2 or x.dim() == 0 or (has_bias and bias.dim() != 1):
        return f"weight has {weight.dim()} dimensions, x {x.dim()}"
    sizes = [known(size) for size in (*weight.shape, x.shape[-1], *(bias.shape if has_bias else ()))]
    if not all(sizes):
        return "the number of its features is not known when it is compiled, or 0"
    if has_bias and sizes[3] != sizes[0]:
        return "bias is broadcast"
    return None


def activation_of(node: fx.Node | None) -> str | None:
    """The name of what the node does to its first argument; None if that is no activation of ours, or does more."""
    if node is None or node.op not in ("call_function", "call_method"):
        return None
    name = _CALLS.get(cast(Any, node.target))
    if name is None or len(node.args) == 0:
        return None
    names = ("negative_slope", "inplace") if name == "leaky_relu" else ("inplace",)
    extra: dict[str, Any] = dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)
    extra.pop("inplace", None)
    if name == "leaky_relu" and extra.pop("negative_slope", LEAKY_RELU_SLOPE) != LEAKY_RELU_SLOPE:
        return None
    if name == "gelu":
        name = {"none": "gelu", "tanh": "gelu_tanh"}.get(extra.pop("approximate", "none"))
    return None if extra else name


def _drops_nothing(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target is not F.dropout:
        return False
    training = _arguments(node, ("input", "p", "training", "inplace"))[2]
    return training is False


def _source(layer: Layer) -> tuple[fx.Node | None, tuple[fx.Node, ...]]:
    """What x is the output of, below dropouts that drop nothing, if nobody else reads it; and those dropouts."""
    (node, *parameters), dropouts = layer.inputs, []
    if node in parameters:
        return None, ()
    while _drops_nothing(node) and len(node.users) == 1:
        dropouts.append(node)
        node = node.args[0]
    return (node, tuple(dropouts)) if len(node.users) == 1 else (None, ())


def _count_harmful(graph: fx.Graph, layers: list[Layer]) -> dict[fx.Node, int]:
    """For each node, how many run up to it that might write into a tensor or change a mode."""
    # In place, an activation of a layer writes into what linear gave, which nobody else reads.
    harmless = {node for layer in layers for node in (layer.linear, layer.out)}
    count, counts = 0, {}
    for node in graph.nodes:
        count += not (node in harmless or _is_pure(node))
        counts[node] = count
    return counts


def _is_pure(node: fx.Node) -> bool:
    if node.op in ("placeholder", "get_attr"):
        return True
    if isinstance(node.target, torch._ops.OpOverload):
        return not node.target._schema.is_mutable
    return node.target in _PURE or node.target is F.linear or _drops_nothing(node)


def _is_quiet(harmful: dict[fx.Node, int], first: fx.Node, last: fx.Node) -> bool:
    return harmful[first] == harmful[last]


def _why_no_activation(layer: Layer) -> str:
    if len(layer.linear.users) > 1:
        return "more than one reads its output"
    user = next(iter(layer.linear.users), None)
    if user is not None and activation_of(user):
        return "something runs between it and the activation that may change what they read"
    return NO_ACTIVATION
