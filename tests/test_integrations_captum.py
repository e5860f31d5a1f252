"""captum: attributions of FusedDense and of fused models are those of the layers without fastenc."""

import pytest
import torch
from captum import attr
from integrated import Net, assert_as_accurate, count_fused, fused, make, make_x, run_example, unfused_layers

from fastenc import Classifier, Encoder, to_plain
from fastenc.activation import ACTIVATIONS

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting (forward, )?backward hooks:UserWarning"),
]


def integrated(model, x):
    return attr.IntegratedGradients(model).attribute(x, target=1, n_steps=8)


def integrated_of_layer(model, x):
    return attr.LayerIntegratedGradients(model, model.fc2).attribute(x, target=1, n_steps=8)


def integrated_of_activation(model, x):
    return attr.LayerIntegratedGradients(model, model.act1).attribute(x, target=1, n_steps=8)


def layer_activation(model, x):
    return attr.LayerActivation(model, model.fc1).attribute(x)


def layer_conductance(model, x):
    return attr.LayerConductance(model, model.fc1).attribute(x, target=1, n_steps=8)


def deep_lift(model, x):
    return attr.DeepLift(model).attribute(x, torch.full_like(x, 0.5), target=1)


def deep_lift_of_layer(model, x):
    return attr.LayerDeepLift(model, model.fc2).attribute(x, torch.full_like(x, 0.5), target=1)


def guided(model, x):
    return attr.GuidedBackprop(model).attribute(x, target=1)


def occlusion(model, x):
    return attr.Occlusion(model).attribute(x, (2,), target=1)


METHODS = (
    integrated,
    integrated_of_layer,
    integrated_of_activation,
    layer_activation,
    layer_conductance,
    deep_lift,
    deep_lift_of_layer,
    guided,
    occlusion,
)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("method", METHODS)
def test_fused_models(method, activation, monkeypatch):
    plain = make(lambda: Net(activation))
    model = fused(plain)
    calls = count_fused(monkeypatch)

    def run(model, dtype):
        return [method(model, make_x().to(dtype))]

    assert_as_accurate(run(model, torch.float32), run, plain)
    if method in (integrated, occlusion):
        assert set(calls) == {3}  # which need no hooks
    calls.clear()
    model(make_x())
    assert calls == [3]  # no hook stays


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_through_encoders(activation):
    model = make(lambda: Classifier(Encoder(6, (8, 5), activation), 3))

    def run(model, dtype):
        layer = model.encoder.layers[0] if isinstance(model, Classifier) else model[1]
        x = make_x().to(dtype)
        of_layer = attr.LayerIntegratedGradients(model, layer).attribute(x, target=1, n_steps=8)
        return [integrated(model, x), of_layer]

    assert_as_accurate(run(model, torch.float32), run, unfused_layers([*model.encoder.layers, model.head]))


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "sigmoid", "tanh"])
def test_deep_lift_of_plain_models(activation):
    """to_plain gives captum the activation modules that it replaces the derivatives of."""
    model = make(lambda: Classifier(Encoder(6, (8, 5), activation), 3))

    def run(model, dtype):
        return [deep_lift(model, make_x().to(dtype))]

    plain = unfused_layers([*model.encoder.layers, model.head])
    assert_as_accurate(run(to_plain(model), torch.float32), run, plain)


def test_example():
    names = run_example("captum")
    assert names["deep_lift"].shape == (4, 16)
    assert names["of_layer"].shape == (4, 32)
