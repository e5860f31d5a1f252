"""The CPU kernels, in every build that this CPU can run: values, gradients, odd shapes, special values, memory."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from accuracy import (
    DTYPES,
    VIEWS,
    Problem,
    Worst,
    assert_as_accurate,
    assert_same,
    draw,
    eager,
    fused,
    inside_nan,
    leave_nan_in_free_memory,
    run,
    small_integers,
)

from fastenc.activation import ACTIVATIONS
from fastenc.backends import cpu

pytestmark = pytest.mark.usefixtures("one_thread", "build")

# Around what the kernels cut at: 16 lanes, panels of 64, blocks of 16, 32 and 64 rows, 2 rows or 48 M <= K for dot
# products, 96 rows for packing, chunks of 2,048 rows.
SHAPES = [
    (1, 1, 1),
    (1, 67, 300),
    (2, 16, 16),
    (3, 5, 7),
    (3, 70, 145),
    (5, 33, 300),
    (16, 64, 64),
    (17, 65, 33),
    (67, 129, 65),
    (96, 16, 17),
    (97, 31, 128),
    (130, 70, 31),
    (513, 67, 45),
    (2050, 20, 33),
]
STACKS = [
    (1, (20, 33, 17, 5)),
    (7, (300, 65, 16)),
    (33, (5, 1, 70, 3)),
    (130, (64, 32, 16, 17)),
    (600, (17, 40, 20)),
    (2049, (9, 16, 17)),
]
ODD_SIZES = (1, 2, 3, 16, 17, 33, 64, 65, 129)


def draws(M: int, widths: tuple[int, ...], *args, **options):
    """Several problems, so that no tensor's largest error is that of a lucky rounding."""
    count = 32 if 0 < min(widths[1:]) < 16 else 8
    return [draw(M, widths, *args, **options, seed=seed) for seed in range(count)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dense_is_as_accurate_as_pytorch(activation, dtype):
    for M, N, K in SHAPES:
        assert_as_accurate(draws(M, (K, N), activation, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name not in ("relu", "leaky_relu")])
def test_stack_is_as_accurate_as_pytorch(activation, dtype):
    for M, widths in STACKS:
        assert_as_accurate(draws(M, widths, activation, dtype))


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_kinked_stack_is_as_accurate_as_pytorch(activation):
    for M, widths in STACKS:
        assert_as_accurate(draws(M, widths, activation))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_small_kinked_stack_is_as_accurate_as_pytorch(activation, dtype):
    assert_as_accurate(draw(200, (6, 5, 3), activation, dtype, seed=seed) for seed in range(8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stack_of_every_activation(dtype):
    """Three in a row, so that each stands below, between and above others; the kinked ones at the bottom, where their
    sums are those of the inputs."""
    smooth = [name for name in ACTIVATIONS if name not in ("relu", "leaky_relu")]
    for kinked, (lower, upper) in itertools.product(["relu", "leaky_relu"], itertools.pairwise(smooth)):
        problems = [draw(70, (20, 33, 17, 5), (kinked, lower, upper), dtype, seed=seed) for seed in range(8)]
        assert_as_accurate(problems)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large(dtype):
    assert_as_accurate([draw(300, (784, 1024), "tanh", dtype), draw(1, (784, 1024), "tanh", dtype)])


@pytest.mark.parametrize("M", [1, 2, 3, 16, 17, 65, 97, 129])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integers_are_exact_in_odd_shapes(dtype, M):
    """Every element of every result, with NaN around every input."""
    for N, K in itertools.product(ODD_SIZES, ODD_SIZES):
        problem = small_integers(draw(M, (K, N), "relu" if (N + K) % 2 else "identity", dtype), 1)
        problem = problem.map(inside_nan)
        assert_same(run(fused, problem), run(eager, problem))


@pytest.mark.parametrize(("M", "widths"), STACKS)
def test_integers_are_exact_in_stacks(M, widths):
    problem = small_integers(draw(M, widths), 1).map(inside_nan)
    assert_same(run(fused, problem), run(eager, problem))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_unwritten_is_read(dtype):
    for activation in ACTIVATIONS:
        problems = [draw(M, widths, activation, dtype) for M, widths in [(1, (33, 5)), (3, (145, 17)), *STACKS]]
        expected = [run(fused, problem) for problem in problems]
        leave_nan_in_free_memory()
        for problem, same in zip(problems, expected, strict=True):
            assert_same(run(fused, problem), same)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_mask_of_gradients(activation):
    """What is asked for does not depend on what else is; and what is not asked for is empty."""
    problem = draw(70, (33, 17), activation)
    x, weight, bias = problem.x, problem.weights[0], problem.biases[0]
    out, preact = cpu.dense_forward(x, weight, bias, activation, True)
    saved = preact if ACTIVATIONS[activation].saves_preact else out
    everything = cpu.dense_backward(problem.grad_out, x, weight, saved, activation, (True, True, True))
    for mask in itertools.product([False, True], repeat=3):
        grads = cpu.dense_backward(problem.grad_out, x, weight, saved, activation, mask)
        for grad, full, wanted in zip(grads, everything, mask, strict=True):
            assert torch.equal(grad, full if wanted else torch.empty(0))


def test_every_mask_of_a_stack():
    problem = draw(70, (33, 17, 9), ("gelu", "tanh"))
    results = cpu.encoder_forward(problem.x, problem.weights, problem.biases, problem.activations, True)
    args = problem.grad_out, problem.x, problem.weights, results, problem.activations
    everything = cpu.encoder_backward(*args, [True] * 5)
    for mask in itertools.product([False, True], repeat=5):
        for grad, full, wanted in zip(cpu.encoder_backward(*args, mask), everything, mask, strict=True):
            assert torch.equal(grad, full if wanted else torch.empty(0))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_inference_gives_the_bits_of_training(activation):
    for M, widths in [(1, (33, 5)), (3, (145, 17)), *STACKS]:
        problem = draw(M, widths, activation)
        args = problem.x, problem.weights, problem.biases, problem.activations
        assert torch.equal(fused(*args), run(fused, problem)["out"])


SPECIAL = [0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1.0, -1.0, 3.5, -3.5, 20.0, -20.0, 100.0, -100.0]


def extremes(dtype: torch.dtype) -> list[float]:
    info = torch.finfo(dtype)
    magnitudes = [info.max, info.smallest_normal, info.eps]
    if dtype != torch.bfloat16:  # processors' own bf16 products take denormals for zeros; eager's, for large shapes
        magnitudes.append(info.smallest_normal / 4)
    return [sign * magnitude for magnitude in magnitudes for sign in (1.0, -1.0)]


@pytest.mark.parametrize("grad_out", [1.0, -0.0, torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_special_values(activation, dtype, grad_out):
    """NaN, infinities, zeros, denormals, huge values before the activation: as eager PyTorch, out and gradient."""
    x = torch.tensor(SPECIAL + extremes(dtype)).to(dtype).unsqueeze(1)
    one = torch.ones(1, 1, dtype=dtype)
    problem = Problem(x, (one,), (None,), (activation,), torch.full_like(x, grad_out))
    actual, expected = run(fused, problem, ["x"]), run(eager, problem, ["x"])
    exact = run(eager, problem.map(torch.Tensor.double), ["x"])
    assert_not_finite_alike(actual, expected, exact)
    usual = torch.tensor([abs(value) <= 100 for value in x.flatten().tolist()])
    sides = (
        {name: value[usual].nan_to_num(1, 1, 1) for name, value in side.items()} for side in (actual, expected, exact)
    )
    worst = Worst()
    worst.add(*sides)
    worst.check()
    if activation in ("identity", "relu", "leaky_relu"):  # no sum, one multiplication at most: no room for a difference
        assert_same(actual, expected)


@pytest.mark.parametrize("activation", ["relu", "identity", "gelu"])
def test_nan_and_infinity_stay_in_their_rows_and_columns(activation):
    """As in eager PyTorch, whatever else is in the tile."""
    for M, N, K in SHAPES:
        for value in (torch.nan, torch.inf, -torch.inf):
            problem = draw(M, (K, N), activation)
            problem.x[-1, -1] = value
            problem.weights[0][0, 0] = value
            problem.grad_out[0, -1] = value
            exact = run(eager, problem.map(torch.Tensor.double))
            assert_not_finite_alike(run(fused, problem), run(eager, problem), exact)


def assert_not_finite_alike(actual, expected, exact) -> None:
    """NaN and infinities where eager PyTorch has them.

    Or where its float64 has, where the two differ: gelu(inf) is inf in one element and in float64, NaN in a vector.
    """
    for name in actual:
        for test in (torch.isnan, torch.isinf):
            found = test(actual[name])
            assert ((found == test(expected[name])) | (found == test(exact[name]))).all(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_any_strides(view, dtype):
    """Of x, weight and grad_out; of a vector, the bias, a step."""
    change = VIEWS[view]
    for M, N, K in [(2, 3, 5), (3, 17, 200), (33, 65, 17), (130, 16, 66)]:
        problem = small_integers(draw(M, (K, N), "identity", dtype), 1)
        step_2 = torch.stack((problem.biases[0], problem.biases[0]), 1)[:, 0]
        for changed in (
            replace(problem, x=change(problem.x)),
            replace(problem, weights=(change(problem.weights[0]),)),
            replace(problem, grad_out=change(problem.grad_out)),
            replace(problem, biases=(step_2,)),
            problem.map(lambda t: change(t) if t.dim() == 2 else t),
        ):
            assert_same(run_on_views(fused, changed), run_on_views(eager, changed))


def run_on_views(forward, problem: Problem) -> dict[str, torch.Tensor]:
    """As `run`, but by autograd.grad: an expanded leaf has no `.grad` of its shape to write to."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in problem.leaves().items()}
    out = forward(leaves["x"], [leaves["weight0"]], [leaves["bias0"]], problem.activations)
    return {
        "out": out.detach(),
        **dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), problem.grad_out), strict=True)),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_empty(activation, dtype):
    """M, N or K of zero: shapes as PyTorch's, and the gradients of what is summed over nothing are zero."""
    for M, N, K in itertools.product((0, 3, 40), (0, 17), (0, 17)):
        if 0 not in (M, N, K):
            continue
        problems = draws(M, (K, N), activation, dtype)
        assert_as_accurate(problems)
        for name, result in run(fused, problems[0]).items():
            assert name in ("out", "grad_bias0") or not result.any(), name


def test_empty_in_a_stack():
    for M, widths in [(0, (3, 4, 5)), (3, (0, 4, 5)), (3, (4, 0, 5)), (70, (20, 0, 0, 30)), (3, (4, 5, 0))]:
        assert_as_accurate([draw(M, widths, "sigmoid", seed=seed) for seed in range(8)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_bias(dtype):
    for M, widths in [(3, (145, 17)), (70, (33, 20)), *STACKS]:
        assert_as_accurate(draws(M, widths, "silu", dtype, bias=False))
