"""explain(): what runs each layer, and why; and that asking changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastenc
from fastenc import ops
from fastenc.backends import cpu

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_stack_runs_on_the_cpu_kernels():
    explanation = fastenc.explain(fastenc.Encoder(784, (128, 64)), torch.randn(32, 784))
    assert explanation.backends == ("cpu",)
    (decision,) = explanation.decisions
    assert decision.shapes == "32 rows, 784-128-64, float32"
    assert cpu.describe() in decision.reason
    assert str(explanation) == f"32 rows, 784-128-64, float32: cpu (fastest for these arguments; {cpu.describe()})"


def test_why_not():
    model = fastenc.Encoder(8, (4,), dtype=torch.float64)
    explanation = fastenc.explain(model, torch.randn(2, 8, dtype=torch.float64))
    assert explanation.backends == ("eager PyTorch",)
    assert "cpu: the kernels take fp32, bf16 or fp16; x is torch.float64" in str(explanation)


def test_asked_for():
    with fastenc.use_backend("reference"):
        explanation = fastenc.explain(fastenc.FusedDense(8, 4), torch.randn(2, 8))
    assert str(explanation) == "2 rows, 8-4, float32: reference (asked for)"


def test_every_layer_of_a_model():
    model = nn.Sequential(fastenc.FusedDense(64, 32), nn.LayerNorm(32), fastenc.Encoder(32, (16, 8)))
    explanation = fastenc.explain(model, torch.randn(5, 7, 64))
    assert [decision.shapes for decision in explanation.decisions] == [
        "35 rows, 64-32, float32",
        "35 rows, 32-16-8, float32",
    ]


def test_an_autoencoder_is_one_stack():
    model = fastenc.AutoEncoder(fastenc.Encoder(64, (32, 8)))
    (decision,) = fastenc.explain(model, torch.randn(5, 64)).decisions
    assert decision.shapes == "5 rows, 64-32-8-32-64, float32"


def test_no_fused_layer():
    assert str(fastenc.explain(nn.Linear(3, 2), torch.randn(1, 3))) == "no fused layer ran"


def test_the_model_is_as_before():
    """Training flags, gradients, running statistics and random numbers."""
    model = nn.Sequential(fastenc.Encoder(8, (6, 4), dropout=0.5), nn.BatchNorm1d(4), nn.Dropout())
    model[2].eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    fastenc.explain(model, torch.randn(5, 8, generator=torch.Generator().manual_seed(0)))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_the_model_is_as_before_after_an_error():
    model = fastenc.Encoder(8, (6, 4), dropout=0.5)
    with pytest.raises(RuntimeError, match="5x3 and 8x6"):
        fastenc.explain(model, torch.randn(5, 3))
    assert all(module.training for module in model.modules())
    assert ops._recorder.get() is None


def test_calls_outside_are_not_recorded():
    layer = fastenc.FusedDense(8, 4)
    explanation = fastenc.explain(layer, torch.randn(2, 8))
    layer(torch.randn(2, 8))
    assert len(explanation.decisions) == 1
