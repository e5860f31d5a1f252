"""From what `match` found to our operators, from those back to PyTorch's functions, and down to the kernels."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from .. import operators, ops
from ..activation import activation_codes
from . import match
from .match import Layer, known, value

_FUNCTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "relu": (F.relu, {}),
    "leaky_relu": (F.leaky_relu, {}),
    "sigmoid": (torch.sigmoid, {}),
    "tanh": (torch.tanh, {}),
    "gelu": (F.gelu, {}),
    "gelu_tanh": (F.gelu, {"approximate": "tanh"}),
    "silu": (F.silu, {}),
}


def fuse(graph: fx.Graph, chain: Sequence[Layer]) -> None:
    """Put one call of our operator in the place of the chain."""
    last = chain[-1].out
    example: Tensor = value(last)
    given, weights, biases = (
        chain[0].inputs[0],
        [layer.inputs[1] for layer in chain],
        [layer.inputs[2] for layer in chain],
    )
    activations = [layer.activation for layer in chain]
    save = example.requires_grad
    with graph.inserting_before(last):
        # As F.linear does under autocast; elsewhere all have this dtype.
        x, *parameters = (_cast(graph, node, example.dtype) for node in (given, *weights, *biases))
        weights, biases = parameters[: len(chain)], parameters[len(chain) :]
        sizes = [
            graph.call_method("size", (x, dim)) if known(size) is None else known(size)
            for dim, size in enumerate(value(given).shape[:-1])
        ]
        if len(sizes) != 1:
            x = graph.call_function(torch.reshape, (x, (-1, known(value(weights[0]).shape[1]))))
        if len(chain) == 1:
            of_one = x, weights[0], biases[0], activations[0], save
            call = graph.call_function(torch.ops.fastenc.dense_forward.default, of_one)
        else:
            of_all = x, weights, biases, activations, save
            call = graph.call_function(torch.ops.fastenc.encoder_forward.default, of_all)
        call.meta = {key: last.meta[key] for key in last.meta if key not in ("example_value", "val")}
        out = graph.call_function(operator.getitem, (call, len(chain) - 1 if save else 0))
        if len(sizes) != 1:
            out = graph.call_function(torch.reshape, (out, (*sizes, known(example.shape[-1]))))
        out.meta = dict(last.meta)
    last.replace_all_uses_with(out)
    for i, layer in reversed(list(enumerate(chain))):
        # Without an activation, out is linear; below the first layer, dropouts are not the chain's.
        for node in dict.fromkeys((layer.out, layer.linear, *(layer.dropouts if i > 0 else ()))):
            graph.erase_node(node)


def _cast(graph: fx.Graph, node: fx.Node | None, dtype: torch.dtype) -> fx.Node | None:
    tensor = value(node)
    if node is None or tensor.dtype == dtype:
        return node
    cast = graph.call_method("to", (node, dtype))
    cast.meta["example_value"] = tensor.to(dtype)
    return cast


def expand(graph: fx.Graph) -> None:
    """Put PyTorch's own functions in the place of our operators, as `fused_dense` and `encoder` have put them there.

    So all layers are matched alike, and those for which there are no kernels are the compiler's.
    """
    operators = torch.ops.fastenc
    for node in list(graph.nodes):
        if node.op != "call_function" or node.kwargs:
            continue
        if node.target in (operators.dense_forward, operators.dense_forward.default):
            x, weight, bias, activation, save = node.args
            _expand(graph, node, x, [weight], [bias], [activation], save, 0)
        elif node.target in (operators.encoder_forward, operators.encoder_forward.default):
            x, weights, biases, activations, save = node.args
            _expand(graph, node, x, weights, biases, activations, save, len(weights) - 1 if save else 0)


def _expand(graph, node, x, weights, biases, activations, save: bool, last: int) -> None:
    outs = list(node.users)
    example = value(x)
    if not isinstance(example, FakeTensor):
        return
    if any(out.target is not operator.getitem or out.args[1] != last for out in outs):
        return
    with graph.inserting_before(node), example.fake_mode, torch.set_grad_enabled(save):
        for weight, bias, activation in zip(weights, biases, activations, strict=True):
            x = _call(graph, node, F.linear, (x, weight, bias), {})
            if activation != "identity":
                function, kwargs = _FUNCTIONS[activation]
                x = _call(graph, node, function, (x,), kwargs)
    for out in outs:
        out.replace_all_uses_with(x)
        graph.erase_node(out)
    graph.erase_node(node)


def _call(graph: fx.Graph, like: fx.Node, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
    node = graph.call_function(function, args, kwargs)
    node.meta = dict(like.meta)
    node.meta["example_value"] = function(*map(value, args), **kwargs)
    return node


def lower(graph: fx.Graph) -> None:
    """Call the CPU's kernels in the place of our operators, which would choose them again with each call.

    The graph is Inductor's, after autograd: its operators have no gradient.
    """
    if ops.forced_backend() not in ("auto", "cpu") or operators.describe_kernels():
        return
    for node in graph.nodes:
        if node.op == "call_function" and (lowered := _lowered(node)):
            node.target, node.args = lowered
            node.meta.pop("eager_input_vals", None)  # the arguments as they were


def _lowered(node: fx.Node) -> tuple[Any, tuple[Any, ...]] | None:
    operators, kernels = torch.ops.fastenc, torch.ops.fastenc_cpu
    target, args = node.target, cast("tuple[Any, ...]", node.args)
    if target not in (
        operators.dense_forward.default,
        operators.dense_backward.default,
        operators.encoder_forward.default,
        operators.encoder_backward.default,
    ):
        return None
    tensors = [value(node) for node in node.all_input_nodes]
    if not all(tensor.is_cpu and tensor.dtype == tensors[0].dtype in match.DTYPES for tensor in tensors):
        return None
    if target is operators.dense_forward.default:
        x, weight, bias, activation, save = args
        return kernels.dense_forward.default, (x, weight, bias, *activation_codes([activation]), save)
    if target is operators.dense_backward.default:
        *tensors, activation, mask = args
        return kernels.dense_backward.default, (*tensors, *activation_codes([activation]), *map(int, mask))
    if target is operators.encoder_forward.default:
        x, weights, biases, activations, save = args
        return kernels.encoder_forward.default, (x, weights, biases, activation_codes(activations), save)
    *tensors, activations, mask = args
    return kernels.encoder_backward.default, (*tensors, activation_codes(activations), list(map(int, mask)))
