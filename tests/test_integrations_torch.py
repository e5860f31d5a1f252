"""What comes with PyTorch, and torchinfo: profiler, activation checkpointing, ensembles by torch.func, summaries."""

import pytest
import torch
import torchinfo
from integrated import Net, assert_within, count_fused, make, make_x, run_example, unfused_layers
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fastenc
from fastenc import AutoEncoder, Encoder, FusedDense
from fastenc.ops import everyday

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = {
    "FusedDense": lambda: FusedDense(6, 4, activation="gelu"),
    "Encoder": lambda: Encoder(6, (8, 4), "silu"),
    "AutoEncoder": lambda: AutoEncoder(Encoder(6, (8, 4), "tanh")),
    "fused": lambda: fastenc.fuse(Net("gelu"), inplace=True, verbose=False),
}


@pytest.fixture(params=MODELS)
def build(request):
    return MODELS[request.param]


def unfused(model):
    layers = [module for module in model.modules() if isinstance(module, FusedDense)]
    return unfused_layers(layers) if layers else fastenc.unfuse(model)


def gradients(model, run=None, dtype=torch.float32):
    x = make_x().to(dtype).requires_grad_()
    out = model(x) if run is None else run(model, x)
    return [out, *torch.autograd.grad(out.square().sum(), [x, *model.parameters()])]


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant, build, monkeypatch):
    """The same bits: what is kept and what is computed again are the same kernels."""
    model = make(build)
    calls = count_fused(monkeypatch)

    def run(model, x):
        return checkpoint(model, x, use_reentrant=reentrant)

    x = make_x().requires_grad_()
    run(model, x).square().sum().backward()
    actual = [x.grad, *(parameter.grad for parameter in model.parameters())]
    if isinstance(model, Net):
        assert calls == [3, 3]
    for value, expected in zip(actual, gradients(model)[1:], strict=True):
        assert torch.equal(value, expected)


def test_checkpointing_a_sequential():
    parts = [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)]
    model = make(lambda: fastenc.fuse(nn.Sequential(*parts), inplace=True, verbose=False))
    checkpointed = gradients(model, lambda model, x: checkpoint_sequential(model, 2, x, use_reentrant=False))
    exact = gradients(unfused(model).double(), dtype=torch.float64)
    assert_within(checkpointed, gradients(unfused(model).float()), exact)


def test_ensembles(build):
    models = [make(build, seed) for seed in range(3)]
    plain = [unfused(model) for model in models]
    parameters, buffers = stack_module_state(models)
    skeleton = make(build).to("meta")

    def run(parameters, buffers, x):
        return functional_call(skeleton, (parameters, buffers), (x,))

    def loss(*args):
        return run(*args).square().sum()

    x = make_x()
    actual = [vmap(run, in_dims=(0, 0, None))(parameters, buffers, x)]
    actual += vmap(grad(loss), in_dims=(0, 0, None))(parameters, buffers, x).values()

    def one_by_one(models, dtype):
        sides = [gradients(model, dtype=dtype) for model in models]
        return [torch.stack(values) for values in ([side[i] for side in sides] for i in range(len(sides[0])))]

    def without_x(values):
        return [values[0], *values[2:]]

    expected = without_x(one_by_one(plain, torch.float32))
    exact = without_x(one_by_one([model.double() for model in plain], torch.float64))
    assert_within(actual, expected, exact)
    loss_of_all = vmap(run, in_dims=(0, 0, None))(parameters, buffers, x).square().sum()  # and by autograd outside
    assert_within([actual[0], *torch.autograd.grad(loss_of_all, list(parameters.values()))], expected, exact)


def test_profiler_names_our_operators(build):
    model = make(build)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(make_x()).sum().backward()
    names = {event.key for event in profile.key_averages()}
    forward = "dense" if isinstance(model, FusedDense) else "encoder"
    if everyday() is not None:
        assert f"fastenc_eager::{forward}" in names
    else:  # no autograd in C++ for this torch
        assert f"fastenc::{forward}_forward" in names or "FusedDenseFunction" in names or "EncoderFunction" in names
    assert not {"aten::linear", "aten::addmm", "aten::gelu", "aten::tanh"} & names


def summary(model):
    return torchinfo.summary(model, input_data=make_x(), verbose=0)


def test_torchinfo(build):
    model = make(build)
    actual, expected = summary(model), summary(unfused(model))
    assert actual.total_params == actual.trainable_params == expected.total_params
    assert actual.total_mult_adds == expected.total_mult_adds
    assert actual.summary_list[0].output_size == expected.summary_list[0].output_size
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    "title", ["torchinfo", "torch.profiler", "Activation checkpointing", "Ensembles by torch.func"]
)
def test_example(title, capsys):
    run_example(title)
    output = capsys.readouterr().out
    assert {"torchinfo": "FusedDense: 1-2", "torch.profiler": "fastenc"}.get(title, "") in output
