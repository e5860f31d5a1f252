"""torch.compile(model, backend="fastenc"): what is fused, by which rule, and under which name it is found."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accuracy import Worst, assert_same, draw, eager, run, small_integers
from compiling import compiled, fused, integers, net
from torch import Tensor, nn
from torch._dynamo.backends import registry
from torch.nn import functional as F

import fastenc
from fastenc import dynamo
from fastenc.activation import ACTIVATIONS
from fastenc.backends import cpu
from fastenc.dynamo import rewrite
from fastenc.dynamo.fusing import fuse_graph, record

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_compiler")
ROOT = Path(__file__).parents[1]

FORMS = {
    "relu": (
        F.relu,
        torch.relu,
        Tensor.relu,
        Tensor.relu_,
        torch.relu_,
        lambda z: F.relu(z, inplace=True),
        nn.ReLU(True),
    ),
    "leaky_relu": (F.leaky_relu, lambda z: F.leaky_relu(z, 0.01), lambda z: F.leaky_relu_(z), nn.LeakyReLU()),
    "sigmoid": (torch.sigmoid, F.sigmoid, Tensor.sigmoid, Tensor.sigmoid_, nn.Sigmoid()),
    "tanh": (torch.tanh, F.tanh, Tensor.tanh, Tensor.tanh_, nn.Tanh()),
    "gelu": (F.gelu, lambda z: F.gelu(z, approximate="none"), nn.GELU()),
    "gelu_tanh": (lambda z: F.gelu(z, approximate="tanh"), nn.GELU("tanh")),
    "silu": (F.silu, lambda z: F.silu(z, inplace=True), nn.SiLU()),
}


def test_forms_are_all_activations():
    assert {"identity", *FORMS} == set(ACTIVATIONS) == {"identity", *rewrite._FUNCTIONS}


@pytest.mark.parametrize("activation", FORMS)
def test_every_form_is_fused(always_fused, activation):
    weight = integers(4, 5)

    def forms(x: Tensor) -> list[Tensor]:
        return [form(F.linear(x, weight)) for form in FORMS[activation]]

    x = integers(3, 5)
    with record() as found:
        outs = compiled(forms)(x)
    assert fused(found) == [f"[3, 5] -> 4 {activation} float32"] * len(FORMS[activation])
    assert not [part for part in found if part.reason]
    for out, expected in zip(outs, forms(x), strict=True):
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_chain_and_its_gradients(always_fused, activation):
    """A plain layer at the end is part of the chain."""
    worst = Worst()
    chain = compiled(eager)
    with record() as found:
        for seed in range(8):
            problem = draw(20, (9, 17, 5, 3), [activation, activation, "identity"], seed=seed)
            worst.add(run(chain, problem), run(eager, problem), run(eager, problem.map(Tensor.double)))
    worst.check()
    name = "" if activation == "identity" else f" {activation}"
    expected = [f"[20, 9] -> 17{name} -> 5{name} -> 3 float32"]
    assert fused(found) == ([] if activation == "identity" else expected)


@pytest.mark.parametrize("wanted", [("x",), ("weight0",), ("bias1",), ("weight0", "bias1")], ids=str)
def test_some_gradients(always_fused, wanted):
    problem = small_integers(draw(12, (9, 17, 5), "relu"))
    assert_same(run(compiled(eager), problem, wanted), run(eager, problem, wanted))


def test_batch_sizes_share_a_graph(always_fused):
    model = net(9, 7, 4)
    chain = compiled(model)
    with record() as found:
        for M in (5, 6, 7, 64, 65):
            x = integers(M, 9)
            assert torch.equal(chain(x), model(x))
    assert [re.sub(r"s\d+", "s", layers) for layers in fused(found)] == [
        f"[{rows}, 9] -> 7 relu -> 4 relu float32" for rows in ("5", "s")
    ]


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("dynamic", [False, True])
def test_leading_dimensions(always_fused, leading, dynamic):
    model = net(9, 7, 4, end=False)
    x = integers(*leading, 9)
    with record() as found:
        out = compiled(model, dynamic=dynamic)(x)
    assert len(set(fused(found))) == 1  # Dynamo may begin again
    assert torch.equal(out, model(x))


@pytest.mark.parametrize("inside", [True, False])
def test_autocast(always_fused, inside):
    def cast(x, weights, biases, activations):
        with torch.autocast("cpu", torch.bfloat16):
            return eager(x, weights, biases, activations)

    problem = small_integers(draw(12, (9, 17, 5), "relu"), 1)
    with record() as found, torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        actual = run(compiled(cast if inside else eager), problem)
    assert fused(found) == ["[12, 9] -> 17 relu -> 5 relu bfloat16"]
    expected = run(cast, problem)
    assert actual["out"].dtype == torch.bfloat16
    assert_same(actual, expected)


def test_without_gradients_nothing_is_kept(always_fused):
    graphs = []

    def note(module, inputs):
        fuse_graph(module.graph)
        graphs.append(module.graph)
        return module

    model = net(9, 7, 4)
    chain = torch.compile(model, backend=note)
    chain(integers(3, 9))
    with torch.no_grad():
        chain(integers(3, 9))
    calls = [[n for n in graph.nodes if n.target is torch.ops.fastenc.encoder_forward.default] for graph in graphs]
    assert [call.args[-1] for (call,) in calls] == [True, False]


def test_fastenc_layers_are_matched_too(always_fused):
    """Neighbours become one operator; what the kernels do not take is the compiler's to fuse."""
    model = nn.Sequential(fastenc.Encoder(9, (7, 5)), fastenc.FusedDense(5, 4, activation="gelu"), nn.Linear(4, 3))
    x = torch.randn(6, 9)
    with record() as found:
        torch.testing.assert_close(compiled(model)(x), model(x))
        torch.testing.assert_close(compiled(model.double())(x.double()), model(x.double()))
    assert fused(found) == ["[6, 9] -> 7 relu -> 5 relu -> 4 gelu -> 3 float32"]
    assert {part.reason for part in found} == {None, "no kernels for torch.float64"}


# The rule, and what is said of it.


def test_large_products_are_left_without_avx512():
    model, x = nn.Sequential(nn.Linear(768, 1024), nn.GELU(), nn.Linear(1024, 8), nn.ReLU()), torch.randn(48, 768)
    with cpu.configured("auto", brgemm=False), torch.no_grad():
        report = dynamo.explain(model, x)
    assert "AVX-512" in str(report)
    assert [(part.layers, part.reason is None) for part in report] == [
        ("[48, 768] -> 1024 gelu float32", False),
        ("[48, 1024] -> 8 relu float32", True),
    ]
    with cpu.configured("auto", brgemm=False), torch.no_grad():
        assert fused(dynamo.explain(net(9, 7, 4), torch.randn(3, 9)))


def test_a_part_of_a_chain_is_fused():
    model, x = net(784, 1024, 16, 8), torch.randn(64, 784)
    with cpu.configured("auto", brgemm=False), torch.no_grad():
        report = dynamo.explain(model, x)
    assert [part.layers for part in report if part.reason is None] == ["[64, 1024] -> 16 relu -> 8 relu float32"]
    assert len(report) == 2


def test_a_step_with_few_rows_is_left():
    model = net(9, 7, 4)
    found = [dynamo.explain(model, torch.randn(rows, 9)) for rows in (4, 5)]
    with torch.no_grad():
        found.append(dynamo.explain(model, torch.randn(4, 9)))
    assert [len(fused(report)) for report in found] == [0, 1, 1]
    assert "few rows" in str(found[0])


def test_the_reference_backend_is_the_compiler():
    with fastenc.use_backend("reference"):
        assert not fused(dynamo.explain(net(9, 7, 4), torch.randn(3, 9)))


def test_explain_without_layers():
    assert str(dynamo.explain(torch.sin, torch.ones(2))) == "no linear layer in a graph"


def test_log(always_fused, caplog):
    with caplog.at_level("INFO", "fastenc.dynamo"):
        dynamo.explain(net(9, 7, 4), torch.randn(3, 9))
    assert "[3, 9] -> 7 relu -> 4 relu float32: fused" in caplog.text


# The name.


def test_the_name_waits_for_dynamo():
    program = (
        "import sys, torch, fastenc; assert 'torch._dynamo' not in sys.modules; before = len(sys.meta_path); "
        "print('fastenc' in torch.compiler.list_backends(), len(sys.meta_path) - before)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.split() == ["True", "-1"]


def test_the_name_is_given_after_dynamo(monkeypatch):
    monkeypatch.setattr(registry, "_COMPILER_FNS", {})
    monkeypatch.setattr(registry, "_BACKENDS", {})
    dynamo.offer()
    dynamo.offer()
    assert registry.lookup_backend("fastenc") is dynamo.fastenc


def test_entry_point():
    section = (ROOT / "pyproject.toml").read_text().split("[project.entry-points.torch_dynamo_backends]")[1]
    value = re.match(r'\s*fastenc = "(.*)"', section)[1]
    assert importlib.metadata.EntryPoint("fastenc", value, "torch_dynamo_backends").load() is dynamo.fastenc
