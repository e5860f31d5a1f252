"""Sides for a stack of Linear layers with activations: same weights and inputs, forward or forward and backward."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastenc import Encoder

from .harness import Call, Case, Results, Side, Sides

FORWARD = "forward, inference"
PARAMETERS = "forward + backward, parameter gradients"
EVERYTHING = "forward + backward"
EAGER = "eager PyTorch"
MARGIN = 1e-5  # some hundred times what rounding does to a float32 sum, beside the sum of its terms' sizes


def stack_flops(M: int, widths: Sequence[int], mode: str) -> int:
    """Operations of the needed products for `M` rows through layers widths[0] -> widths[1] -> ...

    Forward needs one product a layer, backward one for each grad_weight and one for each gradient of a layer's input;
    that of the first layer's only if x wants a gradient.
    """
    products = [2 * M * K * N for K, N in itertools.pairwise(widths)]
    if mode == FORWARD:
        return sum(products)
    return 3 * sum(products) - (products[0] if mode == PARAMETERS else 0)


def stack_bytes(M: int, widths: Sequence[int], mode: str, itemsize: int) -> int:
    """The least that is moved for `M` rows: x, the parameters and the output; backward adds grad_out and x again, and
    what it leaves: the parameters' gradients and, if x wants one, x's. What lies between the layers can stay on chip.
    """
    parameters = sum(K * N + N for K, N in itertools.pairwise(widths))
    x, out = M * widths[0], M * widths[-1]
    moved = x + parameters + out
    if mode != FORWARD:
        moved += out + x + 2 * parameters + (x if mode == EVERYTHING else 0)
    return moved * itemsize


Peer = Callable[[Sequence[nn.Linear], Tensor], "Side | str"]
Forward = Callable[[Tensor], Tensor]


class Model(NamedTuple):
    """Layers as a peer has them: what runs them, and its own weight [out, in] and bias [out] of each in turn."""

    forward: Forward
    parameters: list[Tensor]


# Of the layers, the rows and whether gradients will be asked for: a Model with those weights, or why there is none.
ModelMaker = Callable[[Sequence[nn.Linear], Tensor, bool], Model | str]


def with_relus(layers: Sequence[nn.Linear]) -> nn.Sequential:
    return nn.Sequential(*(module for layer in layers for module in (layer, nn.ReLU())))


def encoder_sides(
    case: Case,
    M: int,
    widths: Sequence[int],
    peers: Mapping[str, Peer] = MappingProxyType({}),
    models: Mapping[str, ModelMaker] = MappingProxyType({}),
) -> Sides:
    """Sides of an Encoder of these widths, relu after each layer, on `M` rows; the rest as stack_sides has it."""
    layers = [nn.Linear(K, N, dtype=case.dtype) for K, N in itertools.pairwise(widths)]
    fused = Encoder(widths[0], widths[1:], activation="relu", dtype=case.dtype)
    return stack_sides(case, M, fused, with_relus(layers), layers, peers, models)


def stack_sides(
    case: Case,
    M: int,
    fused: nn.Module,
    eager: Forward,
    layers: Sequence[nn.Linear],
    peers: Mapping[str, Peer] = MappingProxyType({}),
    models: Mapping[str, ModelMaker] = MappingProxyType({}),
    activations: Sequence[Forward] | None = None,
) -> Sides:
    """Sides of `fused` and of `eager`, which runs `layers` with `activations`. `fused` is given their weights.

    peers: more ways to run the layers forward, by name; taken in the mode FORWARD.
    models: more ways in any mode.
    activations: after each layer; None means relu.
    """
    parameters = [parameter for layer in layers for parameter in (layer.weight, layer.bias)]
    with torch.no_grad():
        for own, theirs in zip(fused.parameters(), parameters, strict=True):
            own.copy_(theirs)
    x = draw_rows(layers, M) if activations is None else torch.randn(M, layers[0].in_features).to(parameters[0].dtype)
    grad_out = torch.randn(M, layers[-1].out_features).to(x.dtype)
    exact = exact_results(layers, x, grad_out, activations)
    names = ("out", "grad_x", *(f"grad_{name}{i}" for i in range(len(layers)) for name in ("weight", "bias")))
    made = {name: make(layers, x, case.mode != FORWARD) for name, make in models.items()}
    if case.mode == FORWARD:
        fused.eval()
        with torch.inference_mode():
            others = {name: peer(layers, x) for name, peer in peers.items()}
        sides: dict[str, Side | str] = {EAGER: Side(lambda: (eager(x),)), **others}
        sides |= {name: forward_side(model, x) for name, model in made.items()}
        return Sides(Side(lambda: (fused(x),)), sides, exact[:1], names[:1], torch.inference_mode)
    wants_grad_x = case.mode == EVERYTHING
    if not wants_grad_x:
        exact, names = exact[:1] + exact[2:], names[:1] + names[2:]
    ours = training_side(Model(fused, [*fused.parameters()]), x, grad_out, wants_grad_x)
    sides = {EAGER: training_side(Model(eager, parameters), x, grad_out, wants_grad_x)}
    for name, model in made.items():
        sides[name] = model if isinstance(model, str) else training_side(model, x, grad_out, wants_grad_x)
    return Sides(ours, sides, exact, names)


def forward_side(model: Model | str, x: Tensor) -> Side | str:
    return model if isinstance(model, str) else Side(lambda: (model.forward(x),))


def training_side(model: Model, x: Tensor, grad_out: Tensor, wants_grad_x: bool) -> Side:
    if not wants_grad_x:
        return Side(training_call(model.forward, x, model.parameters, grad_out))
    own = x.clone().requires_grad_()
    return Side(training_call(model.forward, own, [own, *model.parameters], grad_out))


def training_call(forward: Forward, x: Tensor, leaves: list[Tensor], grad_out: Tensor) -> Call:
    """Forward and backward. Gradients are allocated afresh, as after `zero_grad(set_to_none=True)`."""

    def call() -> Results:
        for leaf in leaves:
            leaf.grad = None
        out = forward(x)
        out.backward(grad_out)
        return (out, *(leaf.grad for leaf in leaves))

    return call


def exact_results(
    layers: Sequence[nn.Linear], x: Tensor, grad_out: Tensor, activations: Sequence[Forward] | None = None
) -> Results:
    """out, grad_x, and grad_weight, grad_bias of each layer, in float64. activations: as stack_sides has them."""
    leaves = [x, *(parameter for layer in layers for parameter in (layer.weight, layer.bias))]
    leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out = leaves[0]
    for weight, bias, activation in zip(
        leaves[1::2], leaves[2::2], activations or [torch.relu] * len(layers), strict=True
    ):
        out = activation(out @ weight.T + bias)
    return (out.detach(), *torch.autograd.grad(out, leaves, grad_out.double()))


@torch.no_grad()
def draw_rows(layers: Sequence[nn.Linear], M: int) -> Tensor:
    """`[M, in_features]`, normal numbers, such that no value before a relu is nearly zero.

    There rounding decides whether the gradient passes, and neither decision is wrong: such rows are drawn again.
    """
    K, dtype = layers[0].in_features, layers[0].weight.dtype
    blocks = []
    for start in range(0, M, 4096):  # in blocks, for the float64 copies
        block = torch.randn(min(4096, M - start), K).to(dtype)
        doubtful = rows_near_zero(layers, block).nonzero().flatten()
        while len(doubtful):
            block[doubtful] = torch.randn(len(doubtful), K).to(dtype)
            doubtful = doubtful[rows_near_zero(layers, block[doubtful])]
        blocks.append(block)
    return torch.cat(blocks)


def rows_near_zero(layers: Sequence[nn.Linear], x: Tensor) -> Tensor:
    """Which rows have a value before a relu that is nearer to zero than MARGIN of the sum of its terms' sizes."""
    near = torch.zeros(len(x), dtype=torch.bool)
    out = x.double()
    for layer in layers:
        weight, bias = layer.weight.double(), layer.bias.double()
        preact = out @ weight.T + bias
        near |= (preact.abs() < MARGIN * (out.abs() @ weight.abs().T + bias.abs())).any(1)
        out = torch.relu(preact)
    return near
