"""Which fp32 layers the CPU backend leaves to ATen where there is no brgemm, alone and in a stack."""

from __future__ import annotations

import itertools

import accuracy
import pytest
import torch
from accuracy import draw, eager, fused
from torch.nn import functional as F

import fastenc
from fastenc.activation import ACTIVATIONS
from fastenc.backends import cpu
from fastenc.ops import record

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def without_brgemm():
    with cpu.configured("generic", False):
        yield


def parts(M: int, *widths: int, training: bool = False, dtype: torch.dtype = torch.float32) -> list[slice]:
    weights = [torch.empty(N, K, dtype=dtype) for K, N in itertools.pairwise(widths)]
    return cpu.parts(torch.empty(M, widths[0], dtype=dtype), weights, training)


def test_a_stack_is_cut_where_a_layer_is_wide_both_ways(without_brgemm):
    assert parts(64, 784, 128, 64, 32, 16) == [slice(0, 4)]
    assert parts(64, 100, 512, 256, 64, 64) == [slice(0, 1), slice(1, 2), slice(2, 4)]
    assert parts(64, 300, 300, 300) == [slice(0, 1), slice(1, 2)]
    assert parts(32, 100, 512, 256, 64, 64) == [slice(0, 4)]  # so few rows are transposed, not the weights


def test_few_rows_of_training_leave_large_weights(without_brgemm):
    assert parts(1, 2048, 2048, 10, training=True) == [slice(0, 1), slice(1, 2)]
    assert parts(1, 2048, 2048, 10, training=False) == [slice(0, 2)]


def test_other_dtypes_and_brgemm_keep_stacks_whole(without_brgemm):
    assert parts(64, 300, 300, 300, dtype=torch.bfloat16) == [slice(0, 2)]
    if "brgemm for float32" in cpu.configure("auto", True):
        assert parts(64, 300, 300, 300) == [slice(0, 2)]


@pytest.mark.parametrize("path", ["everyday", "functions"])
def test_what_is_left_has_the_bits_of_aten(without_brgemm, path):
    problem = draw(40, (40, 300, 300))
    first = problem.x, problem.weights[:1], problem.biases[:1], problem.activations[:1]
    with accuracy.take_path(path), torch.no_grad():
        hidden = fused(*first)
        out = fused(problem.x, problem.weights, problem.biases, problem.activations)
    assert torch.equal(out, eager(hidden, problem.weights[1:], problem.biases[1:], problem.activations[1:]))
    assert not torch.equal(hidden, eager(*first))  # or the test could not tell


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_single_wide_layer_has_the_bits_of_aten(without_brgemm, activation, training):
    torch.manual_seed(0)
    layer, x = fastenc.FusedDense(300, 300, activation=activation), torch.randn(64, 300)
    with torch.set_grad_enabled(training):
        out, wanted = layer(x), ACTIVATIONS[activation].forward(F.linear(x, layer.weight, layer.bias))
    assert torch.equal(out, wanted)
    assert out.requires_grad == training


def test_a_single_wide_layer_under_autocast_is_in_bfloat16(without_brgemm):
    layer, x = fastenc.FusedDense(300, 300), torch.randn(64, 300)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_a_forced_backend_takes_all(without_brgemm):
    problem = draw(40, (40, 300, 300))
    with record() as decisions, fastenc.use_backend("cpu"):
        fused(problem.x, problem.weights, problem.biases, problem.activations)
    assert [(d.widths, d.backend) for d in decisions] == [((40, 300, 300), "cpu")]


def test_explain_tells_of_the_parts(without_brgemm):
    problem = draw(40, (40, 300, 300, 7))
    with record() as decisions, torch.no_grad():
        fused(problem.x, problem.weights, problem.biases, problem.activations)
    assert [(d.widths, d.backend) for d in decisions] == [
        ((40, 300), "cpu"),
        ((300, 300), "eager PyTorch"),
        ((300, 7), "cpu"),
    ]


def test_few_rows_are_left_in_training_a_stack(without_brgemm):
    assert parts(16, 784, 512, 10, training=True) == [slice(0, 1), slice(1, 2)]
    assert parts(15, 784, 512, 10, training=True) == parts(32, 784, 512, 10) == [slice(0, 2)]


def test_a_single_vast_layer_is_left_in_training(without_brgemm):
    def left(rows: int, features: int) -> bool:
        return cpu.leaves(torch.empty(rows, 1024), torch.empty(features, 1024), training=True, in_stack=False)

    assert [left(rows, features) for rows, features in ((15, 2048), (16, 2048), (32, 1024), (33, 1024))] == [
        False,
        True,
        False,
        True,
    ]
