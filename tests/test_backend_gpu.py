"""The layers on the GPU backends: emulated and interpreted where there is no GPU. What each kernel does is tested
beside it.
"""

from __future__ import annotations

import importlib.util
import itertools
from dataclasses import replace

if importlib.util.find_spec("triton"):
    import interpreter  # noqa: F401 - first: it decides how Triton runs
import emulated  # noqa: F401 - before the backend is asked for anything
import pytest
import torch
from accuracy import (
    VIEWS,
    Problem,
    Worst,
    assert_as_accurate,
    assert_same,
    draw,
    eager,
    fused,
    run,
    second_derivatives,
    small_integers,
)
from guards import DEVICE
from torch import Tensor
from torch.func import grad, vmap
from torch.library import opcheck

import fastenc
from fastenc.activation import ACTIVATIONS
from fastenc.backends import BACKENDS

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # By opcheck itself, of its own tensors.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

# MIXED: of its layers the first is dense and wide.
DENSE, NARROW, MIXED = (9, 17), (20, 33, 17, 5), (20, 130, 17, 5)
in_each = pytest.mark.parametrize("widths", [DENSE, NARROW, MIXED], ids=["dense", "narrow stack", "mixed stack"])


@pytest.fixture(params=[name for name in ("cuda", "triton") if BACKENDS[name].why_unavailable() is None])
def forced(request):
    with fastenc.use_backend(request.param):
        yield request.param


def problem_of(M: int, widths: tuple[int, ...], *args, **options) -> Problem:
    return draw(M, widths, *args, **options).map(lambda tensor: tensor.to(DEVICE))


def integers(M: int, widths: tuple[int, ...], activation: str = "relu", dtype: torch.dtype = torch.float32) -> Problem:
    return small_integers(draw(M, widths, activation, dtype), 1).map(lambda tensor: tensor.to(DEVICE))


# Values and gradients.


@pytest.mark.parametrize(
    ("widths", "activation"), [*itertools.product((DENSE, NARROW), ACTIVATIONS), (MIXED, "relu"), (MIXED, "gelu")]
)
def test_as_accurate_as_pytorch(forced, activation, widths):
    assert_as_accurate(problem_of(33, widths, activation, seed=seed) for seed in range(8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@in_each
def test_half_types(forced, dtype, widths):
    assert_as_accurate(problem_of(33, widths, "gelu", dtype, seed=seed) for seed in range(8))


@pytest.mark.parametrize("M", [0, 1, 16, 67])
@in_each
def test_integers_are_exact(forced, M, widths):
    problem = integers(M, widths)
    assert_same(run(fused, problem), run(eager, problem))


@pytest.mark.parametrize("widths", [(0, 4), (4, 0), (0, 4, 3), (4, 0, 3), (4, 3, 0), (1, 1), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("M", [0, 3])
def test_empty_and_smallest_layers(forced, M, widths):
    problem = integers(M, widths)
    assert_same(run(fused, problem), run(eager, problem))


def same_in_views(problem: Problem) -> None:
    """Equal to eager; by autograd.grad, as an expanded leaf has no `.grad` of its shape to write to."""
    results = []
    for forward in (fused, eager):
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in problem.leaves().items()}
        weights = [leaves[f"weight{i}"] for i in range(len(problem.weights))]
        biases = [leaves[f"bias{i}"] for i in range(len(problem.weights))]
        out = forward(leaves["x"], weights, biases, problem.activations)
        grads = torch.autograd.grad(out, list(leaves.values()), problem.grad_out)
        results.append({"out": out.detach(), **dict(zip(leaves, grads, strict=True))})
    assert_same(*results)


@pytest.mark.parametrize("view", VIEWS)
@in_each
def test_odd_strides_and_alignments(forced, widths, view):
    if DEVICE == "cuda" and view in ("sliced", "step 2", "one element off alignment"):
        VIEWS_ON_DEVICE = {"one element off alignment": lambda t: t.new_zeros(t.numel() + 1)[1:].view_as(t).copy_(t)}
        change = VIEWS_ON_DEVICE.get(view, lambda t: torch.stack((t, t), -1)[..., 0])
    else:
        change = VIEWS[view]
    problem = integers(19, widths)
    same_in_views(replace(problem, x=change(problem.x)))
    same_in_views(replace(problem, weights=tuple(map(change, problem.weights))))
    same_in_views(replace(problem, grad_out=change(problem.grad_out)))


@in_each
def test_biases_with_strides(forced, widths):
    problem = integers(5, widths)
    same_in_views(replace(problem, biases=tuple(torch.stack((bias, bias), 1)[:, 0] for bias in problem.biases)))


@in_each
def test_gradient_of_a_sum_has_stride_zero(forced, widths):
    problem = integers(33, widths)
    results = []
    for forward in (fused, eager):
        leaves = [leaf.detach().requires_grad_() for leaf in (problem.x, *problem.weights)]
        forward(leaves[0], leaves[1:], problem.biases, problem.activations).sum().backward()
        results.append({str(i): leaf.grad for i, leaf in enumerate(leaves)})
    assert_same(*results)


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (0, 3)], ids=str)
def test_leading_dimensions(forced, leading):
    flat = integers(torch.Size(leading).numel(), NARROW)
    problem = replace(flat, x=flat.x.reshape(*leading, 20), grad_out=flat.grad_out.reshape(*leading, 5))
    assert_same(run(fused, problem), run(eager, problem))


@pytest.mark.parametrize("activation", ["identity", "relu"])
@in_each
def test_every_subset_of_gradients(forced, activation, widths):
    problem = integers(20, widths, activation)
    names = dict.fromkeys(("x", "weight0", "bias0", f"weight{len(widths) - 2}"))
    for wanted in (subset for n in range(4) for subset in itertools.combinations(names, n)):
        assert_same(run(fused, problem, wanted), run(eager, problem, wanted))


@pytest.mark.parametrize("wanted", ["x", "weight0", "bias0"])
@in_each
def test_one_gradient_from_saved_preactivations(forced, widths, wanted):
    assert_as_accurate([problem_of(33, widths, "gelu", seed=seed) for seed in range(8)], wanted=[wanted])


@in_each
def test_without_gradients(forced, widths):
    problem = integers(12, widths)
    args = problem.x, problem.weights, problem.biases, problem.activations
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(fused(*args), eager(*args))


def test_a_lazily_negated_view(forced):
    """Its memory holds the other sign."""
    negated = torch.complex(*torch.randint(-2, 3, (2, 6, 9), device=DEVICE).float()).conj().imag
    assert negated.is_neg()
    x = negated.resolve_neg()
    weight = torch.randint(-2, 3, (4, 9), device=DEVICE).float().requires_grad_()
    assert torch.equal(fastenc.fused_dense(negated, weight), fastenc.fused_dense(x, weight))
    for weights in ([weight], [weight, torch.eye(4, device=DEVICE)]):
        names, biases = ["identity"] * len(weights), [None] * len(weights)
        by_negated, by_itself = (
            torch.autograd.grad(fused(x, weights, biases, names), weight, g)[0] for g in (negated[:, :4], x[:, :4])
        )
        assert torch.equal(by_negated, by_itself)


# What looks on.


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@in_each
def test_second_derivatives(forced, activation, widths):
    worst = Worst()
    for seed in range(4):
        problem = problem_of(20, widths, activation, seed=seed)
        worst.add(*second_derivatives(problem))
    worst.check()


def test_backward_twice(forced):
    problem = problem_of(12, NARROW)
    x = problem.x.requires_grad_()
    out = fused(x, problem.weights, problem.biases, problem.activations)
    first, second = (torch.autograd.grad(out.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@in_each
def test_batched_gradients(forced, widths):
    """A backward pass under vmap, of torch.func or of autograd itself."""
    problem = integers(4, widths)
    weight = problem.weights[0].requires_grad_()
    grads = torch.stack((problem.grad_out, problem.grad_out * 2))
    sides = []
    for forward in (fused, eager):
        out = forward(problem.x, problem.weights, problem.biases, problem.activations)

        def one(grad_out: Tensor, out: Tensor = out) -> Tensor:
            return torch.autograd.grad(out, weight, grad_out, retain_graph=True)[0]

        batched = torch.autograd.grad(out, weight, grads, is_grads_batched=True, retain_graph=True)[0]
        sides.append({"func": vmap(one)(grads), "autograd": batched})
    assert_same(*sides)


@in_each
def test_vmap_and_per_sample_gradients(forced, widths):
    problem = integers(6, widths)

    def forward(row: Tensor, weights: list[Tensor]) -> Tensor:
        return fused(row, weights, problem.biases, problem.activations)

    weights = list(problem.weights)
    args = problem.x, weights, problem.biases, problem.activations
    assert torch.equal(vmap(forward, in_dims=(0, None))(problem.x, weights), eager(*args))

    def loss(weights: list[Tensor], row: Tensor) -> Tensor:
        return forward(row, weights).sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))(weights, problem.x)
    whole = grad(lambda weights: eager(problem.x, weights, problem.biases, problem.activations).sum())(weights)
    for ours, theirs in zip(per_sample, whole, strict=True):
        assert torch.equal(ours.sum(0), theirs)


@in_each
def test_autocast(forced, widths):
    problem = integers(12, widths)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert_same(run(fused, problem), run(eager, problem))


@in_each
def test_compile(forced, widths):
    torch.compiler.reset()
    problem = integers(12, widths)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    assert_same(run(compiled, problem), run(eager, problem))


@pytest.mark.parametrize("widths", [(7, 5, 4, 3), (7, 130, 3)], ids=str)
def test_opcheck(forced, widths):
    activations = ["gelu", "relu", "silu"][: len(widths) - 1]
    problem = problem_of(6, widths, activations)
    x, weights, biases = problem.x, list(problem.weights), list(problem.biases)
    operators = torch.ops.fastenc
    leaves = [tensor.detach().requires_grad_() for tensor in (x, weights[0], biases[0])]
    opcheck(operators.dense_forward.default, (*leaves, "gelu", True))
    out, preact = operators.dense_forward(x, weights[0], biases[0], "gelu", True)
    opcheck(operators.dense_backward.default, (out, x, weights[0], preact, "gelu", [True, False, True]))
    trained = [weight.detach().requires_grad_() for weight in weights]
    opcheck(operators.encoder_forward.default, (x, trained, biases, activations, True))
    results = operators.encoder_forward(x, weights, biases, activations, True)
    mask = [True, *[True, False] * len(weights)]
    last = torch.ones_like(results[len(weights) - 1])
    opcheck(operators.encoder_backward.default, (last, x, weights, results, activations, mask))
