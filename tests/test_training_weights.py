"""What is kept of a model's weights, and whether they are finite."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastenc.training.weights import all_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_seen(bad, dtype):
    layer = nn.Linear(7, 5).to(dtype)
    assert all_finite(layer)
    with torch.no_grad():
        layer.bias[2] = bad
    assert not all_finite(layer)


def test_weights_whose_sum_overflows_are_finite():
    layer = nn.Linear(7, 5)
    nn.init.constant_(layer.weight, 3e38)
    assert not layer.weight.sum().isfinite()
    assert all_finite(layer)
