"""Mistakes planted in copies of the Triton kernels: each is caught by a test of the kernels, which says why."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import interpreter  # first: it decides how kernels run
import pytest
import test_kernels_dense as dense
import torch
from accuracy import Problem, Worst, assert_same, draw, eager, run, small_integers
from fastenc.kernels.encoder_backward import encoder_backward
from fastenc.kernels.encoder_forward import encoder_forward
from guards import guarded, guarded_allocations
from interpreter import OutOfBounds, Race
from torch import Tensor

KERNELS = Path(__file__).parents[1] / "kernels" / "triton"

pytestmark = pytest.mark.skipif(not interpreter.INTERPRETED, reason="on a GPU a mistake could end the process")


@dataclass(frozen=True)
class Mistake:
    """`code`, which must be once in `file`, replaced; the test that sees it, and how that fails."""

    name: str
    file: str
    code: str
    replacement: str
    test: Callable[[], object]
    fails_with: type[AssertionError]
    message: str


def integers() -> None:
    dense.test_exact_on_integers(torch.float32, False)


def strides() -> None:
    dense.test_any_strides("transposed", False)


def splits() -> None:
    dense.test_exact_over_many_splits_of_the_rows(False)


def nan_and_inf() -> None:
    dense.test_nan_and_inf_as_in_pytorch("relu", False)


def gradient_at_nan() -> None:
    """Where relu's output is NaN the gradient passes, to finite numbers."""
    problem = small_integers(draw(40, (21, 19), "relu", torch.float32))
    problem.x[3, 5] = torch.nan
    expected = run(eager, problem)
    assert expected["grad_x"][3].abs().max() > 0
    assert_same(dense.by_kernels(problem), expected)


def dropout() -> None:
    dense.test_dropout_drops_the_same_in_both_passes("sigmoid", torch.float32, False)


def precision() -> None:
    dense.test_tf32_where_pytorch_allows_it(False)


WIDTHS = (20, 18, 17, 5)  # each with a remainder for tiles of powers of two


def encoder_integers() -> None:
    for save in ("all", "needed"):
        problem = small_integers(draw(67, WIDTHS, "relu"), 1)
        assert_same(by_encoder(problem, save), run(eager, problem))


def encoder_rows() -> None:
    """So many rows that several programs share them, and each has several blocks."""
    problem = small_integers(draw(1500, WIDTHS, "relu"), 1)
    assert_same(by_encoder(problem, "needed"), run(eager, problem))


def encoder_dropout() -> None:
    """A backward pass that finds hidden outputs again drops what the forward pass dropped."""
    p, seed = 0.3, torch.tensor([5])
    problem = draw(67, WIDTHS, "sigmoid")
    outs = encoder_forward(problem.x, problem.weights, problem.biases, problem.activations, "all", (p,) * 3, seed)

    def dropped(x, weights, biases, activations):
        for weight, bias, activation, out in zip(weights, biases, activations, outs, strict=True):
            x = eager(x, [weight], [bias], [activation]) * (out != 0) / (1 - p)
        return x

    worst = Worst()
    expected, exact = run(dropped, problem), run(dropped, problem.map(Tensor.double))
    worst.add(by_encoder(problem, "needed", p, seed), expected, exact)
    worst.check()


def by_encoder(problem: Problem, save: str, p: float = 0.0, seed: Tensor | None = None) -> dict[str, Tensor]:
    """The results of the encoder kernels, named as `accuracy.run` has them."""
    dropouts = (p,) * len(problem.weights)
    with guarded_allocations():
        given = problem.map(guarded)
        stack = (given.x, given.weights, given.biases)
        results = encoder_forward(*stack, given.activations, save, dropouts, seed)
        mask = (True,) * (1 + 2 * len(problem.weights))
        grads = encoder_backward(given.grad_out, *stack, results, given.activations, mask, dropouts, seed)
    names = ("out", *(f"grad_{name}" for name in problem.leaves()))
    return dict(zip(names, (results[len(problem.weights) - 1], *grads), strict=True))


def wrong(name: str) -> tuple[type[AssertionError], str]:
    """A comparison fails, and it is of this result."""
    return AssertionError, f"^{name}(: | is off by )"


STACK, CHAIN = "encoder_forward.py", "encoder_chain.py"
FORWARD, BACKWARD, WEIGHT = "dense_forward.py", "dense_input_gradient.py", "weight_gradient.py"
MISTAKES = (
    Mistake(
        "a store without mask", FORWARD, "total.to(out_ptr.dtype.element_ty), mask=inside)",
        "total.to(out_ptr.dtype.element_ty))", integers, OutOfBounds, "tl.store",
    ),
    Mistake(
        "a load without mask", FORWARD, "mask=in_m & in_k, other=0.0", "", integers, OutOfBounds, "tl.load",
    ),
    Mistake(
        "a load with the mask of the rows alone", FORWARD, "mask=in_m & in_k, other=0.0", "mask=in_m, other=0.0",
        integers, OutOfBounds, "tl.load",
    ),
    Mistake(
        "swapped strides", FORWARD, "m[:, None] * stride_xm + k[None, :] * stride_xk",
        "m[:, None] * stride_xk + k[None, :] * stride_xm", integers, OutOfBounds, "tl.load",
    ),
    Mistake(
        "strides taken for those of a contiguous matrix", BACKWARD, "n[:, None] * stride_wn + k[None, :] * stride_wk",
        "n[:, None] * K + k[None, :]", strides, OutOfBounds, "tl.load",
    ),
    Mistake(
        "a bias without mask", FORWARD, "n * stride_b, mask=in_n, other=0.0)", "n * stride_b)", integers, OutOfBounds,
        "tl.load",
    ),
    Mistake(
        "a bias that is not added", FORWARD, "total += bias.to(tl.float32)[None, :]", "bias", integers, *wrong("out"),
    ),
    Mistake(
        "a relu that loses NaN", "activation.py", "z = tl.where(z <= 0, 0.0, z)", "z = tl.maximum(z, 0.0)",
        nan_and_inf, *wrong("out"),
    ),
    Mistake(
        "a derivative of relu that stops at NaN", "activation.py", "grad = tl.where(saved <= 0, 0.0, grad)",
        "grad = tl.where(saved > 0, grad, 0.0)", gradient_at_nan, *wrong("grad_x"),
    ),
    Mistake(
        "dZ of rows that are not there", WEIGHT, "in_mn = in_m[:, None] & in_n[None, :]",
        "in_mn = (m >= 0)[:, None] & in_n[None, :]", integers, OutOfBounds, "tl.load",
    ),
    Mistake(
        "rows counted twice", WEIGHT, "end_m = tl.minimum(first_m + rows_per_split, M)",
        "end_m = tl.minimum(first_m + rows_per_split + BLOCK_M, M)", splits, *wrong("grad_weight0"),
    ),
    Mistake(
        "rows missed", WEIGHT, "end_m = tl.minimum(first_m + rows_per_split, M)",
        "end_m = tl.minimum(first_m + rows_per_split - 1, M)", splits, *wrong("grad_weight0"),
    ),
    Mistake(
        "a bias gradient of the wrong programs", WEIGHT, "if tile_k == 0:", "if tile_k == 1:", integers,
        *wrong("grad_bias0"),
    ),
    Mistake(
        "a bias gradient stored by all programs", WEIGHT, "mask=in_n & (tile_k == 0))", "mask=in_n)", integers, Race,
        "another program stored",
    ),
    Mistake(
        "a reduction without the last partial sum", "reduce.py", "(rows[:, None] < counts[i])",
        "(rows[:, None] < counts[i] - 1)", splits, *wrong("grad_weight0"),
    ),
    Mistake(
        "a reduction without mask", "reduce.py", "mask=columns < sizes[i])", "mask=columns >= 0)", splits, OutOfBounds,
        "tl.store",
    ),
    Mistake(
        "another layer's dropout in grad_x", BACKWARD, "dropout_scale(seed_ptr, 0,", "dropout_scale(seed_ptr, 1,",
        dropout, *wrong("grad_x"),
    ),
    Mistake(
        "another layer's dropout in grad_weight", WEIGHT, "dropout_scale(seed_ptr, INDEX,",
        "dropout_scale(seed_ptr, INDEX + 1,", dropout, *wrong("grad_weight0"),
    ),
    Mistake(
        "TF32 where it is not allowed", FORWARD, '"PRECISION": precision(x.dtype)', '"PRECISION": "tf32"', precision,
        AssertionError, "not equal",
    ),
    Mistake(
        "a derivative of what dropout scaled", "activation.py", "saved = saved * (1.0 - P)", "saved = saved * 1.0",
        dropout, *wrong("grad_x"),
    ),
    Mistake(
        "an encoder's bias without mask", STACK, "tl.load(bias_ptr + n, mask=n < width, other=0.0)",
        "tl.load(bias_ptr + n)", encoder_integers, OutOfBounds, "tl.load",
    ),
    Mistake(
        "an encoder's store without mask of the columns", STACK, "tl.store(out_ptr + offsets, out, mask=in_mn)",
        "tl.store(out_ptr + offsets, out, mask=in_m[:, None])", encoder_integers, Race,
        "an address twice",
    ),
    Mistake(
        "an encoder's weight without mask", "tiles.py", "(row[:, None] < rows) & (column[None, :] < columns)",
        "row[:, None] < rows", encoder_integers, OutOfBounds, "tl.load",
    ),
    Mistake(
        "an encoder's rows counted twice", CHAIN, "end_m = tl.minimum(first_m + rows_per_program, M)",
        "end_m = tl.minimum(first_m + rows_per_program + 1, M)", encoder_rows, Race, "another program stored",
    ),
    Mistake(
        "another layer's dropout in the chain", CHAIN, "scale = dropout_scale(seed_ptr, i, rows, tl.arange",
        "scale = dropout_scale(seed_ptr, i + 1, rows, tl.arange", encoder_dropout, *wrong("grad_x"),
    ),
)  # fmt: skip


@pytest.fixture
def plant(tmp_path, monkeypatch):
    """Makes a copy of the kernels with a mistake in it; the tests of the kernels meet the copy."""

    def make(file: str, code: str, replacement: str) -> None:
        name = "planted_kernels"
        shutil.copytree(KERNELS, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        source = (tmp_path / name / file).read_text()
        assert source.count(code) == 1, f"{file} has {source.count(code)} times, not once: {code}"
        (tmp_path / name / file).write_text(source.replace(code, replacement))
        for module in [module for module in sys.modules if module.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.syspath_prepend(tmp_path)
        for launcher in ("dense_forward", "dense_backward", "dense_input_gradient"):
            planted = importlib.import_module(f"{name}.{launcher}")
            monkeypatch.setattr(dense, launcher, getattr(planted, launcher))
        for launcher in ("encoder_forward", "encoder_backward"):
            planted = importlib.import_module(f"{name}.{launcher}")
            monkeypatch.setitem(globals(), launcher, getattr(planted, launcher))

    return make


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_is_caught(plant, mistake):
    plant(mistake.file, mistake.code, mistake.replacement)
    with pytest.raises(mistake.fails_with, match=mistake.message):
        mistake.test()


@pytest.mark.parametrize("test", dict.fromkeys(mistake.test for mistake in MISTAKES), ids=lambda test: test.__name__)
def test_a_copy_without_mistakes_passes(plant, test):
    plant("device.py", "import triton\n", "import triton\n\n")
    test()
