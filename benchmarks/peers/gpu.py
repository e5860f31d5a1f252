"""Peers on a GPU, of this environment where they are importable. None has been run yet: see docs/performance.md.

Each maker takes the layers whose weights its model gets, the rows, and whether gradients will be asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..harness import describe_error, dtype_name
from ..stacks import Forward, Model, ModelMaker

TCNN_WIDTHS = (16, 32, 64, 128)
TCNN_ALIGNMENT = 16  # to which FullyFusedMLP pads its input and its output
GELU = partial(F.gelu, approximate="tanh")


def apex_mlp(layers: Sequence[nn.Linear], x: Tensor, training: bool) -> Model | str:
    """apex.mlp.MLP: all layers in one call, relu after each."""
    from apex.mlp import MLP

    if x.dtype == torch.bfloat16:
        return "apex.mlp takes float32 and float16, and no bfloat16"
    model = MLP(widths_of(layers)).to(x.device, x.dtype)
    return with_weights(model, [*zip(model.weights, model.biases, strict=True)], layers)


def apex_dense(layers: Sequence[nn.Linear], x: Tensor, training: bool) -> Model | str:
    """apex.fused_dense.FusedDense: a product with its bias; relu is PyTorch's."""
    from apex.fused_dense import FusedDense

    return one_by_one([FusedDense(K, N).to(x.device, x.dtype) for K, N in pairwise(widths_of(layers))], layers)


def apex_gelu(layers: Sequence[nn.Linear], x: Tensor, training: bool) -> Model | str:
    """apex.fused_dense.FusedDenseGeluDense: two layers, gelu (by tanh) between them."""
    from apex.fused_dense import FusedDenseGeluDense

    if len(layers) != 2:
        return "apex's FusedDenseGeluDense is two layers"
    model = FusedDenseGeluDense(*widths_of(layers)).to(x.device, x.dtype)
    return with_weights(model, [(model.weight1, model.bias1), (model.weight2, model.bias2)], layers)


def flash_dense(layers: Sequence[nn.Linear], x: Tensor, training: bool) -> Model | str:
    """flash_attn.ops.fused_dense.FusedDense: weight and bias gradients in one product; relu is PyTorch's."""
    from flash_attn.ops.fused_dense import FusedDense

    if x.dtype == torch.float32:
        return "flash-attention fuses in half precision only"
    if not training:
        return "flash-attention's FusedDense is PyTorch's own product, when no gradient is asked for"
    made = [FusedDense(K, N, device=x.device, dtype=x.dtype) for K, N in pairwise(widths_of(layers))]
    return one_by_one(made, layers)


def flash_relu(layers: Sequence[nn.Linear], x: Tensor, training: bool) -> Model | str:
    """flash_attn.ops.fused_dense.FusedMLP: two layers each, relu between them; that after them is PyTorch's."""
    if len(layers) % 2:
        return "flash-attention's FusedMLP is two layers, and here is an odd number"
    if training and any(layer.in_features % 128 for layer in layers[::2]):
        return "flash-attention's FusedMLP with relu fuses in training only what has a multiple of 128 inputs"
    return flash_mlp(layers, x, training, "relu", torch.relu)


def flash_gelu(layers: Sequence[nn.Linear], x: Tensor, training: bool) -> Model | str:
    """flash_attn.ops.fused_dense.FusedMLP: two layers, gelu (by tanh) between them."""
    if len(layers) != 2:
        return "flash-attention's FusedMLP is two layers"
    if training and layers[0].in_features % 8:
        return "flash-attention's FusedMLP with gelu fuses in training only what has a multiple of 8 inputs"
    return flash_mlp(layers, x, training, "gelu_approx", None)


def flash_mlp(
    layers: Sequence[nn.Linear], x: Tensor, training: bool, activation: str, last: Forward | None
) -> Model | str:
    from flash_attn.ops.fused_dense import FusedMLP

    if x.dtype == torch.float32:
        return "flash-attention fuses in half precision only"
    blocks = [
        FusedMLP(
            first.in_features,
            first.out_features,
            second.out_features,
            activation=activation,
            device=x.device,
            dtype=x.dtype,
        )
        for first, second in zip(layers[::2], layers[1::2], strict=True)
    ]
    steps: list[nn.Module | Forward] = [step for block in blocks for step in (block, last) if step is not None]
    theirs = [(layer.weight, layer.bias) for block in blocks for layer in (block.fc1, block.fc2)]
    for block in blocks:
        block.train(training)  # in training it saves what backward needs
    return with_weights(in_turn(steps), theirs, layers)


def transformer_engine(
    layers: Sequence[nn.Linear], x: Tensor, training: bool, activations: Sequence[Forward | None] | None = None
) -> Model | str:
    """transformer_engine.pytorch.Linear, in the dtype of the rows (no FP8); activations (None: relu) are PyTorch's."""
    from transformer_engine.pytorch import Linear

    widths = pairwise(widths_of(layers))
    return one_by_one([Linear(K, N, params_dtype=x.dtype, device=x.device) for K, N in widths], layers, activations)


def tiny_cuda_nn(layers: Sequence[nn.Linear], x: Tensor, training: bool) -> Model | str:
    """tinycudann.Network with a FullyFusedMLP: hidden layers of one width, without biases, in fp16.

    It is given float32 rows, as it asks for, so that casting them is not timed.
    """
    if reason := why_not_tiny_cuda_nn(layers, x, training):
        return reason
    import tinycudann as tcnn

    width, out = layers[0].out_features, layers[-1].out_features
    config = {
        "otype": "FullyFusedMLP",
        "activation": "ReLU",
        "output_activation": "ReLU",
        "n_neurons": width,
        "n_hidden_layers": len(layers) - 1,
    }
    network = tcnn.Network(layers[0].in_features, out, config)
    if hasattr(tcnn, "supports_jit_fusion"):  # from version 2 on
        network.jit_fusion = tcnn.supports_jit_fusion()
    unused = -out % TCNN_ALIGNMENT  # rows of the last weight that make outputs which are cut off
    weights = [layer.weight for layer in layers[:-1]] + [F.pad(layers[-1].weight, (0, 0, 0, unused))]
    with torch.no_grad():
        network.params.copy_(torch.cat([weight.flatten() for weight in weights]))
    rows = x.float()
    return Model(lambda _x: network(rows), [network.params])


def why_not_tiny_cuda_nn(layers: Sequence[nn.Linear], x: Tensor, training: bool) -> str | None:
    if x.dtype == torch.float32:
        return "tiny-cuda-nn's FullyFusedMLP multiplies in float16; it is compared in bfloat16, which is as large"
    hidden = {layer.out_features for layer in layers[:-1]}
    if len(hidden) != 1 or not hidden <= {*TCNN_WIDTHS}:
        return "tiny-cuda-nn's FullyFusedMLP is hidden layers of one width, of 16, 32, 64 or 128"
    if layers[0].in_features % TCNN_ALIGNMENT:
        return f"tiny-cuda-nn's FullyFusedMLP adds inputs where they are no multiple of {TCNN_ALIGNMENT}"
    if training or any(layer.bias.any() for layer in layers):
        return "tiny-cuda-nn has no biases"
    return None


def widths_of(layers: Sequence[nn.Linear]) -> list[int]:
    return [layers[0].in_features, *(layer.out_features for layer in layers)]


def one_by_one(
    made: Sequence[nn.Module], layers: Sequence[nn.Linear], activations: Sequence[Forward | None] | None = None
) -> Model:
    """Layers of a peer, with their weights from `layers`, and after each its activation; None means relu everywhere."""
    after = [torch.relu] * len(layers) if activations is None else activations
    steps = [step for pair in zip(made, after, strict=True) for step in pair if step is not None]
    return with_weights(in_turn(steps), [(layer.weight, layer.bias) for layer in made], layers)


def in_turn(steps: Sequence[Forward]) -> Forward:
    def forward(x: Tensor) -> Tensor:
        for step in steps:
            x = step(x)
        return x

    return forward


@torch.no_grad()
def with_weights(forward: Forward, theirs: Sequence[tuple[Tensor, Tensor]], layers: Sequence[nn.Linear]) -> Model:
    """A Model of these parameters, a weight and a bias for each of `layers`, whose values they are given."""
    for (weight, bias), layer in zip(theirs, layers, strict=True):
        weight.copy_(layer.weight)
        bias.copy_(layer.bias)
    return Model(forward, [parameter for pair in theirs for parameter in pair])


def attempt(layers: Sequence[nn.Linear], x: Tensor, training: bool, *, make: ModelMaker) -> Model | str:
    """What `make` makes; where the peer cannot be imported or made, a sentence that says so.

    A peer must not take the others along: on import some of them look for a GPU or for an extension of their own.
    """
    try:
        return make(layers, x, training)
    except ImportError as error:
        return f"it is not importable here: {error}"
    except Exception as error:
        return f"it cannot be made here, in {dtype_name(x.dtype)}: {describe_error(error)}"


def attempts(makers: Mapping[str, ModelMaker]) -> dict[str, ModelMaker]:
    return {name: partial(attempt, make=make) for name, make in makers.items()}


# After each layer a relu.
RELU = attempts(
    {
        "apex.mlp": apex_mlp,
        "apex.fused_dense, relu": apex_dense,
        "flash-attention's FusedDense, relu": flash_dense,
        "flash-attention's FusedMLP": flash_relu,
        "Transformer Engine's Linear, relu": transformer_engine,
        "tiny-cuda-nn's FullyFusedMLP": tiny_cuda_nn,
    }
)
# Two layers, gelu between them.
GELU_BLOCK = attempts(
    {
        "apex's FusedDenseGeluDense": apex_gelu,
        "flash-attention's FusedMLP, gelu": flash_gelu,
        "Transformer Engine's Linear, gelu": partial(transformer_engine, activations=(GELU, None)),
    }
)
