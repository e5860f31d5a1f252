"""The dense layer's Triton kernels: the same answers as eager PyTorch, and nothing touched around them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import interpreter  # first: it decides how kernels run
import pytest
import torch
from accuracy import (
    DTYPES,
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
from fastenc.kernels.dense_backward import dense_backward, is_wide
from fastenc.kernels.dense_forward import dense_forward
from fastenc.kernels.dense_input_gradient import dense_input_gradient
from guards import DEVICE, guarded, guarded_allocations
from torch import Tensor

from fastenc.activation import ACTIVATIONS

ALL = (True, True, True)
# A remainder in every dimension for tiles of 16 and of 32, one element, and one tile exactly.
SHAPES = ((67, 33, 45), (35, 65, 17), (1, 1, 1), (16, 16, 16))


@pytest.fixture(params=[False, True], ids=["fused", "wide"])
def wide(request):
    """Both ways of the backward pass."""
    return request.param


def by_kernels(
    problem: Problem, mask: Sequence[bool] = ALL, dropout: float = 0.0, seed: Tensor | None = None, **options: Any
) -> dict[str, Tensor]:
    """out and the gradients by the kernels, from guarded memory to guarded memory; names as `accuracy.run` has them."""
    saves_preact = ACTIVATIONS[problem.activations[0]].saves_preact
    with guarded_allocations():
        given = problem.map(guarded)
        x, weight, bias = given.x, given.weights[0], given.biases[0]
        int64 = options.get("int64", False)
        out, preact = dense_forward(x, weight, bias, problem.activations[0], True, dropout, seed, int64)
        saved = preact if saves_preact else out
        grads = dense_backward(given.grad_out, x, weight, saved, given.activations[0], mask, dropout, seed, **options)
    assert preact.shape == (out.shape if saves_preact else (0,))
    named = dict(zip(("grad_x", "grad_weight0", "grad_bias0"), grads, strict=True))
    if bias is None:
        del named["grad_bias0"]
    return {"out": out.cpu(), **{name: grad.cpu() for name, grad in named.items()}}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_as_accurate_as_eager(activation, dtype, wide):
    worst = Worst()
    for seed, (M, N, K) in enumerate(SHAPES):
        problem = draw(M, (K, N), activation, dtype, seed=seed)
        worst.add(by_kernels(problem, wide=wide), run(eager, problem), run(eager, problem.map(Tensor.double)))
    worst.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_on_integers(dtype, wide):
    for activation, (M, N, K), bias in (("relu", (67, 33, 45), True), ("identity", (35, 65, 17), False)):
        problem = small_integers(draw(M, (K, N), activation, dtype, bias))
        assert_same(by_kernels(problem, wide=wide), run(eager, problem))


def test_exact_over_many_splits_of_the_rows(wide):
    problem = small_integers(draw(1500, (20, 20), "relu", torch.float32))
    assert_same(by_kernels(problem, wide=wide), run(eager, problem))


TILES = [(16, 16, 16), (32, 16, 32), (16, 32, 64), (64, 64, 16)]


@pytest.mark.parametrize("tiles", TILES, ids=str)
def test_exact_for_any_tiles(tiles):
    """More than one group of rows of tiles, and tiles larger than the matrices."""
    problem = small_integers(draw(151, (37, 40), "relu", torch.bfloat16))
    expected = run(eager, problem)
    config = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), tiles, strict=True))
    with guarded_allocations():
        given = problem.map(guarded)
        out, _ = dense_forward(given.x, given.weights[0], given.biases[0], "relu", True, config=config)
        grad_x = dense_input_gradient(given.grad_out, out, given.weights[0], "relu", config=config)
    assert_same({"out": out.cpu(), "grad_x": grad_x.cpu()}, {"out": expected["out"], "grad_x": expected["grad_x"]})


@pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0), reason="tensor copies came with sm_90"
)
@pytest.mark.parametrize("tiles", [(16, 16, 32), (64, 32, 16)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_with_descriptors(dtype, tiles):
    problem = small_integers(draw(151, (40, 37), "gelu", dtype))
    config = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), tiles, strict=True))
    with guarded_allocations():
        given = problem.map(guarded)
        arguments = (given.x, given.weights[0], given.biases[0], "gelu", True)
        results = [dense_forward(*arguments, config=config | described) for described in ({}, {"described": 1})]
    for plain, described in zip(*results, strict=True):
        torch.testing.assert_close(described, plain, rtol=0, atol=0)


@pytest.mark.parametrize("view", VIEWS)
def test_any_strides(view, wide):
    """x, weight, grad_out and bias laid out in every way: the same integers."""
    for dtype, activation in ((torch.float32, "relu"), (torch.float16, "identity")):
        problem = small_integers(draw(35, (37, 20), activation, dtype))
        bias = problem.biases[0].repeat_interleave(2)[::2]
        for name in ("x", "weights", "grad_out"):
            matrix = getattr(problem, name)
            changed = (VIEWS[view](matrix[0]),) if name == "weights" else VIEWS[view](matrix)
            odd = Problem(**{**vars(problem), "biases": (bias,), name: changed})
            assert_same(by_kernels(odd, wide=wide), run(eager, odd))


def test_a_saved_tensor_of_any_strides(wide):
    problem = small_integers(draw(35, (37, 20), "relu", torch.float32))
    out, x, weight = run(eager, problem)["out"], problem.x, problem.weights[0]
    for view in ("transposed", "sliced"):
        with guarded_allocations():
            tensors = [guarded(t) for t in (problem.grad_out, x, weight, VIEWS[view](out))]
            grads = dense_backward(*tensors, "relu", ALL, wide=wide)
        expected = run(eager, problem)
        for grad, name in zip(grads, ("grad_x", "grad_weight0", "grad_bias0"), strict=True):
            torch.testing.assert_close(grad.cpu(), expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_inf_as_in_pytorch(activation, wide):
    problem = small_integers(draw(40, (21, 19), activation, torch.float32))
    assert_nan_and_inf_as_in_pytorch(lambda problem: by_kernels(problem, wide=wide), put_nan_and_inf(problem))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_64_bit_offsets_give_the_same_bits(dtype, wide):
    for activation in ("gelu", "relu"):
        problem = draw(67, (45, 33), activation, dtype)
        assert_same(by_kernels(problem, wide=wide, int64=True), by_kernels(problem, wide=wide))


def test_the_same_bits_again(wide):
    problem = draw(700, (45, 33), "gelu", torch.float32)
    assert_same(by_kernels(problem, wide=wide), by_kernels(problem, wide=wide))


@pytest.mark.parametrize("activation", ["relu", "gelu", "identity"])
def test_only_what_the_mask_asks_for(activation, wide):
    """What is not needed is not read: a stand-in of NaN with strides of 0 will do."""
    problem = small_integers(draw(35, (37, 20), activation, torch.float32))
    everything = by_kernels(problem, wide=wide)
    # Compiled for another mask, other multiplications may be fused with additions: on a GPU not all bits are the same.
    inexact = DEVICE == "cuda" and activation == "gelu"
    ordinary, exact, worst = run(eager, problem), run(eager, problem.map(Tensor.double)), Worst()
    x, weight, grad_out = problem.x, problem.weights[0], problem.grad_out
    nan = torch.full((), torch.nan)
    for mask in itertools.product((False, True), repeat=3):
        want_x, want_weight, _ = mask
        out, preact = dense_forward(*(t.to(DEVICE) for t in (x, weight, problem.biases[0])), activation, True)
        saved = preact if preact.numel() else out if activation != "identity" else nan.expand_as(out)
        tensors = grad_out, x if want_weight else nan.expand_as(x), weight if want_x else nan.expand_as(weight), saved
        with guarded_allocations():
            grads = dense_backward(*(guarded(t) for t in tensors), activation, mask, wide=wide)
        for wanted, grad, name in zip(mask, grads, ("grad_x", "grad_weight0", "grad_bias0"), strict=True):
            expected = everything[name] if wanted else torch.empty(0)
            if wanted and inexact:
                worst.add({name: grad.cpu()}, {name: ordinary[name]}, {name: exact[name]})
                continue
            torch.testing.assert_close(grad.cpu(), expected, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")
    if inexact:
        worst.check()


@pytest.mark.parametrize(("M", "N", "K"), [(0, 3, 4), (4, 0, 3), (4, 3, 0), (0, 0, 0), (600, 3, 0)])
def test_empty_sizes_as_in_pytorch(M, N, K, wide):
    worst = Worst()  # of K = 0 there is an activation of the bias, and its gradient
    for bias, activation in ((True, "sigmoid"), (False, "gelu")):
        problem = draw(M, (K, N), activation, bias=bias)
        worst.add(by_kernels(problem, wide=wide), run(eager, problem), run(eager, problem.map(Tensor.double)))
    worst.check()


@contextlib.contextmanager
def matmul_precision(setting: str) -> Iterator[None]:
    """PyTorch's setting for products in fp32, for a while."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = setting
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_tf32_where_pytorch_allows_it(wide):
    """1 + 2^-12 is 1 in TF32, whether rounded or cut."""
    ones, more = torch.ones(32, 32, device=DEVICE), torch.full((32, 32), 1 + 2**-12, device=DEVICE)
    for allowed in ("ieee", "tf32"):
        expected = torch.full((32, 32), 32.0 if allowed == "tf32" else 32 + 2**-7, device=DEVICE)
        with matmul_precision(allowed):
            out, _ = dense_forward(more, ones, None, "identity", False)
            assert is_wide(32, 128, 784, torch.float32) == (allowed == "ieee")
            grads = dense_backward(more, ones, ones, ones, "identity", (True, True, False), wide=wide)[:2]
        for actual in (out, *([] if wide else grads)):  # wide, the products are ATen's
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# The launches that hold for each mask: the input's gradient, then the weight's and the bias's in one.
FUSED = ("dense_input_gradient_kernel", "weight_gradient_kernel")


def launched(launches: Sequence[interpreter.Launch]) -> tuple[str, ...]:
    return tuple(launch.kernel for launch in launches)


@pytest.mark.skipif(DEVICE == "cuda", reason="launches are counted by the interpreter")
def test_launches():
    """One forward; backward, one for the input and one for weight and bias, and a reduction if rows were split."""
    bias_alone = ("preact_gradient_kernel",)
    for mask, expected, expected_wide in (
        (ALL, FUSED, bias_alone),
        ((True, False, False), FUSED[:1], bias_alone),
        ((False, True, True), FUSED[1:], bias_alone),
        ((False, True, False), FUSED[1:], bias_alone),
        ((False, False, True), bias_alone, bias_alone),
        ((False, False, False), (), ()),
    ):
        for wide, then in ((False, expected), (True, expected_wide)):
            with interpreter.watched() as launches:
                by_kernels(draw(35, (37, 20), "gelu"), mask, wide=wide)
            assert launched(launches) == ("dense_forward_kernel", *then)


@pytest.mark.skipif(DEVICE == "cuda", reason="launches are counted by the interpreter")
def test_at_most_three_launches_backward():
    problem = draw(1500, (20, 20), "relu")
    for wide, expected in ((False, (*FUSED, "reduce_kernel")), (True, ("preact_gradient_kernel", "reduce_kernel"))):
        with interpreter.watched() as launches:
            by_kernels(problem, wide=wide)
        assert launched(launches) == ("dense_forward_kernel", *expected)


@pytest.mark.skipif(DEVICE == "cuda", reason="launches are counted by the interpreter")
def test_a_wide_identity_needs_no_pass_for_its_gradient():
    with interpreter.watched() as launches:
        by_kernels(draw(35, (37, 20), "identity"), (True, True, False), wide=True)
    assert launched(launches) == ("dense_forward_kernel",)


def dropped(p: float, out: Tensor):
    """Eager layers with dropout after the activation, of the elements that are 0 in `out`."""

    def forward(*arguments: Any) -> Tensor:
        return eager(*arguments) * (out != 0) / (1 - p)

    return forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dropout_drops_the_same_in_both_passes(activation, dtype, wide):
    p, seed = 0.3, torch.tensor([11], device=DEVICE)
    worst = Worst()
    for number in range(2):
        problem = draw(67, (45, 33), activation, dtype, seed=number)
        actual = by_kernels(problem, dropout=p, seed=seed, wide=wide)
        forward = dropped(p, actual["out"])
        worst.add(actual, run(forward, problem), run(forward, problem.map(Tensor.double)))
    worst.check()


def test_dropout_by_seed_and_place_alone():
    """p of the elements, within six standard deviations; others for another seed, the same for any tiles."""
    problem = draw(200, (8, 50), "sigmoid")
    x, weight = problem.x.to(DEVICE), problem.weights[0].to(DEVICE)
    plain, _ = dense_forward(x, weight, None, "sigmoid", False)

    def drop(seed: int, p: float, tiles: int) -> Tensor:
        config = {"BLOCK_M": tiles, "BLOCK_N": tiles, "BLOCK_K": 16}
        return dense_forward(x, weight, None, "sigmoid", False, p, torch.tensor([seed], device=DEVICE), config=config)[
            0
        ]

    for p in (0.1, 0.5):
        out = drop(3, p, 32)
        kept = out != 0
        torch.testing.assert_close(out, torch.where(kept, plain * (1 / (1 - p)), 0.0), rtol=0, atol=0)
        assert abs(kept.double().mean().item() - (1 - p)) < 6 * (p * (1 - p) / kept.numel()) ** 0.5
        assert torch.equal(drop(3, p, 64) != 0, kept)
        assert not torch.equal(drop(4, p, 32) != 0, kept)
        assert not torch.equal(kept[0], kept[1])


def test_no_dropout_needs_no_seed():
    problem = draw(35, (37, 20), "gelu")
    seed = torch.tensor([3], device=DEVICE)
    assert_same(by_kernels(problem, dropout=0.0, seed=seed), by_kernels(problem))
