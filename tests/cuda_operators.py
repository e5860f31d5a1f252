"""What the tests of `torch.ops.fastenc_cuda` share: each operator on an `accuracy.Problem`, from guarded memory to
guarded memory; and eager PyTorch with TF32 products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import emulated
import pytest
import torch
from accuracy import Problem
from guards import guarded, guarded_allocations
from torch import Tensor

from fastenc.activation import ACTIVATIONS, activation_code, activation_codes
from fastenc.backends import cuda

if reason := cuda.why_unavailable():  # loads the compiled operators
    pytest.skip(f"there is a GPU, and {reason}", allow_module_level=True)
operators = torch.ops.fastenc_cuda


class Arithmetic(NamedTuple):
    """How products are made."""

    dtype: torch.dtype
    tf32: bool = False

    def __str__(self) -> str:
        return "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")


IEEE, TF32 = Arithmetic(torch.float32), Arithmetic(torch.float32, tf32=True)
ARITHMETICS = (IEEE, TF32, Arithmetic(torch.bfloat16), Arithmetic(torch.float16))


def saved_of(activation: str, out: Tensor, preact: Tensor) -> Tensor:
    """What the derivative reads; for the identity a stand-in that nobody may read."""
    if activation == "identity":
        return out.new_full((), torch.nan).expand_as(out)
    return preact if ACTIVATIONS[activation].saves_preact else out


def dense(problem: Problem, tf32: bool = False, mask: Sequence[bool] = (True, True, True)) -> dict[str, Tensor]:
    """out and the gradients; names as `accuracy.run` has them."""
    (activation,) = problem.activations
    code = activation_code(activation)
    with guarded_allocations(), emulated.guarded_outputs():
        given = problem.map(guarded)
        x, weight, bias = given.x, given.weights[0], given.biases[0]
        out, preact = operators.dense_forward(x, weight, bias, code, True, tf32)
        assert preact.shape == (out.shape if ACTIVATIONS[activation].saves_preact else (0,))
        saved = saved_of(activation, out, preact)
        grads = operators.dense_backward(given.grad_out, x, weight, saved, code, *mask, tf32)
    assert all(grad.numel() == 0 for grad, wanted in zip(grads, mask, strict=True) if not wanted)
    named = dict(zip(("grad_x", "grad_weight0", "grad_bias0"), grads, strict=True))
    if bias is None:
        del named["grad_bias0"]
    return {"out": out.cpu(), **{name: grad.cpu() for name, grad in named.items()}}


def stack(problem: Problem, tf32: bool = False, mask: Sequence[bool] | None = None) -> dict[str, Tensor]:
    """As `dense`, of a narrow stack. What the gradients do not read is left out of what they are given."""
    depth = len(problem.weights)
    mask = [True] * (2 * depth + 1) if mask is None else mask
    mask = [
        wanted and (i == 0 or i % 2 == 1 or problem.biases[i // 2 - 1] is not None) for i, wanted in enumerate(mask)
    ]
    codes = activation_codes(problem.activations)
    with guarded_allocations(), emulated.guarded_outputs():
        given = problem.map(guarded)
        results = operators.encoder_forward(given.x, given.weights, given.biases, codes, True, tf32)
        (alone,) = operators.encoder_forward(given.x, given.weights, given.biases, codes, False, tf32)
        kept = list(results)
        for i, activation in enumerate(problem.activations):
            derives_from_out = activation != "identity" and not ACTIVATIONS[activation].saves_preact
            if not derives_from_out and not (i + 1 < depth and mask[2 * i + 3]):
                kept[i] = results[i].new_empty(0)
        grads = operators.encoder_backward(given.grad_out, given.x, given.weights, kept, codes, mask, tf32)
    torch.testing.assert_close(alone, results[depth - 1], rtol=0, atol=0, equal_nan=True)
    names = ["grad_x", *(f"grad_{kind}{i}" for i in range(depth) for kind in ("weight", "bias"))]
    assert all(grad.numel() == 0 for grad, wanted in zip(grads, mask, strict=True) if not wanted)
    named = {name: grad.cpu() for name, grad, wanted in zip(names, grads, mask, strict=True) if wanted}
    return {"out": results[depth - 1].cpu(), **named}


def to_tf32(x: Tensor) -> Tensor:
    """Rounded to 10 bits of mantissa, halves away from zero; finite numbers."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def eager_tf32(problem: Problem) -> dict[str, Tensor]:
    """What `accuracy.run` gives for eager PyTorch where it may use TF32: the operands of all products are rounded."""
    inputs, outs, preacts = [], [], []
    out = problem.x
    for weight, bias, name in zip(problem.weights, problem.biases, problem.activations, strict=True):
        inputs.append(out)
        preact = to_tf32(out) @ to_tf32(weight).T + (0 if bias is None else bias)
        out = ACTIVATIONS[name].forward(preact)
        preacts.append(preact)
        outs.append(out)
    results = {"out": out}
    grad = problem.grad_out
    for i in reversed(range(len(outs))):
        activation = ACTIVATIONS[problem.activations[i]]
        grad = activation.backward(grad, preacts[i] if activation.saves_preact else outs[i])
        results[f"grad_weight{i}"] = to_tf32(grad).T @ to_tf32(inputs[i])
        if problem.biases[i] is not None:
            results[f"grad_bias{i}"] = grad.sum(0)
        grad = to_tf32(grad) @ to_tf32(problem.weights[i])
    return {**results, "grad_x": grad}
