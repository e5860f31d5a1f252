"""All backends that are usable here, on the same inputs: each as accurate as eager PyTorch, and so as each other."""

from __future__ import annotations

import importlib.util
import itertools

if importlib.util.find_spec("triton"):
    import interpreter  # noqa: F401 - first: it decides how Triton runs
import emulated  # noqa: F401 - before the backend is asked for anything
import pytest
import torch
from accuracy import DTYPES, Worst, assert_same, draw, eager, fused, run, small_integers
from guards import DEVICE
from torch import Tensor

import fastenc
from fastenc import ops
from fastenc.activation import ACTIVATIONS
from fastenc.backends import BACKENDS

pytestmark = pytest.mark.usefixtures("one_thread")

USABLE = [name for name, backend in BACKENDS.items() if backend.why_unavailable() is None]
LAYERS = {"dense": (33, (20, 24)), "wide dense": (20, (24, 140)), "stack": (33, (20, 33, 17, 5))}


def by_each_backend(problem) -> dict[str, dict[str, Tensor]]:
    """out and gradients, by the backend's name."""
    results = {}
    for name in USABLE:
        device = DEVICE if BACKENDS[name].DEVICE == "cuda" else "cpu"
        with fastenc.use_backend(name), ops.record() as decisions:
            found = run(fused, problem.map(lambda tensor, device=device: tensor.to(device)))
        assert {decision.backend for decision in decisions} == {name}
        results[name] = {key: value.cpu() for key, value in found.items()}
    return results


def test_the_cuda_backend_is_among_them():
    assert {"cpu", "cuda", "reference"} <= set(USABLE) or DEVICE == "cuda"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("layers", "activation"), [*itertools.product(LAYERS, ("relu", "gelu")), ("stack", "tanh")])
def test_by_the_error_rule(layers, activation, dtype):
    worst = {name: Worst() for name in USABLE}
    for seed in range(6):
        problem = draw(*LAYERS[layers], activation, dtype, seed=seed)
        expected, exact = run(eager, problem), run(eager, problem.map(Tensor.double))
        for name, found in by_each_backend(problem).items():
            worst[name].add(found, expected, exact)
    for errors in worst.values():
        errors.check()


@pytest.mark.parametrize("layers", LAYERS)
def test_the_same_integers(layers):
    for activation in ("identity", "relu"):
        problem = small_integers(draw(*LAYERS[layers], activation), highest=1)
        expected = run(eager, problem)
        for found in by_each_backend(problem).values():
            assert_same(found, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_same_nans(activation):
    problem = small_integers(draw(20, (9, 7, 5), activation))
    problem.x[3, 2], problem.grad_out[5, 1] = torch.nan, torch.nan
    for name, found in by_each_backend(problem).items():
        for key, value in run(eager, problem).items():
            assert torch.equal(found[key].isnan(), value.isnan()), (name, key)
