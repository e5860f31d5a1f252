"""The operators `torch.ops.fastenc.*`: the only user of `torch.library`.

`M` rows, `K` in features, `N` out features; `x [M, K]`, `weight [N, K]`, `bias [N]`.

- `dense_forward(x, weight, bias?, activation, save) -> (out, preact)`: `out = activation(x @ weight.T + bias)`;
  `preact` is the value before the activation if the derivative needs it and `save`, else empty.
- `dense_backward(grad_out, x, weight, saved, activation, output_mask) -> (grad_x, grad_weight, grad_bias)`: `saved`
  is `preact` if there is one, else `out`; what the mask leaves out is an empty tensor.
- `encoder_forward(x, weights, biases, activations, save) -> results`: the stack. With `save`, the outputs of all
  layers, then the pre-activations of those that need them; without, the last output alone.
- `encoder_backward(grad_out, x, weights, results, activations, output_mask) -> grads`: `output_mask` and `grads` are
  x, then weight and bias of each layer.

The everyday path in `functional.py` calls a backend's functions directly; these operators are what tracing
(`torch.compile`, `torch.export`) and vmap see. They choose their backend when they run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from .activation import ACTIVATIONS, activation_code, activation_codes, get_activation
from .backends import BACKENDS, reference
from .ops import everyday, parts, select

_library = Library("fastenc", "DEF")
_library.define("dense_forward(Tensor x, Tensor weight, Tensor? bias, str activation, bool save) -> (Tensor, Tensor)")
_library.define(
    "dense_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor saved, str activation, bool[3] output_mask) "
    "-> (Tensor, Tensor, Tensor)"
)
_library.define(
    "encoder_forward(Tensor x, Tensor[] weights, Tensor?[] biases, str[] activations, bool save) -> Tensor[]"
)
_library.define(
    "encoder_backward(Tensor grad_out, Tensor x, Tensor[] weights, Tensor[] results, str[] activations, "
    "bool[] output_mask) -> Tensor[]"
)


def _dense_forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save: bool):
    if not save and x.is_cpu and (eager := everyday()):  # chooses in C++, which costs less than choosing here
        return eager.dense.default(x, weight, bias, activation_code(activation)), x.new_empty(0)
    backend = select(x, [weight], [bias], [activation], save) or reference
    return backend.dense_forward(x, weight, bias, activation, save)


def _dense_backward(grad_out, x, weight, saved, activation, output_mask):
    backend = select(x, [weight], [None], [activation], True) or reference
    return backend.dense_backward(grad_out, x, weight, saved, activation, output_mask)


def _encoder_forward(x, weights, biases, activations, save):
    if not save and x.is_cpu and (eager := everyday()):
        return [eager.encoder.default(x, weights, biases, activation_codes(activations))]
    outs, preacts = [], []
    for part in parts(x, weights, save) or [slice(None)]:
        layers = weights[part], biases[part], activations[part]
        backend = select(x, *layers, save) or reference
        results = backend.encoder_forward(x, *layers, save)
        x = results[len(layers[0]) - 1 if save else 0]
        outs += results[: len(layers[0])]
        preacts += results[len(layers[0]) :]
    return outs + preacts if save else outs[-1:]


def _encoder_backward(grad_out, x, weights, results, activations, output_mask):
    depth = len(weights)
    grads = [x.new_empty(0)] * (2 * depth + 1)
    end = len(results)  # of the pre-activations of the layers below
    for part in reversed(parts(x, weights, True) or [slice(0, depth)]):
        first, last = part.start, part.stop
        layers = weights[part], activations[part]
        start = end - sum(get_activation(activation).saves_preact for activation in layers[1])
        below = x if first == 0 else results[first - 1]
        mask = [any(output_mask[: 2 * first + 1]), *output_mask[2 * first + 1 : 2 * last + 1]]
        backend = select(below, layers[0], [None] * (last - first), layers[1], True) or reference
        run = _reference_encoder_backward if backend is reference else backend.encoder_backward
        grad_out, *grads[2 * first + 1 : 2 * last + 1] = run(
            grad_out, below, layers[0], [*results[part], *results[start:end]], layers[1], mask
        )
        end = start
        if not mask[0]:
            return grads
    grads[0] = grad_out
    return grads


def _reference_encoder_backward(grad_out, x, weights, results, activations, output_mask):
    grad_results: list[Tensor | None] = [None] * len(results)
    grad_results[len(weights) - 1] = grad_out
    grads = reference.encoder_backward(grad_results, x, weights, results, activations, output_mask)
    return [x.new_empty(0) if grad is None else grad for grad in grads]


def _dense_forward_fake(x, weight, bias, activation, save):
    out = x.new_empty((x.shape[0], weight.shape[0]))
    needs_preact = save and get_activation(activation).saves_preact
    return out, torch.empty_like(out) if needs_preact else x.new_empty(0)


def _dense_backward_fake(grad_out, x, weight, saved, activation, output_mask):
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return tuple(x.new_empty(shape if wanted else 0) for shape, wanted in zip(shapes, output_mask, strict=True))


def _encoder_forward_fake(x, weights, biases, activations, save):
    outs = [x.new_empty((x.shape[0], weight.shape[0])) for weight in weights]
    preacts = [
        torch.empty_like(out)
        for out, activation in zip(outs, activations, strict=True)
        if get_activation(activation).saves_preact
    ]
    return outs + preacts if save else outs[-1:]


def _encoder_backward_fake(grad_out, x, weights, results, activations, output_mask):
    shapes = [x.shape]
    for weight in weights:
        shapes += [weight.shape, weight.shape[:1]]
    return [x.new_empty(shape if wanted else 0) for shape, wanted in zip(shapes, output_mask, strict=True)]


def _again() -> bool:
    """Whether the backward pass that runs now is to be differentiated again: then by the formulas of `reference`.

    torch.compile cannot differentiate twice, and traces with gradients on.
    """
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _dense_setup(ctx, inputs, output) -> None:
    x, weight, bias, activation, save = inputs
    out, preact = output
    saves_preact = get_activation(activation).saves_preact
    if saves_preact and not save:
        preact = torch.nn.functional.linear(x, weight, bias)
    ctx.set_materialize_grads(False)
    ctx.activation = activation
    ctx.save_for_backward(x, weight, preact if saves_preact else None if activation == "identity" else out)


def _dense_forward_backward(ctx, grad_out, grad_preact):
    x, weight, saved = ctx.saved_tensors
    saved = grad_out if saved is None else saved
    mask = [bool(wanted) for wanted in ctx.needs_input_grad[:3]]
    if not get_activation(ctx.activation).saves_preact:
        grad_preact = None  # of an empty tensor
    if grad_out is None and grad_preact is None:
        return None, None, None, None, None
    if grad_preact is None and not _again():
        grads = torch.ops.fastenc.dense_backward(grad_out, x, weight, saved, ctx.activation, mask)
    else:
        if grad_out is not None:
            from_out = get_activation(ctx.activation).backward(grad_out, saved)
            grad_preact = from_out if grad_preact is None else grad_preact + from_out
        grads = reference.linear_backward(grad_preact, x, weight, mask)
    return *(grad if wanted else None for grad, wanted in zip(grads, mask, strict=True)), None, None


def _encoder_setup(ctx, inputs, output) -> None:
    x, weights, _biases, activations, save = inputs
    ctx.set_materialize_grads(False)
    ctx.save = save
    ctx.activations = activations
    ctx.depth = len(weights)
    ctx.count = len(output)
    ctx.save_for_backward(x, *weights, *output)


def _encoder_forward_backward(ctx, grad_results):
    if not ctx.save:
        raise RuntimeError("fastenc::encoder_forward was called with save=False; its gradient needs save=True")
    x, *rest = ctx.saved_tensors
    weights, results = rest[: ctx.depth], rest[ctx.depth :]
    needs_x, *needs_lists = ctx.needs_input_grad[:3]
    # A list without tensors (no layer has a bias) counts as one input, which needs nothing.
    needs_weights, needs_biases = ([needs] * ctx.depth if isinstance(needs, bool) else needs for needs in needs_lists)
    mask = [bool(needs_x)]
    for needs_weight, needs_bias in zip(needs_weights, needs_biases, strict=True):
        mask += [bool(needs_weight), bool(needs_bias)]
    only_last = all(grad is None for i, grad in enumerate(grad_results) if i != ctx.depth - 1)
    if only_last and grad_results[ctx.depth - 1] is not None and not _again():
        grads = torch.ops.fastenc.encoder_backward(
            grad_results[ctx.depth - 1], x, weights, results, ctx.activations, mask
        )
    else:
        grads = reference.encoder_backward(grad_results, x, weights, results, ctx.activations, mask)
    grads = [grad if wanted else None for grad, wanted in zip(grads, mask, strict=True)]
    of_biases = None if isinstance(needs_lists[1], bool) else grads[2::2]
    return grads[0], grads[1::2], of_biases, None, None


def _dense_forward_vmap(info, in_dims, x, weight, bias, activation, save):
    dims = in_dims[:3]
    if dims[1] is None and dims[2] is None:
        # Only x is batched: more rows of one product.
        x = x.movedim(dims[0], 0)
        rows = x.shape[:2]
        out, preact = torch.ops.fastenc.dense_forward(x.reshape(-1, x.shape[-1]), weight, bias, activation, save)
        out = out.unflatten(0, rows)
        preact = preact.unflatten(0, rows) if preact.dim() > 1 else preact
    else:
        x, weight, bias = (
            t if t is None else t.movedim(dim, 0) if dim is not None else t.expand(info.batch_size, *t.shape)
            for t, dim in zip((x, weight, bias), dims, strict=True)
        )
        out, preact = reference.dense_forward(x, weight, bias, activation, save)
    return (out, preact), (0, 0 if preact.dim() > 1 else None)


for _name, _run, _fake in (
    ("dense_forward", _dense_forward, _dense_forward_fake),
    ("dense_backward", _dense_backward, _dense_backward_fake),
    ("encoder_forward", _encoder_forward, _encoder_forward_fake),
    ("encoder_backward", _encoder_backward, _encoder_backward_fake),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastenc::{_name}", _fake, lib=_library)
torch.library.register_autograd(
    "fastenc::dense_forward", _dense_forward_backward, setup_context=_dense_setup, lib=_library
)
torch.library.register_autograd(
    "fastenc::encoder_forward", _encoder_forward_backward, setup_context=_encoder_setup, lib=_library
)
torch.library.register_vmap("fastenc::dense_forward", _dense_forward_vmap, lib=_library)


@functools.cache
def describe_kernels() -> str | None:
    """Give the CPU's kernels, `torch.ops.fastenc_cpu`, fakes, so that a compiler can call them by themselves.

    They are the operators above, but for activations and masks as numbers. Why there are none, in words, or None.
    """
    if reason := BACKENDS["cpu"].why_unavailable():
        return reason
    names = tuple(ACTIVATIONS)
    fakes: dict[str, Callable[..., Any]] = {
        "dense_forward": lambda x, w, b, code, save: _dense_forward_fake(x, w, b, names[code], save),
        "dense_backward": lambda grad, x, w, saved, code, *mask: _dense_backward_fake(grad, x, w, saved, code, mask),
        "encoder_forward": lambda x, w, b, codes, save: _encoder_forward_fake(x, w, b, [names[c] for c in codes], save),
        "encoder_backward": _encoder_backward_fake,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"fastenc_cpu::{name}", fake)
    return None
