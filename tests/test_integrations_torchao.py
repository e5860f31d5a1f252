"""torchao: quantised weights are left to its own operators, in a fused model and in an unfused one."""

import copy

import pytest
import torch
from integrated import Net, count_fused, fused, make, make_x, run_example, unfused_layers
from torch import nn
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)

import fastenc
from fastenc import Classifier, Encoder, FusedDense, use_backend

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIGS = (Int8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig, Float8WeightOnlyConfig)


@pytest.mark.parametrize("config", CONFIGS)
def test_quantised_weights_are_left_alone(config, monkeypatch):
    plain = make(Net).eval()
    x = make_x()
    models = {
        "plain": copy.deepcopy(plain),
        "fused before": fused(plain),
        "unfused": fastenc.unfuse(fused(plain)),
    }
    for model in models.values():
        quantize_(model, config())
    models["fused after"] = fastenc.fuse(models["plain"], verbose=False)
    calls = count_fused(monkeypatch)
    expected = models["plain"](x)
    assert not torch.equal(expected, plain(x))
    for name, model in models.items():
        assert torch.equal(model(x), expected), name
    assert not calls
    left = fastenc.fusion_report(models["fused before"]).left
    assert left.keys() == {"fc1", "fc2", "out"}
    assert all("a kind that only its own operators know" in reason for reason in left.values())


def test_some_layers_quantised(monkeypatch):
    model, below = fused(make(Net)), fused(make(Net))
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: name == "out")
    below.out = nn.Identity()
    calls = count_fused(monkeypatch)
    assert torch.equal(model(make_x()), model.out(below(make_x())))
    assert calls == [2, 2]


def is_fused_dense(module, name):
    return isinstance(module, FusedDense)


@pytest.mark.parametrize("config", CONFIGS)
def test_quantised_fused_dense(config):
    encoder = make(lambda: Encoder(6, (8, 4), "gelu"))
    plain = unfused_layers(encoder.layers)
    expected = encoder(make_x())
    quantize_(encoder, config())
    assert torch.equal(encoder(make_x()), expected)  # passed over
    quantize_(encoder, config(), filter_fn=is_fused_dense)
    quantize_(plain, config())
    expected = plain(make_x())
    assert torch.equal(encoder(make_x()), expected)
    with torch.no_grad():
        assert torch.equal(encoder(make_x()), expected)
        assert torch.equal(encoder.layers[0](make_x()), plain[:2](make_x()))


@pytest.mark.parametrize("quantised", [0, 1, 2])
def test_one_layer_of_an_encoder_quantised(quantised):
    encoder = make(lambda: Encoder(6, (8, 8, 4), "gelu"))
    layers = [copy.deepcopy(layer) for layer in encoder.layers]
    for layer in (encoder.layers[quantised], layers[quantised]):
        quantize_(nn.Sequential(layer), Int8WeightOnlyConfig(), filter_fn=is_fused_dense)
    with use_backend("reference"):
        expected = nn.Sequential(*layers)(make_x())
        assert torch.equal(encoder(make_x()), expected)
    torch.testing.assert_close(encoder(make_x()), expected)


@pytest.mark.parametrize("config", CONFIGS)
def test_quantised_plain_models(config):
    """to_plain gives torchao the nn.Linear that it looks for by itself."""
    model = make(lambda: Classifier(Encoder(6, (8, 4), "gelu"), 3)).eval()
    stock = unfused_layers([*model.encoder.layers, model.head]).eval()
    plain = fastenc.to_plain(model)
    assert torch.equal(plain(make_x()), stock(make_x()))
    quantize_(plain, config())
    quantize_(stock, config())
    assert torch.equal(plain(make_x()), stock(make_x()))
    assert not torch.equal(plain(make_x()), model(make_x()))


def test_example():
    names = run_example("torchao")
    assert 0 < names["error"] < 0.05
