"""opacus: gradients of each sample are autograd's, for FusedDense and for fused models; steps of DP-SGD are alike."""

import copy

import opacus
import pytest
import torch
from integrated import (
    Net,
    assert_as_accurate,
    assert_within,
    count_fused,
    fused,
    make,
    make_x,
    run_example,
    unfused_layers,
)
from opacus.grad_sample import GradSampleHooks, GradSampleModule
from opacus.grad_sample.utils import get_gsm_class
from torch import nn
from torch.nn import functional as F

import fastenc
from fastenc import Classifier, Encoder, FusedDense
from fastenc.activation import ACTIVATIONS
from fastenc.integrations import opacus as integration

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Of every first layer, whose input is data.
    pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients are computed:UserWarning"),
]


@pytest.fixture
def registered():
    integration.register()
    yield
    for table in (GradSampleHooks.GRAD_SAMPLERS, get_gsm_class("ghost").NORM_SAMPLERS):
        del table[FusedDense]


class Scaled(nn.Module):
    """Has a parameter of its own, so that opacus runs all of it under torch.func."""

    def __init__(self):
        super().__init__()
        self.scale, self.fc1, self.fc2 = nn.Parameter(torch.ones(6)), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x * self.scale)))


def loss_of(out):
    return out.flatten(1).square().sum(1)


def by_autograd(model, dtype, x=None):
    """Of each parameter [B, *its shape], one sample after the other."""
    x = make_x() if x is None else x
    rows = [torch.autograd.grad(loss_of(model(row[None].to(dtype))).sum(), list(model.parameters())) for row in x]
    return [torch.stack(grads) for grads in zip(*rows, strict=True)]


def by_opacus(model, x=None, mode="hooks", **options):
    wrapped = get_gsm_class(mode)(copy.deepcopy(model), **options)
    loss_of(wrapped(make_x() if x is None else x)).mean().backward()
    return [parameter.grad_sample for parameter in wrapped.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("mode", ["hooks", "functorch"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_samples_gradients_are_autograds(activation, mode, registered):
    model = make(lambda: Encoder(6, (8, 4), activation))
    actual = by_opacus(model, force_functorch=mode == "functorch")
    assert_as_accurate(actual, by_autograd, unfused_layers(model.layers))


def test_without_registering_opacus_runs_the_layers_again():
    assert FusedDense not in GradSampleHooks.GRAD_SAMPLERS
    model = make(lambda: Encoder(6, (8, 4), "gelu"))
    assert_as_accurate(by_opacus(model), by_autograd, unfused_layers(model.layers))


@pytest.mark.parametrize("bias", [True, False])
def test_sequences(bias, registered):
    model = make(lambda: Encoder(6, (8, 4), "tanh", bias=bias))
    x = torch.randn(5, 7, 6, generator=torch.Generator().manual_seed(0))
    wrapped = GradSampleModule(copy.deepcopy(model), batch_first=False, loss_reduction="sum")
    wrapped(x.transpose(0, 1)).square().sum().backward()
    for actual in (by_opacus(model, x), [parameter.grad_sample for parameter in wrapped.parameters()]):
        assert_as_accurate(actual, lambda model, dtype: by_autograd(model, dtype, x), unfused_layers(model.layers))


def test_frozen_parameters(registered):
    model = make(lambda: Encoder(6, (8, 4)))
    of_all = by_opacus(model)
    model.layers[0].weight.requires_grad_(False)
    model.layers[1].bias.requires_grad_(False)
    for actual, expected in zip(by_opacus(model), of_all[1:3], strict=True):
        assert torch.equal(actual, expected)


def test_autocast(registered):
    model = make(lambda: Encoder(6, (8, 4), "gelu"))
    plain = unfused_layers(model.layers)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = by_opacus(model), by_opacus(plain)
    assert_within(actual, expected, by_autograd(plain.double(), torch.float64))


@pytest.mark.parametrize(
    "build",
    [lambda: Classifier(Encoder(6, (8, 4), "silu"), 3), lambda: fastenc.AutoEncoder(Encoder(6, (8, 4), "gelu"))],
)
def test_models_of_several_stacks(build, registered):
    model = make(build)
    assert_as_accurate(
        by_opacus(model), by_autograd, unfused_layers([m for m in model.modules() if type(m) is FusedDense])
    )


@pytest.mark.parametrize("build", [Net, Scaled, lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))])
def test_fused_models(build, monkeypatch):
    plain = make(build)
    model = fused(plain)
    calls = count_fused(monkeypatch)
    assert_as_accurate(by_opacus(model), by_autograd, plain)
    # Under hooks its layers are called one by one; under torch.func, without hooks, as one.
    assert bool(calls) == (build is Scaled)


def test_hooks_of_fused_models_are_taken_off_again(monkeypatch):
    wrapped = GradSampleModule(fused(make(Net)))
    calls = count_fused(monkeypatch)
    wrapped(make_x())
    assert not calls
    model = wrapped.to_standard_module()
    model(make_x())
    assert calls == [3]


@pytest.mark.parametrize("shape", [(12, 6), (5, 7, 6)], ids=str)
def test_ghost_clipping_knows_the_norms(shape, registered):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    model = make(lambda: Classifier(Encoder(6, (8, 4), "gelu"), 3))

    def norms(model, dtype):
        return [sum(grads.flatten(1).square().sum(1) for grads in by_autograd(model, dtype, x)).sqrt()]

    wrapped = get_gsm_class("ghost")(copy.deepcopy(model))
    loss_of(wrapped(x)).mean().backward()
    plain = unfused_layers([*model.encoder.layers, model.head])
    assert_as_accurate([wrapped.get_norm_sample()], norms, plain)


def test_expanded_weights_are_refused():
    wrapped = get_gsm_class("ew")(make(lambda: Encoder(6, (8, 4))))
    with pytest.raises(RuntimeError, match="Expanded Weights encountered but cannot handle function"):
        wrapped(make_x())


def private(model):
    """One step of DP-SGD without chance: no noise, and all rows."""
    engine = opacus.PrivacyEngine()
    rows = torch.utils.data.TensorDataset(make_x(), torch.arange(12) % 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model, optimizer, loader = engine.make_private(
        module=model.train(),
        optimizer=optimizer,
        data_loader=torch.utils.data.DataLoader(rows, batch_size=12),
        noise_multiplier=0.0,
        max_grad_norm=0.3,
        poisson_sampling=False,
    )
    assert isinstance(optimizer, opacus.optimizers.DPOptimizer)
    for x, target in loader:
        F.cross_entropy(model(x.to(next(model.parameters()))), target).backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.filterwarnings("ignore:Secure RNG turned off:UserWarning")
def test_private_steps_are_those_of_the_unfused_model(registered):
    def run(model, dtype):
        return private(model)

    plain = make(Net)
    assert_as_accurate(private(fused(plain)), run, plain)
    model = make(lambda: Classifier(Encoder(6, (8, 5)), 3))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    after = private(copy.deepcopy(model))
    assert_as_accurate(after, run, unfused_layers([*model.encoder.layers, model.head]))
    moved = torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)]).norm()
    assert 0 < moved <= 0.5 * 0.3  # the mean of clipped gradients is no longer than they


@pytest.mark.filterwarnings("ignore:Secure RNG turned off:UserWarning")
def test_example(capsys):
    try:
        names = run_example("opacus")
    finally:
        GradSampleHooks.GRAD_SAMPLERS.pop(FusedDense, None)
        get_gsm_class("ghost").NORM_SAMPLERS.pop(FusedDense, None)
    assert 0 < names["epsilon"] < 10
    assert f"epsilon = {names['epsilon']:.2f}" in capsys.readouterr().out
