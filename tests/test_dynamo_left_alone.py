"""torch.compile(model, backend="fastenc"): what must not be fused, or not all of it."""

from __future__ import annotations

import pytest
import torch
from compiling import compiled, fused, integers
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor

from fastenc.dynamo.fusing import record

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_compiler")


def used_twice(x, w, v):
    z = F.linear(x, w)
    return F.relu(z) + z


def also_returned(x, w, v):
    z = F.linear(x, w)
    return F.relu(z), z


def changed_in_place_and_returned(x, w, v):
    z = F.linear(x, w)
    z.relu_()
    return z


def seen_through_a_view(x, w, v):
    z = F.linear(x, w)
    view = z.view(-1)
    return F.relu(z), view


def changed_before_the_activation(x, w, v):
    z = F.linear(x, w)
    z.add_(1)
    return F.relu(z)


def weight_changes_between_layers(x, w, v):
    v = v.clone()
    h = F.relu(F.linear(x, w))
    v.mul_(2)
    return F.relu(F.linear(h, v))


def input_changes_after_linear(x, w, v):
    x = x.clone()
    z = F.linear(x, w)
    x.add_(1)
    return F.relu(z), x


def gradients_stop_between(x, w, v):
    z = F.linear(x, w)
    with torch.no_grad():
        return F.relu(z)


def other_slope(x, w, v):
    return F.leaky_relu(F.linear(x, w), 0.25)


def hidden_used_twice(x, w, v):
    h = F.relu(F.linear(x, w))
    return F.relu(F.linear(h, v)) + h.sum()


def hidden_is_the_weight(x, w, v):
    h = F.relu(F.linear(w, v))
    return F.relu(F.linear(h, h))


def into_another_tensor(x, w, v):
    z = F.linear(x, w)
    return torch.sigmoid(z, out=torch.empty_like(z))


def dropped_between(x, w, v):
    return F.relu(F.linear(F.dropout(F.relu(F.linear(x, w)), 1.0), v))


def vector_weight(x, w, v):
    return F.relu(F.linear(x, w[0]))


def scalar_bias(x, w, v):
    return F.relu(F.linear(x, w, torch.ones(1)))


NOT_ONE = {  # how many operators there are
    used_twice: 0,
    also_returned: 0,
    changed_in_place_and_returned: 0,
    seen_through_a_view: 0,
    changed_before_the_activation: 0,
    weight_changes_between_layers: 2,
    input_changes_after_linear: 0,
    gradients_stop_between: 0,
    other_slope: 0,
    hidden_used_twice: 2,
    hidden_is_the_weight: 2,
    into_another_tensor: 0,
    dropped_between: 2,
    vector_weight: 0,
    scalar_bias: 0,
}


@pytest.mark.parametrize("function", NOT_ONE, ids=lambda f: f.__name__)
def test_left_alone(always_fused, function):
    x, w, v = integers(3, 5), integers(5, 5), integers(5, 5)
    with record() as found:
        actual = compiled(function)(x, w, v)
    torch.testing.assert_close(actual, function(x, w, v))
    assert len(fused(found)) == NOT_ONE[function], found
    assert all(part.reason is None or len(part.reason) > 10 for part in found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.complex64], ids=str)
def test_other_dtypes(always_fused, dtype):
    def chain(x, w):
        out = F.linear(F.linear(x, w), w)
        return out.tanh() if dtype.is_complex else out.relu()

    x, w = integers(3, 5, dtype=dtype), integers(5, 5, dtype=dtype)
    with record() as found:
        torch.testing.assert_close(compiled(chain)(x, w), chain(x, w))
    assert len(found) == 2
    assert not fused(found)


def test_subclasses_of_tensors(always_fused):
    x, weight = integers(3, 5), TwoTensor(integers(4, 5), integers(4, 5))

    def layer(x, w):
        return F.relu(F.linear(x, w))

    with record() as found:
        actual = compiled(layer)(x, weight)
    assert [part.reason for part in found] == ["not of plain dense tensors"]
    assert torch.equal(actual.b, layer(x, weight.b))


@pytest.mark.parametrize("in_dims", [(0, None), (0, 0)], ids=str)
def test_within_vmap_and_grad(always_fused, in_dims):
    """Inside a transform of torch.func, the compiler sees through ATen's functions."""

    def loss(weight, row):
        return F.relu(F.linear(row, weight)).square().sum()

    def gradients(x, weight):
        return torch.vmap(torch.func.grad(loss), in_dims=in_dims[::-1])(weight, x)

    x, weight = integers(6, 5), integers(*([6] if in_dims[1] == 0 else []), 4, 5)
    with record() as found:
        assert torch.equal(compiled(gradients)(x, weight), gradients(x, weight))
    assert not fused(found)
