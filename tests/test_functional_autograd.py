"""The gradients' life: again, twice, changed in place, differentiated once more; forward mode; autocast; hooks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accuracy import Worst, assert_same, draw, eager, fused, run, second_derivatives, small_integers
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import fastenc
from fastenc import fused_dense
from fastenc.activation import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("one_thread")

STACKS = {"dense": (9, 17), "stack": (9, 17, 5)}
in_both = pytest.mark.parametrize("widths", STACKS.values(), ids=STACKS)
for_each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def leaves_of(widths: tuple[int, ...], activation: str, M: int = 12, **options) -> tuple[Tensor, list[Tensor], list]:
    problem = draw(M, widths, activation, **options)
    x, weights, biases = problem.x, list(problem.weights), list(problem.biases)
    return x.requires_grad_(), [w.requires_grad_() for w in weights], [b.requires_grad_() for b in biases]


@for_each_activation
@in_both
def test_backward_twice(path, activation, widths):
    x, weights, biases = leaves_of(widths, activation)
    out = fused(x, weights, biases, [activation] * len(weights))
    leaves = [x, *weights, *biases]
    first = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(out.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(out.sum(), leaves)


def test_gradients_add_up(path):
    x, weights, biases = leaves_of((9, 17), "relu")
    for _ in range(2):
        fused(x, weights, biases, ["relu"]).sum().backward()
    expected = torch.autograd.grad(fused(x, weights, biases, ["relu"]).sum(), weights)
    assert torch.equal(weights[0].grad, 2 * expected[0])


def test_gradients_are_fresh_memory(path):
    """Code changes `.grad` in place, and may hold on to it."""
    x, weights, biases = leaves_of((9, 17), "identity")
    out = fused(x, weights, biases, ["identity"])
    grad_out = torch.ones_like(out)
    grads = torch.autograd.grad(out, [x, *weights, *biases], grad_out)
    storages = {t.untyped_storage().data_ptr() for t in (x, *weights, *biases, out, grad_out, *grads)}
    assert len(storages) == 8


def raises(call: Callable[[], object]) -> bool:
    try:
        call()
    except RuntimeError as error:
        return "modified by an inplace operation" in str(error)
    return False


@pytest.mark.parametrize("changed", ["x", "weight0", "bias0", "weight1", "bias1", "out"])
@pytest.mark.parametrize(
    "wanted", [("x",), ("weight0",), ("bias0",), ("x", "weight0", "bias0"), ("weight1",), ("bias1",)]
)
@for_each_activation
def test_changed_in_place_before_backward(path, activation, wanted, changed):
    """An error where eager raises one, and none where eager does not: what no gradient reads may change."""
    for widths in STACKS.values():
        problem = draw(12, widths, activation)
        if not {changed, *wanted} <= {*problem.leaves(), "out"}:
            continue
        if (activation, changed) == ("leaky_relu", "out"):
            continue  # eager keeps the value before; we differentiate from out, which the next layer keeps anyway

        def backward(forward, problem=problem) -> None:
            leaves = {name: leaf.detach().clone() for name, leaf in problem.leaves().items()}
            for name in wanted:
                leaves[name].requires_grad_()
            depth = len(problem.weights)
            weights, biases = [leaves[f"weight{i}"] for i in range(depth)], [leaves[f"bias{i}"] for i in range(depth)]
            out = forward(leaves["x"], weights, biases, problem.activations)
            with torch.no_grad():
                (out if changed == "out" else leaves[changed]).mul_(2)
            out.sum().backward()

        assert raises(lambda: backward(fused)) == raises(lambda: backward(eager)), widths


@in_both
@for_each_activation
def test_gradcheck_in_float64(activation, widths):
    """The formulas of the autograd Functions, first and second derivatives, against finite differences."""
    x, weights, biases = leaves_of(widths, activation, M=3, dtype=torch.float64)

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return fused(x, parameters[: len(weights)], parameters[len(weights) :], [activation] * len(weights))

    with fastenc.use_backend("reference"):
        assert gradcheck(call, (x, *weights, *biases))
        assert gradgradcheck(call, (x, *weights, *biases))


@for_each_activation
@in_both
def test_second_derivatives(path, activation, widths):
    """Of a scalar of the gradients of x and of the parameters, by every leaf and by grad_out."""
    worst = Worst()
    for seed in range(8):
        problem = draw(40, widths, activation, seed=seed)
        worst.add(*second_derivatives(problem))
    worst.check()


def test_third_derivative(path):
    x, weights, biases = leaves_of((5, 4), "tanh")
    results = []
    for forward in (fused, eager):
        value = forward(x, weights, biases, ["tanh"]).sum()
        for _ in range(3):
            (value,) = (g.sum() for g in torch.autograd.grad(value, [x], create_graph=True))
        results.append(value)
    assert torch.isclose(*results, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # by torch's own formulas
@for_each_activation
def test_forward_mode(path, activation):
    problem = draw(12, (9, 17, 5), activation)
    tangents = problem.map(torch.randn_like)
    results = []
    for forward in (fused, eager):
        with forward_ad.dual_level():
            x = forward_ad.make_dual(problem.x, tangents.x)
            weights = [forward_ad.make_dual(*pair) for pair in zip(problem.weights, tangents.weights, strict=True)]
            out, tangent = forward_ad.unpack_dual(forward(x, weights, problem.biases, problem.activations))
            results.append({"out": out, "tangent": tangent})
    assert_same(*results)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@in_both
def test_autocast(path, widths, given, cast):
    """Integers, so that the values must be the same; float64 is left alone, and so is what it is multiplied with."""
    problem = small_integers(draw(12, widths, "relu", given), 1)
    with torch.autocast("cpu", dtype=cast):
        actual, expected = run(fused, problem), run(eager, problem)
    assert actual["out"].dtype == (torch.float64 if given == torch.float64 else cast)
    assert_same(actual, expected)


@for_each_activation
def test_autocast_rounds_as_pytorch_does(path, activation):
    worst = Worst()
    for seed in range(8):
        problem = draw(64, (16, 17), activation, seed=seed)
        low = problem.map(lambda t: t.bfloat16().float())  # as autocast casts them
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out, expected = (forward(low.x, low.weights, low.biases, low.activations) for forward in (fused, eager))
        assert out.dtype == torch.bfloat16
        exact = run(eager, low.map(Tensor.double))["out"]
        worst.add({"out": out}, {"out": expected}, {"out": exact})
    worst.check()


def test_autocast_mixes_dtypes(path):
    """A bf16 input to fp32 weights is an error without autocast and none with it."""
    x, weight = torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(4, 3)
    with pytest.raises(RuntimeError, match="dtype"):
        fused_dense(x, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused_dense(x, weight).dtype == torch.bfloat16


def test_autocast_under_backward_and_disabled(path):
    x, weights, biases = leaves_of((9, 17), "relu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fused(x, weights, biases, ["relu"])
        with torch.autocast("cpu", enabled=False):
            assert fused(x, weights, biases, ["relu"]).dtype == torch.float32
    out.sum().backward()
    assert x.grad.dtype == weights[0].grad.dtype == biases[0].grad.dtype == torch.float32


@in_both
def test_hooks_on_tensors(path, widths):
    x, weights, biases = leaves_of(widths, "relu")
    seen = []
    for leaf in (x, *weights, *biases):
        leaf.register_hook(lambda grad: seen.append(grad.shape))
    fused(x, weights, biases, ["relu"] * len(weights)).sum().backward()
    assert sorted(seen) == sorted(leaf.shape for leaf in (x, *weights, *biases))


def test_the_same_tensor_twice(path):
    """As x and as weight, and one weight in two layers: their gradients are the sum."""
    problem = small_integers(draw(6, (6, 6), "identity"), 1)
    results = []
    for forward in (fused, eager):
        weight = problem.weights[0].detach().requires_grad_()
        out = forward(weight, [weight, weight], [None, None], ["identity", "relu"])
        results.append({"grad": torch.autograd.grad(out.sum(), weight)[0]})
    assert_same(*results)


def test_one_gradient_of_many(path):
    """autograd.grad for one input leaves the others alone."""
    x, weights, biases = leaves_of((9, 17, 5), "gelu")
    everything = torch.autograd.grad(fused(x, weights, biases, ["gelu"] * 2).sum(), [x, *weights, *biases])
    for leaf, expected in zip([x, *weights, *biases], everything, strict=True):
        (grad,) = torch.autograd.grad(fused(x, weights, biases, ["gelu"] * 2).sum(), [leaf])
        assert torch.equal(grad, expected)
        assert leaf.grad is None
