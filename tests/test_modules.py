"""FusedDense: nn.Linear's parameters and habits."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from accuracy import PATHS, assert_same, take_path
from torch import nn
from torch.nn.utils import parametrize

import fastenc
from fastenc import FusedDense
from fastenc.activation import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("one_thread")


def results(layer: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a forward and a backward pass: out and the gradients of the parameters, by name."""
    layer.zero_grad()
    out = layer(x)
    out.sum().backward()
    return {"out": out.detach(), **{name: p.grad for name, p in layer.named_parameters() if p.grad is not None}}


X = torch.randint(-2, 3, (5, 4)).float()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 3), (0, 3), (4, 0), (1, 1)])
def test_the_same_seed_gives_linear_s_parameters(shape, bias):
    layers = []
    for kind in (nn.Linear, FusedDense):
        torch.manual_seed(0)
        # nn.Linear warns that it initialises nothing; so do we, through the same function.
        if 0 in shape:
            with pytest.warns(UserWarning, match="zero-element"):
                layers.append(kind(*shape, bias=bias))
        else:
            layers.append(kind(*shape, bias=bias))
    assert_same(layers[1].state_dict(), layers[0].state_dict())
    assert [p.requires_grad for p in layers[1].parameters()] == [p.requires_grad for p in layers[0].parameters()]


@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_goes_both_ways(bias):
    linear, fused = nn.Linear(4, 3, bias), FusedDense(4, 3, bias)
    fused.load_state_dict(linear.state_dict())
    assert_same(fused.state_dict(), linear.state_dict())
    fused.reset_parameters()
    linear.load_state_dict(fused.state_dict())
    assert_same(fused.state_dict(), linear.state_dict())
    assert fused.bias is None or bias


def test_state_dict_of_another_shape_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch"):
        FusedDense(4, 3).load_state_dict(nn.Linear(4, 5).state_dict())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_is_linear_then_the_activation(activation):
    layer = FusedDense(4, 3, activation=activation, dtype=torch.float64)
    linear = nn.Linear(4, 3, dtype=torch.float64)
    linear.load_state_dict(layer.state_dict())
    assert torch.equal(layer(X.double()), ACTIVATIONS[activation].forward(linear(X.double())))


def test_is_not_a_linear():
    assert not isinstance(FusedDense(4, 3), nn.Linear)


def test_unknown_activation():
    with pytest.raises(ValueError, match="unknown activation 'softplus'; choose one of identity"):
        FusedDense(4, 3, activation="softplus")


def test_repr():
    assert repr(FusedDense(4, 3, activation="gelu")) == (
        "FusedDense(in_features=4, out_features=3, bias=True, activation='gelu')"
    )
    assert "bias=False" in repr(FusedDense(4, 3, bias=False))


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(name, how):
    layer = FusedDense(4, 3, activation="silu")
    with take_path(name):
        expected = results(layer, X)
        if how == "deepcopy":
            twin = copy.deepcopy(layer)
        elif how == "pickle":
            twin = pickle.loads(pickle.dumps(layer))
        else:
            file = io.BytesIO()
            torch.save(layer, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        assert_same(results(twin, X), expected)
        with torch.no_grad():
            twin.weight.zero_()
        assert_same(results(layer, X), expected)


def test_meta_then_real():
    layer = FusedDense(4, 3, device="meta")
    assert layer.weight.is_meta
    layer = layer.to_empty(device="cpu")
    layer.load_state_dict(nn.Linear(4, 3).state_dict())
    assert layer(X).shape == (5, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_to_another_dtype(dtype):
    layer = FusedDense(4, 3).to(dtype)
    assert layer(X.to(dtype)).dtype == dtype
    with pytest.raises(RuntimeError, match="dtype"):
        layer(X)


def test_a_weight_replaced_or_shared_is_used():
    layer, other = FusedDense(4, 3), FusedDense(4, 3)
    layer.weight = other.weight
    layer.bias = None
    assert_same({"out": layer(X).detach()}, {"out": torch.relu(X @ other.weight.T).detach()})
    results(layer, X)
    assert other.weight.grad is not None


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def test_parametrizations():
    layer = FusedDense(4, 3, activation="identity")
    expected = X @ (2 * layer.weight.detach()).T + layer.bias.detach()
    parametrize.register_parametrization(layer, "weight", Doubled())
    torch.testing.assert_close(layer(X).detach(), expected)
    layer(X).sum().backward()
    assert layer.parametrizations.weight.original.grad is not None


def test_hooks():
    seen = []
    layer = FusedDense(4, 3)
    layer.register_forward_pre_hook(lambda module, args: seen.append("pre"))
    layer.register_forward_hook(lambda module, args, out: seen.append("forward"))
    layer.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append("backward"))
    results(layer, X.clone().requires_grad_())
    assert seen == ["pre", "forward", "backward"]


def test_wrong_input_raises_as_linear_does():
    for x in (torch.ones(5, 3), torch.ones(5, 4).double(), torch.ones(5, 4).long(), torch.ones(())):
        errors = []
        for layer in (nn.Linear(4, 3), FusedDense(4, 3)):
            with pytest.raises(Exception) as caught:
                layer(x)
            errors.append(caught.value)
        assert type(errors[0]) is type(errors[1])


def test_training_follows_linear_s():
    """The same steps from the same start, as far as rounding lets them."""
    torch.manual_seed(0)
    fused = nn.Sequential(FusedDense(4, 8, activation="tanh"), FusedDense(8, 1, activation="identity"))
    plain = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    plain[0].load_state_dict(fused[0].state_dict())
    plain[2].load_state_dict(fused[1].state_dict())
    x = torch.randn(64, 4)
    losses = []
    for model in (fused, plain):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(20):
            optimizer.zero_grad()
            loss = (model(x) - x.sum(1, keepdim=True)).pow(2).mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_public_names():
    assert {"FusedDense", "fused_dense", "encoder", "Encoder", "explain", "use_backend"} <= set(fastenc.__all__)
