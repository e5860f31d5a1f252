"""fused_dense() and encoder(): the layers as functions, with their gradients.

The everyday path on the CPU is one call of an operator with its autograd in C++ (csrc/eager.cpp). Where that is not
built for this torch, and on GPUs, it is an old-style `autograd.Function` (one with `setup_context` takes
four times as long a call). Under tracing and vmap the same layers go through `torch.ops.fastenc`; the other transforms
of `torch.func` and forward-mode differentiation see plain ATen.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from . import operators as _registered  # noqa: F401 - torch.ops.fastenc
from . import ops
from .activation import activation_code, activation_codes, get_activation
from .backends import cpu, reference


class FusedDenseFunction(torch.autograd.Function):
    """out, preact = apply(x, weight, bias, activation, backend); x is [M, K]. See `fastenc::dense_forward`."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, backend: ModuleType):
        out, preact = backend.dense_forward(x, weight, bias, activation, True)
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        saved = None if activation == "identity" else preact if get_activation(activation).saves_preact else out
        # Only what the gradients read, so that the rest may change or be freed, as with nn.Linear.
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None, saved)
        ctx.set_materialize_grads(False)
        ctx.shape = x.shape[1]
        ctx.activation = activation
        ctx.backend = backend
        return out, preact

    @staticmethod
    def backward(ctx, grad_out: Tensor | None, grad_preact: Tensor | None):
        x, weight, saved = ctx.saved_tensors
        mask = ctx.needs_input_grad[:3]
        if grad_out is None and grad_preact is None:
            return None, None, None, None, None
        if grad_out is None or grad_preact is not None or _by_formulas(grad_out):
            # By formulas in ATen.
            grad = grad_preact
            if grad_out is not None:
                from_out = grad_out if saved is None else get_activation(ctx.activation).backward(grad_out, saved)
                grad = from_out if grad_preact is None else grad_preact + from_out
            grads = reference.linear_backward(cast(Tensor, grad), x, weight, mask)
        else:
            # A stand-in has the shape; what it stands for is not read.
            x = grad_out.new_empty(()).expand(grad_out.shape[0], ctx.shape) if x is None else x
            weight = grad_out.new_empty(()).expand(grad_out.shape[1], ctx.shape) if weight is None else weight
            saved = grad_out if saved is None else saved
            grads = ctx.backend.dense_backward(grad_out, x, weight, saved, ctx.activation, mask)
        return *(grad if wanted else None for grad, wanted in zip(grads, mask, strict=True)), None, None


class EncoderFunction(torch.autograd.Function):
    """results = apply(activations, backend, x, *weights, *biases); x is [M, K]. See `fastenc::encoder_forward`.

    Hidden outputs and pre-activations are results too, so that a second derivative finds them in the graph.
    """

    @staticmethod
    def forward(ctx, activations: Sequence[str], backend: ModuleType, x: Tensor, *parameters: Any):
        depth = len(activations)
        weights, biases = parameters[:depth], parameters[depth:]
        results = backend.encoder_forward(x, weights, biases, activations, True)
        needs_x, needs = ctx.needs_input_grad[2], ctx.needs_input_grad[3:]
        outs = list(results)
        ctx.mask = [needs_x]
        for needs_weight, needs_bias in zip(needs[:depth], needs[depth:], strict=True):
            ctx.mask += [needs_weight, needs_bias]
        # The gradients read x only for the first weight's, the first weight only for x's, and an output only for its
        # derivative or the next weight's gradient.
        for i, activation in enumerate(activations):
            in_derivative = activation != "identity" and not get_activation(activation).saves_preact
            if not (in_derivative or (i + 1 < depth and needs[i + 1])):
                outs[i] = None
        ctx.save_for_backward(x if needs[0] else None, weights[0] if needs_x else None, *weights[1:], *outs)
        ctx.set_materialize_grads(False)
        ctx.shapes = x.shape, weights[0].shape
        ctx.activations = activations
        ctx.backend = backend
        return tuple(results)

    @staticmethod
    def backward(ctx, *grad_results: Tensor | None):
        depth = len(ctx.activations)
        x, *rest = ctx.saved_tensors
        weights, results = rest[:depth], rest[depth:]
        grad_out = grad_results[depth - 1]
        given = next((grad for grad in grad_results if grad is not None), None)
        if given is None:
            return (None,) * (3 + 2 * depth)
        # A stand-in has the shape; what it stands for is not read.
        x = given.new_empty(()).expand(ctx.shapes[0]) if x is None else x
        weights[0] = given.new_empty(()).expand(ctx.shapes[1]) if weights[0] is None else weights[0]
        results = [given.new_empty(0) if result is None else result for result in results]
        only_last = grad_out is not None and all(grad is None for i, grad in enumerate(grad_results) if i != depth - 1)
        if only_last and not _by_formulas(given) and ctx.backend is not reference:
            grads = ctx.backend.encoder_backward(grad_out, x, weights, results, ctx.activations, ctx.mask)
        else:
            grads = reference.encoder_backward(grad_results, x, weights, results, ctx.activations, ctx.mask)
        grads = [grad if wanted else None for grad, wanted in zip(grads, ctx.mask, strict=True)]
        return None, None, grads[0], *grads[1::2], *grads[2::2]


class RecomputingEncoderFunction(torch.autograd.Function):
    """out = apply(activations, dropouts, seed, backend, x, *weights, *biases); x is [M, K].

    As EncoderFunction, for a backend with `encoder_train`: it keeps less than all hidden outputs, and may drop some of
    their values (`dropouts`, from `seed`, int64 [1]). A second derivative recomputes the stack in ATen.
    """

    @staticmethod
    def forward(ctx, activations, dropouts, seed: Tensor | None, backend: ModuleType, x: Tensor, *parameters: Any):
        depth = len(activations)
        results = backend.encoder_train(x, parameters[:depth], parameters[depth:], activations, dropouts, seed)
        needs = ctx.needs_input_grad[4:]
        ctx.mask = [needs[0], *(n for both in zip(needs[1 : depth + 1], needs[depth + 1 :], strict=True) for n in both)]
        ctx.save_for_backward(x, seed, *parameters, *results)
        ctx.set_materialize_grads(False)
        ctx.activations = activations
        ctx.dropouts = dropouts
        ctx.backend = backend
        return results[depth - 1]

    @staticmethod
    def backward(ctx, grad_out: Tensor | None):
        depth = len(ctx.activations)
        if grad_out is None:
            return (None,) * (5 + 2 * depth)
        x, seed, *rest = ctx.saved_tensors
        weights, biases, results = rest[:depth], rest[depth : 2 * depth], rest[2 * depth :]
        if _by_formulas(grad_out):
            grads = _gradients_by_formulas(grad_out, x, weights, biases, ctx.activations, ctx.dropouts, seed, ctx.mask)
        else:
            grads = ctx.backend.encoder_train_backward(
                grad_out, x, weights, biases, results, ctx.activations, ctx.mask, ctx.dropouts, seed
            )
        grads = [grad if wanted else None for grad, wanted in zip(grads, ctx.mask, strict=True)]
        return None, None, None, None, grads[0], *grads[1::2], *grads[2::2]


def _gradients_by_formulas(grad_out, x, weights, biases, activations, dropouts, seed, mask) -> list[Tensor | None]:
    inputs = [x, *(parameter for both in zip(weights, biases, strict=True) for parameter in both)]
    with torch.enable_grad():
        out = x
        for i, (weight, bias, activation) in enumerate(zip(weights, biases, activations, strict=True)):
            out = get_activation(activation).forward(F.linear(out, weight, bias))
            if dropouts[i] > 0:
                out = out * reference.dropout_scale(seed, i, len(out), out.shape[1], dropouts[i]).to(out.dtype)
    wanted = [tensor for tensor, needs in zip(inputs, mask, strict=True) if needs]
    found = iter(torch.autograd.grad(out, wanted, grad_out, create_graph=torch.is_grad_enabled()))
    return [next(found) if needs else None for needs in mask]


def fused_dense(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "relu") -> Tensor:
    """`activation(x @ weight.T + bias)` in one kernel, with its gradient.

    Args:
        x: `[..., K]`, any leading dimensions and strides.
        weight: `[N, K]`.
        bias: `[N]` or None.
        activation: a name of `fastenc.activation.ACTIVATIONS`.

    Returns:
        `[..., N]`, in the dtype of x (under autocast, in autocast's). fp32, bf16 and fp16 are fused; any other dtype,
        and any device without a backend, runs as eager PyTorch, with PyTorch's own errors.

    Raises:
        ValueError: the activation is unknown.
        RuntimeError: as `torch.nn.functional.linear`, where shapes, dtypes or devices do not match.
    """
    act = get_activation(activation)
    traced = _traced_by()
    if traced is None and not x.is_cuda and (operators := ops.everyday()):
        # What C++ would leave to ATen is left to it here: each call through the dispatcher takes some us.
        training = torch.is_grad_enabled() and (
            x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        )
        if cpu.leaves(x, weight, training, in_stack=False) and not torch.is_autocast_enabled("cpu"):
            z = F.linear(x, weight, bias)
            return act.forward(z) if training else act.forward_(z)
        try:
            return operators.dense.default(x, weight, bias, activation_code(activation))
        except NotImplementedError:  # of a tensor that takes part in F.linear alone, as quantised weights do
            pass
    if traced == "operators" and _fits(x, weight, bias):
        x, weight, bias = _autocast(x, weight, bias)
        rows = x if x.dim() == 2 else x.reshape(-1, weight.shape[1])
        out, _ = torch.ops.fastenc.dense_forward(rows, weight, bias, activation, torch.is_grad_enabled())
        return out if x.dim() == 2 else out.reshape(*x.shape[:-1], weight.shape[0])
    if _autocasts(x.device.type):
        x, weight, bias = _autocast(x, weight, bias)
    rows = x if x.dim() == 2 else _rows(x)
    training = torch.is_grad_enabled() and (
        rows.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    backend = None if traced else ops.select(rows, (weight,), (bias,), (activation,), training)
    if backend is None:
        return act.forward(F.linear(x, weight, bias))
    if training:
        out, _ = FusedDenseFunction.apply(rows, weight, bias, activation, backend)
    else:
        out, _ = backend.dense_forward(rows, weight, bias, activation, False)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], weight.shape[0])


def encoder(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[str],
    dropouts: Sequence[float] | None = None,
) -> Tensor:
    """`fused_dense` after `fused_dense`, in one kernel for the whole stack, with its gradient.

    Args:
        x: `[..., K]`.
        weights: of each layer, `[N_i, N_(i-1)]`, with `N_(-1) = K`.
        biases: of each layer, `[N_i]` or None.
        activations: of each layer, a name.
        dropouts: of each layer's output, the probability with which a value is dropped; None for no dropout. It is
            part of Triton's kernels, with random numbers of their own, seeded by PyTorch's generator of the device; on
            other backends the layers run one by one, with PyTorch's dropout between them.

    Returns:
        `[..., N_last]`.

    Raises:
        ValueError: an activation is unknown, or the lists differ in length.
        RuntimeError: as `torch.nn.functional.linear`, where shapes, dtypes or devices do not match.
    """
    if not len(weights) == len(biases) == len(activations) > 0:
        raise ValueError(
            f"a stack needs as many weights as biases and activations, at least one; "
            f"got {len(weights)}, {len(biases)} and {len(activations)}"
        )
    if dropouts is not None and len(dropouts) != len(weights):
        raise ValueError(f"a stack of {len(weights)} layers needs as many dropouts, not {len(dropouts)}")
    drops = dropouts is not None and any(dropouts)
    dropouts = dropouts if dropouts is not None else (0.0,) * len(weights)
    traced = _traced_by()
    if traced is None and not drops and not x.is_cuda and (operators := ops.everyday()):
        try:
            return operators.encoder.default(x, weights, biases, activation_codes(activations))
        except NotImplementedError:  # as in fused_dense
            pass
    if (
        traced is None
        and x.dim() > 0
        and (cut := ops.parts(x, weights, _first_with_gradient(x, weights, biases) < len(weights)))
    ):
        for part in cut:
            x = encoder(x, weights[part], biases[part], activations[part], dropouts[part])
        return x
    if (
        (len(weights) == 1 and not drops)
        or (traced and drops)
        or x.dim() == 0
        or (traced and not (torch.compiler.is_compiling() and _all_fit(x, weights, biases)))
    ):
        return _layer_by_layer(x, weights, biases, activations, dropouts)
    if traced:
        x, *parameters = _autocast(x, *weights, *biases)
        weights, biases = parameters[: len(weights)], parameters[len(weights) :]
        save = torch.is_grad_enabled()
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        out = torch.ops.fastenc.encoder_forward(rows, weights, biases, list(activations), save)
        out = out[len(weights) - 1 if save else 0]
        return out if x.dim() == 2 else out.reshape(*x.shape[:-1], weights[-1].shape[0])
    if _autocasts(x.device.type):
        x, *parameters = _autocast(x, *weights, *biases)
        weights, biases = parameters[: len(weights)], parameters[len(weights) :]
    rows = x if x.dim() == 2 else _rows(x)
    for activation in activations:
        get_activation(activation)
    first = _first_with_gradient(x, weights, biases)
    backend = ops.select(rows, weights, biases, activations, first < len(weights), drops)
    if backend is None:
        return _layer_by_layer(x, weights, biases, activations, dropouts)
    out = _run_stack(rows, weights, biases, activations, dropouts, backend, first)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], weights[-1].shape[0])


def _first_with_gradient(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> int:
    """The first layer that has a gradient; what lies below needs none, and saves nothing. Their number if none has."""
    if not torch.is_grad_enabled():
        return len(weights)
    if x.requires_grad:
        return 0
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            return i
    return len(weights)


def _run_stack(x, weights, biases, activations, dropouts, backend: ModuleType, first: int) -> Tensor:
    recomputes = hasattr(backend, "encoder_train")
    drops = any(dropouts)
    if first > 0:
        with torch.no_grad():
            below = weights[:first], biases[:first], activations[:first]
            if drops:
                x = backend.encoder_train(x, *below, tuple(dropouts[:first]), _new_seed(x.device))[first - 1]
            else:
                x = backend.encoder_forward(x, *below, False)[0]
        if first == len(weights):
            return x
        weights, biases, activations, dropouts = weights[first:], biases[first:], activations[first:], dropouts[first:]
    # To recompute, x is kept; where no gradient is made of it, it should be free to change, as after nn.Linear.
    if drops or (recomputes and weights[0].requires_grad):
        seed = _new_seed(x.device) if drops else None
        return RecomputingEncoderFunction.apply(
            tuple(activations), tuple(dropouts), seed, backend, x, *weights, *biases
        )
    return EncoderFunction.apply(tuple(activations), backend, x, *weights, *biases)[len(weights) - 1]


def _new_seed(device: torch.device) -> Tensor:
    """A seed for the kernels' dropout, int64 [1], drawn on the device: in a CUDA graph each replay draws another."""
    return torch.randint(1 << 62, (1,), dtype=torch.int64, device=device)


def _layer_by_layer(x, weights, biases, activations, dropouts) -> Tensor:
    for weight, bias, activation, p in zip(weights, biases, activations, dropouts, strict=True):
        x = fused_dense(x, weight, bias, activation)
        if p > 0:
            x = F.dropout(x, p)
    return x


def _traced_by() -> str | None:
    """How to be seen by what looks on: as "operators" of ours, as "aten", or None if nobody does."""
    if torch.compiler.is_compiling():
        return "operators"
    if torch._C._are_functorch_transforms_active():
        functorch = torch._C._functorch
        layers = functorch.get_interpreter_stack() or ()
        only_vmap = all(functorch.CInterpreter.key(layer) == functorch.TransformType.Vmap for layer in layers)
        return "operators" if only_vmap else "aten"
    return "aten" if forward_ad._current_level >= 0 else None


def _by_formulas(grad: Tensor) -> bool:
    """Whether a backward pass is to be differentiated again, or is of a batch of gradients: ATen's formulas run it."""
    return (
        torch.is_grad_enabled()
        or torch._C._are_functorch_transforms_active()
        or torch._C._functorch.is_legacy_batchedtensor(grad)  # autograd.grad(..., is_grads_batched=True)
    )


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the operators take these shapes; eager PyTorch takes more, and raises the errors that users know."""
    return (
        x.dim() > 0
        and weight.dim() == 2
        and x.shape[-1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
        and x.is_floating_point()
    )


def _all_fit(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> bool:
    return _fits(x, weights[0], biases[0]) and all(
        weight.dim() == 2 and weight.shape[1] == below.shape[0] and (bias is None or bias.shape == weight.shape[:1])
        for below, weight, bias in zip(weights, weights[1:], biases[1:], strict=False)
    )


def _autocasts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _autocast(x: Tensor, *parameters: Tensor | None) -> list[Any]:
    """Cast to autocast's dtype what F.linear would: floating-point tensors, but for fp64."""
    device = x.device.type
    if not _autocasts(device):
        return [x, *parameters]
    dtype = torch.get_autocast_dtype(device)
    return [
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in (x, *parameters)
    ]


def _rows(x: Tensor) -> Tensor:
    """x as [M, K]; left alone if it has no last dimension."""
    if x.dim() == 0:
        return x
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])
