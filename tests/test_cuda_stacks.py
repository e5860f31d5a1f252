"""The CUDA kernels of narrow stacks, through their operators: the same answers as eager PyTorch, and nothing touched
around them. Emulated where there is no GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import emulated
import pytest
import torch
from accuracy import (
    VIEWS,
    Problem,
    Worst,
    assert_nan_and_inf_as_in_pytorch,
    assert_same,
    draw,
    eager,
    put_nan_and_inf,
    run,
    small_integers,
)
from cuda_operators import ARITHMETICS, eager_tf32, operators, stack
from guards import DEVICE, guarded, guarded_allocations
from torch import Tensor

from fastenc.activation import ACTIVATIONS, activation_codes

pytestmark = pytest.mark.usefixtures("one_thread")

# (M, widths from the input on). A remainder in every dimension; hardly any padding; a wide last layer; one layer.
STACKS = ((67, (45, 33, 20, 5)), (70, (17, 16, 12)), (40, (20, 30, 17, 150)), (35, (24, 40)))
LARGE = ((35, (20, 120, 100, 18)), (35, (9, 16, 17, 12, 9, 14, 16, 10, 11)))
each_arithmetic = pytest.mark.parametrize("arithmetic", ARITHMETICS, ids=str)


def draw_without_a_bias(M: int, widths: Sequence[int], *options: Any, **more: Any) -> Problem:
    """Random inputs of a stack whose second layer, if there is one, has no bias."""
    problem = draw(M, widths, *options, **more)
    biases = tuple(None if i == 1 else bias for i, bias in enumerate(problem.biases))
    return Problem(**{**vars(problem), "biases": biases})


@each_arithmetic
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_as_accurate_as_eager(activation, arithmetic):
    for shape, (M, widths) in enumerate(STACKS):
        worst = Worst()
        # Of few coarsely rounded numbers the largest error is left to chance.
        for seed in range(3 if arithmetic.dtype == torch.float32 else 8):
            problem = draw(M, widths, activation, arithmetic.dtype, seed=10 * shape + seed)
            expected = eager_tf32(problem) if arithmetic.tf32 else run(eager, problem)
            worst.add(stack(problem, arithmetic.tf32), expected, run(eager, problem.map(Tensor.double)))
        worst.check()


@each_arithmetic
def test_exact_on_integers(arithmetic):
    for (M, widths), activations in (
        (STACKS[0], "relu"),
        ((35, (17, 16, 1)), ("identity", "relu")),
        (STACKS[2], ("relu", "identity", "relu")),
        (STACKS[2], ("relu", "relu", "identity")),
        ((1000, (20, 12, 9)), "relu"),  # several blocks of rows
    ):
        problem = small_integers(draw_without_a_bias(M, widths, activations, arithmetic.dtype), highest=1)
        assert_same(stack(problem, arithmetic.tf32), run(eager, problem))


@pytest.mark.parametrize("large", LARGE, ids=str)
def test_large_stacks(large):
    """Full width, and as deep as the kernels go."""
    M, widths = large
    mixed = tuple(itertools.islice(itertools.cycle(("relu", "gelu", "tanh", "silu")), len(widths) - 1))
    for activations in (mixed, ("relu",) * (len(widths) - 1)):
        worst = Worst()
        for seed in range(3):
            problem = draw(M, widths, activations, seed=seed)
            worst.add(stack(problem), run(eager, problem), run(eager, problem.map(Tensor.double)))
        worst.check()


@pytest.mark.parametrize("view", VIEWS)
def test_any_strides(view):
    """x, every weight and grad_out laid out in every way, and biases with strides: the same integers."""
    for M, widths in (STACKS[0], STACKS[2]):
        problem = small_integers(draw(max(M, *widths), widths, "relu", torch.float32), highest=1)
        odd_biases = Problem(
            **{**vars(problem), "biases": tuple(bias.repeat_interleave(2)[::2] for bias in problem.biases)}
        )
        for name in ("x", "weights", "grad_out"):
            given = getattr(odd_biases, name)
            changed = tuple(map(VIEWS[view], given)) if name == "weights" else VIEWS[view](given)
            odd = Problem(**{**vars(odd_biases), name: changed})
            assert_same(stack(odd), run(eager, odd))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_inf_as_in_pytorch(activation):
    problem = small_integers(draw(40, (21, 19, 8), activation, torch.float32), highest=1)
    assert_nan_and_inf_as_in_pytorch(stack, put_nan_and_inf(problem))


@pytest.mark.parametrize("activation", ["relu", "gelu", "identity"])
def test_only_what_the_mask_asks_for(activation):
    problem = small_integers(draw(35, (18, 12, 7), activation, torch.float32), highest=1)
    everything = stack(problem)
    names = ("grad_x", "grad_weight0", "grad_bias0", "grad_weight1", "grad_bias1")
    for mask in itertools.product((False, True), repeat=5):
        actual = stack(problem, mask=mask)
        expected = {"out": everything["out"]}
        expected |= {name: everything[name] for name, wanted in zip(names, mask, strict=True) if wanted}
        assert_same(actual, expected)


@pytest.mark.parametrize(("M", "widths"), [(0, (4, 3, 2)), (3, (0, 3, 2)), (0, (0, 3)), (3, (0, 3)), (1, (1, 1, 1))])
def test_empty_and_smallest_sizes(M, widths):
    worst = Worst()  # of K = 0 there is an activation of the bias, and its gradient
    for bias, activation in ((True, "sigmoid"), (False, "gelu")):
        problem = draw(M, widths, activation, bias=bias)
        worst.add(stack(problem), run(eager, problem), run(eager, problem.map(Tensor.double)))
    worst.check()


def test_what_the_forward_pass_returns():
    """The outputs of all layers, then the values before the activations that need them."""
    problem = small_integers(draw(9, (5, 6, 7, 4), ("relu", "gelu", "silu")), highest=1)
    codes = activation_codes(problem.activations)
    with guarded_allocations(), emulated.guarded_outputs():
        given = problem.map(guarded)
        results = operators.encoder_forward(given.x, given.weights, given.biases, codes, True, False)
    first = torch.nn.functional.linear(problem.x, problem.weights[0], problem.biases[0]).relu()
    second = torch.nn.functional.linear(first, problem.weights[1], problem.biases[1])
    assert [tuple(result.shape) for result in results] == [(9, 6), (9, 7), (9, 4), (9, 7), (9, 4)]
    torch.testing.assert_close(results[0].cpu(), first, rtol=0, atol=0)
    torch.testing.assert_close(results[3].cpu(), second, rtol=0, atol=0)


def test_the_same_bits_again():
    for M, widths in ((700, (45, 33, 20)), STACKS[2]):
        problem = draw(M, widths, "gelu", torch.float32)
        assert_same(stack(problem), stack(problem))


@emulated.only_emulated
@each_arithmetic
def test_the_same_bits_in_all_schedules(arithmetic):
    for M, widths in ((70, (45, 33, 20, 5)), STACKS[2]):
        problem = draw(M, widths, ("relu", "gelu", "sigmoid"), arithmetic.dtype)
        expected = stack(problem, arithmetic.tf32)
        for order, late_copies in emulated.SCHEDULES:
            with emulated.scheduled(order, late_copies, seed=3):
                assert_same(stack(problem, arithmetic.tf32), expected)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, device=DEVICE)


def test_what_does_not_fit_is_refused():
    too_deep = [ones(4, 4)] * 9
    with pytest.raises(RuntimeError, match="at most 8 layers, all but the last of 1 to 128 outputs"):
        operators.encoder_forward(ones(2, 4), too_deep, [None] * 9, [1] * 9, True, False)
    with pytest.raises(RuntimeError, match="at most 8 layers, all but the last of 1 to 128 outputs"):
        operators.encoder_forward(ones(2, 4), [ones(129, 4), ones(3, 129)], [None] * 2, [1] * 2, True, False)
    with pytest.raises(RuntimeError, match="as many weights, biases and activations are needed"):
        operators.encoder_forward(ones(2, 4), [ones(3, 4)], [], [1], True, False)
    with pytest.raises(RuntimeError, match=r"weight must be \[3, 5\], not \[3, 4\]"):
        operators.encoder_forward(ones(2, 4), [ones(5, 4), ones(3, 4)], [None] * 2, [1] * 2, True, False)


def test_wrong_arguments_of_the_backward_pass():
    x, weights, results = ones(2, 4), [ones(5, 4), ones(3, 5)], [ones(2, 5), ones(2, 3)]
    grad = ones(2, 3)
    with pytest.raises(RuntimeError, match="the mask must have 5 entries, not 4"):
        operators.encoder_backward(grad, x, weights, results, [1, 1], [1] * 4, False)
    with pytest.raises(RuntimeError, match="results has too few tensors: 2"):
        operators.encoder_backward(grad, x, weights, results, [1, 5], [1] * 5, False)
    with pytest.raises(RuntimeError, match="a result that the gradients read must have 2 dimensions, not 1"):
        operators.encoder_backward(grad, x, weights, [ones(0), results[1]], [1, 1], [1] * 5, False)
