"""The rule of accuracy.py finds what it should: planted errors fail, another order of the same sums passes."""

import pytest
import torch
from accuracy import assert_as_accurate, draw, eager, inside_nan, small_integers

from fastenc.activation import ACTIVATIONS


def scaled(x, weights, biases, activations):
    return eager(x, weights, biases, activations) * (1 + 1e-5)


def without_bias(x, weights, biases, activations):
    return eager(x, weights, [None], activations)


def last_column_lost(x, weights, biases, activations):
    return eager(x[:, :-1], [weights[0][:, :-1]], biases, activations)


def wrong_derivative(x, weights, biases, activations):
    out = eager(x, weights, biases, activations)
    return out.detach() + (out - out.detach()) * (1 + 1e-5)


def nan_at_last(x, weights, biases, activations):
    out = eager(x, weights, biases, activations).clone()
    out.data[-1, -1] = torch.nan
    return out


@pytest.mark.parametrize("lie", [scaled, without_bias, last_column_lost, wrong_derivative, nan_at_last])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_planted_errors_are_found(lie, activation):
    with pytest.raises(AssertionError):
        assert_as_accurate((draw(40, (33, 17), activation, seed=seed) for seed in range(8)), lie)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_another_order_of_sums_passes(activation):
    def flipped(x, weights, biases, activations):
        return eager(x.flip(-1), [weights[0].flip(-1)], biases, activations)

    assert_as_accurate((draw(40, (33, 17), activation, seed=seed) for seed in range(8)), flipped)


def test_inputs():
    problem = draw(40, (33, 17), seed=3)
    assert torch.equal(problem.x, draw(40, (33, 17), seed=3).x)
    assert not torch.equal(problem.x, draw(40, (33, 17), seed=4).x)
    assert (problem.x @ problem.weights[0].T + problem.biases[0]).abs().min() > 1e-5
    integers = small_integers(problem, 2)
    assert torch.equal(integers.x, integers.x.round())
    assert integers.x.abs().max() == 2
    view = inside_nan(problem.x)
    assert torch.equal(view, problem.x)
    assert view.data_ptr() % 64 == 4
    assert torch.as_strided(view, (1,), (1,), view.storage_offset() - 1).isnan().all()
