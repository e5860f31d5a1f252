"""The CUDA kernels of a dense layer, through their operators: the same answers as eager PyTorch, and nothing touched
around them. Emulated where there is no GPU.
"""

from __future__ import annotations

import itertools

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
from cuda_operators import ARITHMETICS, dense, eager_tf32, operators, saved_of
from guards import DEVICE, guarded, guarded_allocations
from torch import Tensor

from fastenc.activation import ACTIVATIONS, activation_code

pytestmark = pytest.mark.usefixtures("one_thread")

ALL = (True, True, True)
# A remainder in every dimension, one element, one fragment exactly, and wider than a block holds.
SHAPES = ((67, 33, 45), (35, 65, 17), (1, 1, 1), (16, 16, 16), (40, 150, 24))
both_widths = pytest.mark.parametrize("N", [20, 140], ids=["narrow", "wide"])
each_arithmetic = pytest.mark.parametrize("arithmetic", ARITHMETICS, ids=str)


@each_arithmetic
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_as_accurate_as_eager(activation, arithmetic):
    worst = Worst()
    for seed, (M, N, K) in enumerate(SHAPES * 2):
        problem = draw(M, (K, N), activation, arithmetic.dtype, seed=seed)
        expected = eager_tf32(problem) if arithmetic.tf32 else run(eager, problem)
        worst.add(dense(problem, arithmetic.tf32), expected, run(eager, problem.map(Tensor.double)))
    worst.check()


@each_arithmetic
def test_exact_on_integers(arithmetic):
    for activation, (M, N, K), bias in (
        ("relu", (67, 33, 45), True),
        ("identity", (35, 65, 17), False),
        ("relu", (70, 140, 30), True),
        ("relu", (1500, 20, 20), True),  # many parts of a sum over the rows
        ("relu", (5, 7, 300), False),
    ):
        problem = small_integers(draw(M, (K, N), activation, arithmetic.dtype, bias), 1)
        assert_same(dense(problem, arithmetic.tf32), run(eager, problem))


@both_widths
@pytest.mark.parametrize("view", VIEWS)
def test_any_strides(view, N):
    """x, weight, grad_out and bias laid out in every way: the same integers."""
    for dtype, activation in ((torch.float32, "relu"), (torch.float16, "identity")):
        problem = small_integers(draw(N + 3, (37, N), activation, dtype), 1)
        bias = problem.biases[0].repeat_interleave(2)[::2]
        for name in ("x", "weights", "grad_out"):
            matrix = getattr(problem, name)
            changed = (VIEWS[view](matrix[0]),) if name == "weights" else VIEWS[view](matrix)
            odd = Problem(**{**vars(problem), "biases": (bias,), name: changed})
            assert_same(dense(odd), run(eager, odd))


@both_widths
def test_a_saved_tensor_of_any_strides(N):
    problem = small_integers(draw(N + 3, (37, N), "relu", torch.float32), 1)
    expected = run(eager, problem)
    for view in ("transposed", "sliced"):
        with guarded_allocations(), emulated.guarded_outputs():
            tensors = [
                guarded(t) for t in (problem.grad_out, problem.x, problem.weights[0], VIEWS[view](expected["out"]))
            ]
            grads = operators.dense_backward(*tensors, activation_code("relu"), *ALL, False)
        named = dict(zip(("grad_x", "grad_weight0", "grad_bias0"), (grad.cpu() for grad in grads), strict=True))
        assert_same({"out": expected["out"], **named}, expected)


@both_widths
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_inf_as_in_pytorch(activation, N):
    problem = small_integers(draw(40, (21, N), activation, torch.float32))
    assert_nan_and_inf_as_in_pytorch(dense, put_nan_and_inf(problem))


@both_widths
@pytest.mark.parametrize("activation", ["relu", "gelu", "identity"])
def test_only_what_the_mask_asks_for(activation, N):
    """What is not needed is not read: a stand-in of NaN with strides of 0 will do."""
    problem = small_integers(draw(35, (37, N), activation, torch.float32))
    everything = dense(problem)
    code = activation_code(activation)
    x, weight, bias, grad_out = (t.to(DEVICE) for t in (problem.x, *problem.weights, *problem.biases, problem.grad_out))
    out, preact = operators.dense_forward(x, weight, bias, code, True, False)
    nan = torch.full((), torch.nan, device=DEVICE)
    for mask in itertools.product((False, True), repeat=3):
        want_x, want_weight, _ = mask
        given = grad_out, x if want_weight else nan.expand_as(x), weight if want_x else nan.expand_as(weight)
        with guarded_allocations(), emulated.guarded_outputs():
            tensors = [guarded(t) for t in (*given, saved_of(activation, out, preact))]
            grads = operators.dense_backward(*tensors, code, *mask, False)
        for wanted, grad, name in zip(mask, grads, ("grad_x", "grad_weight0", "grad_bias0"), strict=True):
            expected = everything[name] if wanted else torch.empty(0)
            torch.testing.assert_close(grad.cpu(), expected, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("M", "N", "K"), [(0, 3, 4), (0, 140, 4), (4, 0, 3), (4, 3, 0), (4, 140, 0), (0, 0, 0), (600, 3, 0)]
)
def test_empty_sizes_as_in_pytorch(M, N, K):
    worst = Worst()  # of K = 0 there is an activation of the bias, and its gradient
    for bias, activation in ((True, "sigmoid"), (False, "gelu")):
        problem = draw(M, (K, N), activation, bias=bias)
        worst.add(dense(problem), run(eager, problem), run(eager, problem.map(Tensor.double)))
    worst.check()


def test_tf32_where_it_is_allowed():
    """1 + 2^-12 is 1 in TF32, whether rounded or cut."""
    for N in (32, 160):
        ones, more = torch.ones(N, 32, device=DEVICE), torch.full((N, 32), 1 + 2**-12, device=DEVICE)
        for tf32 in (False, True):
            each = 1.0 if tf32 else 1 + 2**-12
            out, _ = operators.dense_forward(more, ones, None, activation_code("identity"), False, tf32)
            grads = operators.dense_backward(
                torch.full((N, N), 1 + 2**-12, device=DEVICE), ones, ones, out, 0, True, True, False, tf32
            )
            torch.testing.assert_close(out, torch.full_like(out, 32 * each), rtol=0, atol=0)
            for grad in grads[:2]:
                torch.testing.assert_close(grad, torch.full_like(grad, N * each), rtol=0, atol=0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradient_of_the_preactivation(activation, dtype):
    """dZ, and its columns' sums from before the rounding."""
    worst = Worst()
    for seed, (M, N) in enumerate(((67, 33), (300, 70), (1, 1), (5, 256), (1000, 3))):
        problem = draw(M, (9, N), activation, dtype, seed=seed)
        grad_out, preact = problem.grad_out, (problem.x.double() @ problem.weights[0].double().T).to(dtype)
        saved = preact if ACTIVATIONS[activation].saves_preact else ACTIVATIONS[activation].forward(preact)
        for mask in ((True, True), (True, False), (False, True), (False, False)):
            with guarded_allocations(), emulated.guarded_outputs():
                dz, sums = operators.preact_gradient(
                    guarded(grad_out), guarded(saved), activation_code(activation), *mask
                )
            sides = [{}, {}, {}]
            for side, dtype_of_side in ((1, dtype), (2, torch.float64)):
                expected = ACTIVATIONS[activation].backward(grad_out.to(dtype_of_side), saved.to(dtype_of_side))
                sides[side] = {"dz": expected if mask[0] else expected.new_empty(0)}
                sides[side]["sums"] = expected.sum(0) if mask[1] else expected.new_empty(0)
            worst.add({"dz": dz.cpu(), "sums": sums.cpu()}, sides[1], sides[2])
    worst.check()


def test_the_same_bits_again():
    for N in (33, 150):
        problem = draw(700, (45, N), "gelu", torch.float32)
        assert_same(dense(problem), dense(problem))


@emulated.only_emulated
@each_arithmetic
def test_the_same_bits_in_all_schedules(arithmetic):
    for N in (33, 140):
        problem = draw(70, (45, N), "gelu", arithmetic.dtype)
        expected = dense(problem, arithmetic.tf32)
        for order, late_copies in emulated.SCHEDULES:
            with emulated.scheduled(order, late_copies, seed=3):
                assert_same(dense(problem, arithmetic.tf32), expected)


@emulated.only_emulated
def test_a_planted_mistake_is_seen():
    """So that the schedules above are what they say."""
    problem = draw(70, (45, 33), "gelu", torch.float32)
    expected = dense(problem)
    found = []
    for order, late_copies in emulated.SCHEDULES:
        with emulated.scheduled(order, late_copies, planted="MissingWait"):
            found.append(not all(torch.equal(value, expected[name]) for name, value in dense(problem).items()))
    assert any(found)


@emulated.only_emulated
def test_a_stray_write_is_seen():
    with emulated.scheduled("forward", True, planted="StoreRowTooFar"), pytest.raises(AssertionError, match="around"):
        dense(draw(35, (37, 20)))


def bad(**changes: Tensor | int) -> tuple:
    arguments = {
        "x": torch.ones(4, 3, device=DEVICE),
        "weight": torch.ones(2, 3, device=DEVICE),
        "bias": torch.ones(2, device=DEVICE),
        "activation": 1,
    }
    return (*(arguments | changes).values(), True, False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (bad(activation=8), "there is no activation number 8"),
        (bad(weight=torch.ones(2, 4, device=DEVICE)), r"weight must be \[2, 3\], not \[2, 4\]"),
        (bad(weight=torch.ones(2, 3, device=DEVICE).half()), "weight must have the dtype of x"),
        (bad(x=torch.ones(4, device=DEVICE)), "x must have 2 dimensions, not 1"),
        (bad(bias=torch.ones(3, device=DEVICE)), r"bias must be \[2\], not \[3\]"),
        (bad(x=torch.ones(4, 3, device=DEVICE).double()), "x must be float32, bfloat16 or float16"),
    ],
)
def test_wrong_arguments(arguments, words):
    with pytest.raises(RuntimeError, match=words):
        operators.dense_forward(*arguments)


def test_wrong_arguments_of_the_backward_pass():
    x, weight, grad = (torch.ones(shape, device=DEVICE) for shape in ((4, 3), (2, 3), (4, 2)))
    with pytest.raises(RuntimeError, match=r"grad_out must be \[4, 2\], not \[4, 3\]"):
        operators.dense_backward(x, x, weight, grad, 1, 1, 1, 1, False)
    with pytest.raises(RuntimeError, match=r"saved must be \[4, 2\], not \[4, 3\]"):
        operators.dense_backward(grad, x, weight, x, 1, 1, 1, 1, False)
