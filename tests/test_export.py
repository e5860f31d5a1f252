"""torch.export, AOTInductor and ONNX of fastenc's models, and the plain models that other tools are given."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accuracy import Worst
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fastenc import AutoEncoder, Classifier, Encoder, FusedDense, Regressor, fuse, to_plain
from fastenc.activation import ACTIVATIONS
from fastenc.plain import MODULES

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]

MODELS = {
    "dense": lambda: FusedDense(9, 7, activation="gelu"),
    "identity": lambda: FusedDense(9, 7, activation="identity", bias=False),
    "encoder": lambda: Encoder(9, (7, 4), activation="silu", dropout=0.1),
    "autoencoder": lambda: AutoEncoder(Encoder(9, (7, 4)), "sigmoid"),
    "classifier": lambda: Classifier(Encoder(9, (7,), activation="tanh"), 3),
    "regressor": lambda: Regressor(Encoder(9, (7,), activation="leaky_relu", bias=False), 2),
    "inside": lambda: nn.Sequential(FusedDense(9, 7, activation="gelu_tanh"), nn.LayerNorm(7), Encoder(7, (5, 4))),
}
for_each_model = pytest.mark.parametrize("name", MODELS)


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def export(model: nn.Module) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(model, (torch.randn(5, 9),), dynamic_shapes=({0: torch.export.Dim("batch")},))


def assert_as_accurate(of: nn.Module, other, batches=(1, 2, 8, 100)) -> None:
    """By the error rule, beside the plain model in eager PyTorch."""
    worst, plain = Worst(), to_plain(of)
    exact = to_plain(of)
    exact.load_state_dict({name: value.double() for name, value in of.state_dict().items()}, assign=True)
    with torch.no_grad():
        for M in batches:
            x = torch.randn(M, 9)
            worst.add({"out": other(x)}, {"out": plain(x)}, {"out": exact(x.double())})
    worst.check()


@for_each_model
def test_export(tmp_path, name):
    model = make(name)
    torch.export.save(export(model), tmp_path / "model.pt2")
    assert_as_accurate(model, torch.export.load(tmp_path / "model.pt2").module())


LOAD = "model = torch.export.load(sys.argv[1]).module(); print(*model(torch.ones(3, 9)).shape)"


@pytest.mark.parametrize(("imports", "plain"), [("torch, sys, fastenc", False), ("torch, sys", True)], ids=str)
def test_export_in_another_process(tmp_path, imports, plain):
    """A program with our operators needs `import fastenc`; that of the plain model needs nothing."""
    model = make("encoder")
    torch.export.save(export(to_plain(model) if plain else model), tmp_path / "model.pt2")
    program = [sys.executable, "-c", f"import {imports}\n{LOAD}", str(tmp_path / "model.pt2")]
    result = subprocess.run(program, capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.split() == ["3", "4"]


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@pytest.mark.parametrize("plain", [False, True])
def test_aot_inductor(tmp_path, plain):
    model = make("autoencoder")
    program = export(to_plain(model) if plain else model)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    assert_as_accurate(model, torch._inductor.aoti_load_package(path))


@for_each_model
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of the exporter, about itself
def test_onnx(tmp_path, name):
    import onnxruntime

    model = make(name)
    program = torch.onnx.export(
        to_plain(model),
        (torch.randn(5, 9),),
        dynamo=True,
        verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (x,) = session.get_inputs()
    assert_as_accurate(model, lambda rows: torch.from_numpy(session.run(None, {x.name: rows.numpy()})[0]))


# to_plain.


def test_every_activation_has_its_module():
    assert list(MODULES) == list(ACTIVATIONS)
    z = torch.randn(50)
    for name, module in MODULES.items():
        assert torch.equal(module()(z), ACTIVATIONS[name].forward(z)), name


@for_each_model
def test_plain_shares_parameters_under_their_names(name):
    model = make(name)
    plain = to_plain(model)
    assert list(plain.state_dict()) == list(model.state_dict())
    pairs = zip(plain.parameters(), model.parameters(), strict=True)
    assert all(parameter is other for parameter, other in pairs)
    assert not any(isinstance(module, FusedDense) for module in plain.modules())
    assert sum(type(module) is nn.Linear for module in plain.modules()) == sum(
        isinstance(module, FusedDense) for module in model.modules()
    )
    assert any(isinstance(module, FusedDense) for module in model.modules())  # unchanged
    plain.load_state_dict({name: torch.zeros_like(value) for name, value in model.state_dict().items()})
    assert not any(parameter.any() for parameter in model.parameters())


def test_plain_gives_the_layers_of_an_encoder_their_places():
    plain = to_plain(AutoEncoder(Encoder(9, (7, 4))))
    assert type(plain.encoder.layers[0]) is nn.Linear
    assert plain.encode(torch.ones(2, 9)).shape == (2, 4)
    assert plain.decode(torch.ones(2, 4)).shape == (2, 9)


def test_plain_in_place():
    model = nn.Sequential(FusedDense(9, 7), Encoder(7, (4,)))
    model.again = model[0]
    expected = model[0].weight
    plain = to_plain(model, inplace=True)
    assert plain is model
    assert model[0] is model.again
    assert model[0].linear.weight is expected


def test_plain_keeps_mode_gradients_and_hooks():
    model = AutoEncoder(Encoder(9, (7, 4), dropout=0.5))
    model.encoder.eval()
    model.encoder.layers[0].weight.requires_grad_(False)
    seen = []
    model.encoder.layers[1].register_forward_hook(lambda module, args, out: seen.append(out))
    plain = to_plain(model)
    assert (plain.training, plain.encoder.training, plain.decoder.training) == (True, False, True)
    assert not plain.encoder.layers[0].linear.weight.requires_grad
    code = plain.encode(torch.randn(5, 9))
    assert torch.equal(seen[0], code)  # after the activation


def test_plain_is_not_fused():
    model = nn.Sequential(nn.Linear(9, 7), nn.ReLU(), FusedDense(7, 4))
    plain = to_plain(fuse(model, inplace=False))
    assert type(plain) is nn.Sequential
    assert plain[0].weight is model[0].weight


def test_plain_drops_as_the_model():
    model = Encoder(9, (7, 6, 4), dropout=0.5)
    x = torch.randn(50, 9)
    outs: list[Tensor] = []
    for one in (model, to_plain(model)):
        torch.manual_seed(1)
        outs.append(one(x))
    torch.testing.assert_close(*outs)


def test_plain_refuses_what_it_does_not_know():
    model = nn.Sequential(parametrizations.weight_norm(FusedDense(9, 7)))
    with pytest.raises(ValueError, match=r"layer '0' is a ParametrizedFusedDense.*remove_parametrizations"):
        to_plain(model)
