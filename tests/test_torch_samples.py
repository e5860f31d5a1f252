"""PyTorch's own sample inputs for nn.Linear and F.linear, run against ours. Its private test API stays in this file."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from accuracy import Worst
from torch import nn
from torch.nn import functional as F

import fastenc
from fastenc.activation import ACTIVATIONS

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # hypothesis, which it would like to have
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

pytestmark = pytest.mark.usefixtures("one_thread")

(MODULE,) = (info for info in module_db if info.module_cls is nn.Linear)
(OPERATOR,) = (info for info in op_db if info.name == "nn.functional.linear")
FLOATING = sorted((dtype for dtype in OPERATOR.dtypes if dtype.is_floating_point), key=str)
OTHER = sorted((dtype for dtype in OPERATOR.dtypes if not dtype.is_floating_point), key=str)


def answers(function, *args: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output and the gradients of all that wants one."""
    leaves = [arg.detach().clone().requires_grad_(arg.is_floating_point()) for arg in args]
    out = function(*leaves)
    grads = torch.autograd.grad(out.sum(), leaves)
    return {"out": out.detach(), **{f"grad {i}": grad for i, grad in enumerate(grads)}}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_samples_of_the_operator(dtype, activation):
    act = ACTIVATIONS[activation].forward
    samples = list(OPERATOR.sample_inputs("cpu", dtype, requires_grad=True))
    assert len(samples) >= 12
    worst = Worst()
    for sample in samples:
        args = sample.input, *sample.args, *sample.kwargs.values()
        ours = answers(lambda *a: fastenc.fused_dense(*a, activation=activation), *args)
        eager = answers(lambda *a: act(F.linear(*a)), *args)
        exact = answers(lambda *a: act(F.linear(*a)), *(arg.double() for arg in args))
        assert all(ours[name].dtype == eager[name].dtype for name in eager)
        worst.add(ours, eager, exact)
    worst.check()


@pytest.mark.parametrize("dtype", OTHER, ids=str)
def test_samples_of_dtypes_that_are_not_fused(dtype):
    for sample in OPERATOR.sample_inputs("cpu", dtype):
        ours = fastenc.fused_dense(sample.input, *sample.args, activation="identity")
        assert torch.equal(ours, F.linear(sample.input, *sample.args))


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_samples_of_the_module(dtype, training):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch about its own samples
        samples = MODULE.module_inputs_func(MODULE, "cpu", dtype, requires_grad=True, training=training)
    assert len(samples) >= 3
    for sample in samples:
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        linear = nn.Linear(*args, **kwargs, dtype=dtype)
        dense = fastenc.FusedDense(*args, **kwargs, activation="identity", dtype=dtype)
        dense.load_state_dict(linear.state_dict())
        rows = sample.forward_input.args or (torch.randn(4, args[0], dtype=dtype),)
        exact = copy.deepcopy(linear).double()
        worst = Worst()
        worst.add(answers(dense, *rows), answers(linear, *rows), answers(exact, *(row.double() for row in rows)))
        worst.check()
