"""The Triton kernels of narrow stacks: the same answers as eager PyTorch, and nothing touched around them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
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
from fastenc.kernels.activation import SAVES_PREACT
from fastenc.kernels.encoder_backward import encoder_backward
from fastenc.kernels.encoder_forward import encoder_forward
from fastenc.kernels.encoder_plan import is_narrow, padded, sums_on_chip
from guards import DEVICE, guarded, guarded_allocations
from torch import Tensor

from fastenc.activation import ACTIVATIONS
from fastenc.backends import reference

# (M, widths from the input on). A remainder in every dimension; hardly any padding; a wide last layer.
STACKS = ((67, (45, 33, 20, 5)), (70, (17, 16, 12)), (40, (20, 30, 17, 150)))
LARGE = ((35, (20, 120, 100, 18)), (35, (9, 16, 17, 12, 9, 14, 16, 10, 11)))
SAVES = ("all", "needed")
SMALL_TILES = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}


def by_kernels(
    problem: Problem,
    save: str = "needed",
    mask: Sequence[bool] | None = None,
    dropouts: Sequence[float] | None = None,
    seed: Tensor | None = None,
    int64: bool = False,
    tiles: dict[str, int] | None = None,
) -> dict[str, Tensor]:
    """out and the gradients by the kernels, from guarded memory to guarded memory; names as `accuracy.run` has them."""
    depth = len(problem.weights)
    mask = [True] * (2 * depth + 1) if mask is None else mask
    mask = [
        wanted and (i == 0 or i % 2 == 1 or problem.biases[i // 2 - 1] is not None) for i, wanted in enumerate(mask)
    ]
    forward = tiles and {**tiles, "BLOCK_K": 16}
    backward = tiles and {**tiles, "rows": 32}
    with guarded_allocations():
        given = problem.map(guarded)
        stack = given.x, given.weights, given.biases
        results = encoder_forward(*stack, given.activations, save, dropouts, seed, int64, forward)
        grads = encoder_backward(
            given.grad_out, *stack, results, given.activations, mask, dropouts, seed, int64, backward
        )
    names = ["grad_x", *(f"grad_{kind}{i}" for i in range(depth) for kind in ("weight", "bias"))]
    assert all(grad.numel() == 0 for grad, wanted in zip(grads, mask, strict=True) if not wanted)
    named = {name: grad.cpu() for name, grad, wanted in zip(names, grads, mask, strict=True) if wanted}
    return {"out": results[depth - 1].cpu(), **named}


def draw_without_a_bias(M: int, widths: Sequence[int], *options: Any, **more: Any) -> Problem:
    """Random inputs of a stack whose second layer has no bias."""
    problem = draw(M, widths, *options, **more)
    return Problem(**{**vars(problem), "biases": (problem.biases[0], None, *problem.biases[2:])})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_as_accurate_as_eager(activation, dtype):
    for shape, stack in enumerate(STACKS):
        worst = Worst()
        # Of few coarsely rounded numbers the largest error is left to chance.
        for seed in range(1 if dtype == torch.float32 else (6, 4, 3)[shape]):
            problem = draw(*stack, activation, dtype, seed=10 * shape + seed)
            actual = by_kernels(problem, SAVES[(shape + seed) % 2])
            worst.add(actual, run(eager, problem), run(eager, problem.map(Tensor.double)))
        worst.check()


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_on_integers(dtype, save):
    for stack, activations in (
        (STACKS[0], "relu"),
        ((35, (17, 16, 1)), ("identity", "relu")),
        (STACKS[2], ("relu", "identity", "relu")),
        (STACKS[2], ("relu", "relu", "identity")),
    ):
        problem = small_integers(draw_without_a_bias(*stack, activations, dtype), highest=1)
        assert_same(by_kernels(problem, save), run(eager, problem))


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("stack", LARGE, ids=str)
def test_large_stacks(stack, save):
    """One whose inner weight gradients do not all fit on chip, and one as deep as the kernels go."""
    M, widths = stack
    mixed = tuple(itertools.islice(itertools.cycle(("relu", "gelu", "tanh", "silu")), len(widths) - 1))
    relu = ("relu",) * (len(widths) - 1)
    for activations in (mixed, relu):
        worst = Worst()
        for seed in range(3):
            problem = draw(M, widths, activations, seed=seed)
            worst.add(by_kernels(problem, save), run(eager, problem), run(eager, problem.map(Tensor.double)))
        worst.check()


def test_exact_for_any_tiles():
    """Several programs, several blocks of rows in each, and tiles smaller and larger than the matrices."""
    for stack, dtype in itertools.product(STACKS, (torch.float32, torch.bfloat16)):
        problem = small_integers(draw(*stack, "relu", dtype), highest=1)
        assert_same(by_kernels(problem, tiles=SMALL_TILES), run(eager, problem))


@pytest.mark.parametrize("view", VIEWS)
def test_any_strides(view):
    """x, weights and grad_out laid out in every way: the same integers."""
    for stack in ((35, (37, 20, 24)), (35, (37, 20, 140))):
        problem = small_integers(draw(*stack, "relu"), highest=1)
        change = VIEWS[view]
        for name in ("x", "weights", "grad_out"):
            value = getattr(problem, name)
            changed = tuple(map(change, value)) if name == "weights" else change(value)
            odd = Problem(**{**vars(problem), name: changed})
            assert_same(by_kernels(odd), run(eager, odd))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_inf_as_in_pytorch(activation):
    problem = small_integers(draw(40, (21, 19, 17), activation))
    assert_nan_and_inf_as_in_pytorch(by_kernels, put_nan_and_inf(problem, weights=False))


def test_64_bit_offsets_give_the_same_bits():
    for stack in STACKS:
        problem = draw(*stack, "gelu")
        assert_same(by_kernels(problem, int64=True), by_kernels(problem))


def test_the_same_bits_again():
    problem = draw(200, (45, 33, 20, 5), "tanh")
    assert_same(by_kernels(problem, tiles=SMALL_TILES), by_kernels(problem, tiles=SMALL_TILES))


@pytest.mark.parametrize("stack", [(35, (21, 20, 17, 12)), (35, (21, 20, 150))], ids=str)
def test_only_what_the_mask_asks_for(stack):
    """Every layer frozen in turn, and all but one; with and without the gradient of the input."""
    problem = small_integers(draw(*stack, "relu"), highest=1)
    everything = by_kernels(problem)
    depth = len(problem.weights)
    for layer, frozen, x, bias in itertools.product(range(depth), (True, False), (True, False), (True, False)):
        mask = [x]
        for i in range(depth):
            wanted = (i == layer) != frozen
            mask += [wanted, wanted and bias]
        actual = by_kernels(problem, mask=mask)
        assert_same(actual, {name: everything[name] for name in actual})
        assert len(actual) == 1 + sum(mask)
        alone = by_kernels(problem, mask=[x, *(i % 2 == 1 and i // 2 == layer for i in range(2 * depth))])
        assert_same(alone, {name: everything[name] for name in alone})


@pytest.mark.parametrize("stack", [(0, (3, 4, 5)), (4, (0, 3, 4)), (300, (0, 3, 4))], ids=str)
def test_empty_sizes_as_in_pytorch(stack):
    problem = small_integers(draw(*stack, "relu"), highest=1)
    assert_same(by_kernels(problem), run(eager, problem))


def test_tf32_where_pytorch_allows_it():
    """1 + 2^-12 is 1 in TF32, whether rounded or cut."""
    more, ones = torch.full((32, 32), 1 + 2**-12, device=DEVICE), torch.ones(32, 32, device=DEVICE)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for allowed in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = allowed
            out = encoder_forward(more, [ones, ones], [None, None], ["identity"] * 2, "nothing")[0]
            assert (out == 1024).all() == (allowed == "tf32")
            first = torch.full((32, 32), 1 / 32, device=DEVICE)
            grads = encoder_backward(
                more, ones, [ones, first], [None, None], [ones, ones], ["identity"] * 2, [True] + [True, False] * 2
            )
            for grad in (grads[0], grads[3]):
                whole = grad.round() == grad
                assert whole.all() if allowed == "tf32" else not whole.any()
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.skipif(DEVICE == "cuda", reason="launches are counted by the interpreter")
def test_launches():
    """One forward, at most three backward, and none for what is not asked for."""
    three = ("encoder_chain_kernel", "weight_gradient_kernel", "reduce_kernel")
    for widths, mask, expected in (
        ((21, 20, 17, 12), [True] * 7, three),
        ((21, 20, 17, 150), [True] * 7, three),
        ((21, 20, 17, 12), [True] + [False] * 6, three[:1]),
        ((21, 20, 17, 12), [False] * 5 + [True, True], (three[0], three[2])),
        ((21, 20, 17, 150), [False] * 5 + [True, True], three[1:2]),
        ((21, 20, 17, 12), [False] * 7, ()),
    ):
        with interpreter.watched() as launches:
            by_kernels(draw(35, widths, dtype=torch.bfloat16), mask=mask)
        assert tuple(launch.kernel for launch in launches) == ("encoder_forward_kernel", *expected)


def test_what_is_kept():
    """Of a narrow stack the first and the last output; where derivatives are of pre-activations, those."""
    x = torch.randn(20, 21, device=DEVICE, dtype=torch.bfloat16)
    weights = [torch.randn(n, k, device=DEVICE, dtype=x.dtype) for k, n in itertools.pairwise((21, 32, 20, 17, 12))]
    for activation, outs, preacts in (("relu", [0, 3], []), ("gelu", [3], [4, 5, 6, 7])):
        results = encoder_forward(x, weights, [None] * 4, [activation] * 4, "needed")
        assert [i for i, result in enumerate(results) if result is not None] == outs + preacts


def test_the_same_activations_save_what_comes_before_them():
    assert {name for name, activation in ACTIVATIONS.items() if activation.saves_preact} == SAVES_PREACT


def test_is_narrow():
    assert all(map(is_narrow, ((128, 64, 32, 16), (128,) * 7 + (5000,), (1, 1))))
    assert not any(map(is_narrow, ((129, 16), (16,), (16,) * 9, (16, 0))))
    assert sums_on_chip((128, 64, 32, 16), 2) == [False, True, True, True]
    assert sums_on_chip((128, 64, 32, 16), 4) == [False] * 4
    assert sums_on_chip((120, 100, 18), 2) == [False, False, True]
    assert sums_on_chip((16, 16, 150), 2) == [False, True, False]
    assert [padded(width) for width in (1, 16, 17, 100, 784)] == [16, 16, 32, 128, 1024]


def dropping(dropouts: Sequence[float], seed: Tensor):
    """Eager layers with dropout after the activations, by PyTorch's own arithmetic of the same random numbers."""

    def forward(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Any], activations: Sequence[str]) -> Tensor:
        for i, p in enumerate(dropouts):
            x = eager(x, weights[i : i + 1], biases[i : i + 1], activations[i : i + 1])
            if p > 0:
                x = x * reference.dropout_scale(seed.cpu(), i, *x.shape, p).to(x.dtype)
        return x

    return forward


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("save", SAVES)
def test_dropout_is_the_same_in_both_passes(activation, save):
    seed = torch.tensor([(1 << 40) + 7], device=DEVICE)
    for stack, dropouts in ((STACKS[0], (0.3, 0.1, 0.0)), (STACKS[2], (0.2, 0.0, 0.4))):
        forward, worst = dropping(dropouts, seed), Worst()
        for number in range(2):
            problem = draw_without_a_bias(*stack, activation, seed=number)
            actual = by_kernels(problem, save, dropouts=dropouts, seed=seed)
            worst.add(actual, run(forward, problem), run(forward, problem.map(Tensor.double)))
        worst.check()


def test_dropout_by_seed_and_place_alone():
    """The share of dropped values is p within six standard deviations, for each layer, and tiles do not matter."""
    x, weights = (
        torch.ones(300, 16, device=DEVICE),
        [torch.ones(20, 16, device=DEVICE), torch.ones(30, 20, device=DEVICE)],
    )

    def dropped(seed: int, tiles: dict[str, int] | None) -> list[Tensor]:
        given = torch.tensor([seed], device=DEVICE)
        stack = x, weights, [None, None], ["sigmoid"] * 2, "all", (0.25, 0.5), given
        return [out == 0 for out in encoder_forward(*stack, config=tiles)]

    plain = dropped(5, None)
    for p, zeros in zip((0.25, 0.5), plain, strict=True):
        assert abs(zeros.double().mean().item() - p) < 6 * (p * (1 - p) / zeros.numel()) ** 0.5
    for tiles, seed, same in (({**SMALL_TILES, "BLOCK_K": 16}, 5, True), (None, 6, False)):
        assert all(torch.equal(a, b) == same for a, b in zip(plain, dropped(seed, tiles), strict=True))
