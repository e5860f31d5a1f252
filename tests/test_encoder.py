"""Encoder, AutoEncoder and the heads: equal to their layers one by one, and to what users change in them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from accuracy import PATHS, Problem, Worst, draw, eager, run, take_path
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from fastenc import AutoEncoder, Classifier, Encoder, FusedDense, Regressor
from fastenc.activation import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.randn(20, 9, generator=torch.Generator().manual_seed(0))


def results(model: nn.Module, x: Tensor, forward=None, grad_out: Tensor | None = None) -> dict[str, Tensor]:
    """Of a forward and a backward pass: out, grad of x and of the parameters, by name."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    out = (forward or model)(x)
    out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape) if grad_out is None else grad_out)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "grad_x": x.grad, **grads}


def by_eager(*stacks: nn.Module):
    """The layers of `stacks` one after the other, by F.linear and the activation."""

    def forward(x: Tensor) -> Tensor:
        for stack in stacks:
            for layer in stack.layers if isinstance(stack, Encoder) else [stack]:
                x = ACTIVATIONS[layer.activation].forward(F.linear(x, layer.weight, layer.bias))
        return x

    return forward


def assert_model_as_accurate(make, stacks_of) -> None:
    """The rule of accuracy.py for a model, with weights drawn so that no rounding decides at a kink."""
    worst = Worst()
    for seed in range(32):
        torch.manual_seed(seed)
        model = make()
        layers = [m for m in model.modules() if isinstance(m, FusedDense)]
        widths = (layers[0].in_features, *(layer.out_features for layer in layers))
        names = [layer.activation for layer in layers]
        problem = draw(40, widths, names, seed=seed, bias=layers[0].bias is not None)
        with torch.no_grad():
            for layer, weight, bias in zip(layers, problem.weights, problem.biases, strict=True):
                layer.weight.copy_(weight)
                if layer.bias is not None:
                    layer.bias.copy_(bias)
        exact = copy.deepcopy(model).double()
        worst.add(
            results(model, problem.x, model, problem.grad_out),
            results(model, problem.x, by_eager(*stacks_of(model)), problem.grad_out),
            results(exact, problem.x.double(), by_eager(*stacks_of(exact)), problem.grad_out.double()),
        )
    worst.check()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_encoder_equals_its_layers(path, activation):
    assert_model_as_accurate(lambda: Encoder(9, (17, 5), activation), lambda m: [m])


@pytest.mark.parametrize("final", ACTIVATIONS)
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_mixed_final_activation(path, activation, final):
    make = lambda: Encoder(9, (17, 16), activation, final_activation=final)  # noqa: E731
    assert [layer.activation for layer in make().layers] == [activation, final]
    assert_model_as_accurate(make, lambda m: [m])


def test_no_bias_and_one_layer(path):
    assert all(layer.bias is None for layer in Encoder(9, (17, 5), bias=False).layers)
    assert_model_as_accurate(lambda: Encoder(9, (17, 5), bias=False), lambda m: [m])
    assert_model_as_accurate(lambda: Encoder(9, (17,)), lambda m: [m])


def test_autoencoder_equals_its_layers(path):
    assert_model_as_accurate(lambda: AutoEncoder(Encoder(9, (17, 16)), "sigmoid"), lambda m: [m.encoder, m.decoder])
    model = AutoEncoder(Encoder(9, (17, 5)))
    torch.testing.assert_close(model(X), model.decode(model.encode(X)))
    assert model.encode(X).shape == (20, 5)


def test_heads_equal_their_layers(path):
    assert_model_as_accurate(lambda: Classifier(Encoder(9, (17, 16)), 4), lambda m: [m.encoder, m.head])
    assert_model_as_accurate(lambda: Regressor(Encoder(9, (17, 16)), 2), lambda m: [m.encoder, m.head])
    model = Classifier(Encoder(9, (17, 5)), 4)
    assert (model(X).shape, model.encode(X).shape) == ((20, 4), (20, 5))


def test_shapes_of_the_mirror():
    model = AutoEncoder(Encoder(100, (128, 64, 16), activation="tanh", bias=False, dropout=0.25), "sigmoid")
    assert [tuple(layer.weight.shape) for layer in model.decoder.layers] == [(64, 16), (128, 64), (100, 128)]
    assert [layer.activation for layer in model.decoder.layers] == ["tanh", "tanh", "sigmoid"]
    assert model.decoder.layers[0].bias is None
    assert model.decoder.dropout == 0.25


@pytest.mark.parametrize("leading", [(), (0,), (2, 3), (2, 1, 3, 1, 2)], ids=str)
def test_leading_dimensions(path, leading):
    model = Classifier(Encoder(9, (17, 5)), 4)
    out = model(torch.ones(*leading, 9))
    assert out.shape == (*leading, 4)
    if out.numel():
        expected = model(torch.ones(9)).expand_as(out)
        torch.testing.assert_close(out, expected)


# What is refused.


@pytest.mark.parametrize("widths", [(), []])
def test_no_widths(widths):
    with pytest.raises(ValueError, match="widths is empty; an Encoder needs at least one layer, for example widths="):
        Encoder(9, widths)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, 1.5, float("nan")])
def test_bad_dropout(dropout):
    with pytest.raises(ValueError, match=r"dropout is .*; it must be at least 0 and less than 1"):
        Encoder(9, (4,), dropout=dropout)


def test_unknown_activations():
    with pytest.raises(ValueError, match="unknown activation 'rleu'"):
        Encoder(9, (4, 3), activation="rleu")
    with pytest.raises(ValueError, match="unknown activation 'sgmoid'"):
        AutoEncoder(Encoder(9, (4, 3)), "sgmoid")


def test_wrong_number_of_features(path):
    with pytest.raises(RuntimeError, match="20x9 and 8x17"):
        Encoder(8, (17, 5))(X)


# Dropout.


def test_dropout_only_while_training():
    model = Encoder(9, (17, 5), dropout=0.5)
    assert not torch.equal(model(X), model(X))
    model.eval()
    assert torch.equal(model(X), model(X))
    plain = Encoder(9, (17, 5))
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(X), plain(X))


def test_dropout_is_between_layers_and_follows_the_seed():
    model = Encoder(9, (17, 8, 5), activation="tanh", dropout=0.5)

    def by_layers(x: Tensor) -> Tensor:
        for layer in model.layers[:-1]:
            x = F.dropout(layer(x), 0.5)
        return model.layers[-1](x)

    for _ in range(3):
        torch.manual_seed(3)
        out = model(X)
        torch.manual_seed(3)
        assert torch.equal(out, by_layers(X))
    assert (model(X) != 0).all()  # nothing of the last layer is dropped


def test_dropout_of_an_autoencoder_and_a_head():
    for model in (AutoEncoder(Encoder(9, (17, 5), dropout=0.5)), Classifier(Encoder(9, (17, 5), dropout=0.5), 3)):
        assert not torch.equal(model(X), model(X))
        model.eval()
        assert torch.equal(model(X), model(X))


# What users change.


def test_hooks_on_inner_layers_see_their_tensors(path):
    model = AutoEncoder(Encoder(9, (17, 5), activation="tanh"))
    plain = results(model, X)
    seen = {}
    first, last = model.encoder.layers[0], model.decoder.layers[-1]
    handles = [
        first.register_forward_hook(lambda module, args, out: seen.update(first=(args[0].detach(), out.detach()))),
        last.register_forward_pre_hook(lambda module, args: seen.update(last=args[0].detach())),
        model.encoder.register_forward_hook(lambda module, args, out: seen.update(code=out.detach())),
        first.register_full_backward_hook(lambda module, grads, outs: seen.update(grad=grads[0])),
    ]
    hooked = results(model, X)
    for name, value in hooked.items():
        torch.testing.assert_close(value, plain[name])
    torch.testing.assert_close(seen["first"], (X, first(X).detach()))
    torch.testing.assert_close(seen["code"], model.encoder(X).detach())
    assert seen["last"].shape == (20, 17)
    torch.testing.assert_close(seen["grad"], hooked["grad_x"])
    for handle in handles:
        handle.remove()
    seen.clear()
    results(model, X)
    assert not seen


def test_a_hook_may_change_the_output(path):
    model = Encoder(9, (17, 5), activation="identity", bias=False)
    expected = 2 * model(X)
    model.layers[0].register_forward_hook(lambda module, args, out: 2 * out)
    torch.testing.assert_close(model(X), expected)


def test_global_hooks_see_every_layer(path):
    model = AutoEncoder(Encoder(9, (17, 5)))
    seen = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: seen.append(type(module).__name__)
    )
    try:
        model(X)
    finally:
        handle.remove()
    assert seen == ["FusedDense", "FusedDense", "Encoder"] * 2 + ["AutoEncoder"]


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("which", [0, 1])
def test_parametrizations_of_inner_layers(path, which):
    model = Encoder(9, (17, 5), activation="identity", bias=False)
    expected = 2 * model(X)
    parametrize.register_parametrization(model.layers[which], "weight", Doubled())
    torch.testing.assert_close(model(X), expected)


def test_replaced_inner_layers(path):
    model = Encoder(9, (17, 5))
    model.layers[0] = nn.Sequential(nn.Linear(9, 17), nn.Softplus())
    torch.testing.assert_close(model(X), model.layers[1](model.layers[0](X)))
    model = Encoder(9, (17, 5))
    model.layers[1] = nn.Identity()
    assert model(X).shape == (20, 17)


def test_a_subclass_of_a_layer_is_called(path):
    class Shifted(FusedDense):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    model = Encoder(9, (17, 5))
    model.layers[0] = Shifted(9, 17)
    torch.testing.assert_close(model(X), model.layers[1](model.layers[0](X)))


def test_a_replaced_encoder_or_head(path):
    model = Classifier(Encoder(9, (17, 5)), 3)
    model.head = nn.Linear(5, 7)
    torch.testing.assert_close(model(X), model.head(model.encoder(X)))
    model.encoder = nn.Linear(9, 5)
    torch.testing.assert_close(model(X), model.head(model.encoder(X)))


def test_a_layer_whose_forward_is_replaced_on_the_instance(path):
    """As quantisation and profiling tools do."""
    model = Encoder(9, (17, 5))
    layer = model.layers[0]
    layer.forward = lambda x: torch.zeros(len(x), 17)
    torch.testing.assert_close(model(X), model.layers[1](torch.zeros(20, 17)))


# Freezing.


def saved_bytes(call) -> int:
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = call()
    assert out.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_frozen_lower_layers(path, activation):
    """No gradient, and nothing is kept for them: only what the layers above them need."""
    model = Encoder(64, (128, 32, 8), activation)
    for layer in model.layers[:2]:
        layer.requires_grad_(False)
    x = torch.randn(50, 64)
    hidden = by_eager(*model.layers[:2])(x)
    top = by_eager(model.layers[2])
    assert saved_bytes(lambda: model(x)) <= saved_bytes(lambda: top(hidden)) + 50 * 8 * 4
    model(x).sum().backward()
    assert [p.grad is None for p in model.parameters()] == [True] * 4 + [False] * 2
    top(hidden).sum().backward(inputs=[weight := model.layers[2].weight])
    torch.testing.assert_close(weight.grad / 2, torch.autograd.grad(top(hidden).sum(), weight)[0])


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)], ids=str)
def test_frozen_layers_of_any_place(path, frozen):
    """Gradients of the others and of x are as without freezing."""
    model = Encoder(9, (17, 6, 5), activation="silu")
    everything = results(model, X)
    for i in frozen:
        model.layers[i].requires_grad_(False)
    some = results(model, X)
    names = {f"layers.{i}.{name}" for i in range(3) if i not in frozen for name in ("weight", "bias")}
    assert some.keys() == {"out", "grad_x", *names}
    for name, value in some.items():
        torch.testing.assert_close(value, everything[name])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_training_keeps_no_more_than_eager(path, activation):
    model = AutoEncoder(Encoder(64, (48, 32, 8), activation))
    plain = by_eager(model.encoder, model.decoder)
    x = torch.randn(50, 64)
    for loss in (lambda out: F.mse_loss(out, x), torch.sum):
        assert saved_bytes(lambda s=loss: s(model(x))) <= saved_bytes(lambda s=loss: s(plain(x)))


# Copies and devices.


@pytest.mark.parametrize("name", PATHS)
def test_copies(name):
    model = AutoEncoder(Encoder(9, (17, 5), dropout=0.1)).eval()
    with take_path(name):
        expected = model(X)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(X), expected)
            assert twin.encoder.dropout == 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_dtype_of_the_whole_model(dtype):
    model = AutoEncoder(Encoder(9, (17, 5), dtype=dtype))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model(X.to(dtype)).dtype == dtype


def test_low_precision_model_is_as_accurate_as_pytorch(path):
    problem_of = lambda seed: draw(40, (9, 17, 16), "tanh", torch.bfloat16, seed=seed)  # noqa: E731

    def forward(x: Tensor, weights, biases, activations) -> Tensor:
        model = Encoder(9, (17, 16), "tanh", dtype=torch.bfloat16)
        for layer, weight, bias in zip(model.layers, weights, biases, strict=True):
            layer._parameters.update(weight=weight, bias=bias)
        return model(x)

    worst = Worst()
    for seed in range(8):
        problem: Problem = problem_of(seed)
        worst.add(run(forward, problem), run(eager, problem), run(eager, problem.map(Tensor.double)))
    worst.check()
