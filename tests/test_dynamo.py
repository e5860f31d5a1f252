"""torch.compile(model, backend="fastenc"): what is fused, that nothing else is, and that the answers are PyTorch's."""

from __future__ import annotations

import importlib.metadata
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accuracy import Worst, assert_same, draw, eager, run, small_integers
from torch import Tensor, nn
from torch._dynamo.backends import registry
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor

import fastenc
from fastenc import dynamo
from fastenc.activation import ACTIVATIONS
from fastenc.backends import cpu
from fastenc.dynamo import inductor, rewrite
from fastenc.dynamo.fusing import fuse_graph, record

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_compiler")
ROOT = Path(__file__).parents[1]


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def always():
    """Fuse whatever the kernels take, so that tests are the same on every CPU."""
    with fastenc.use_backend("cpu"):
        yield


def light(module, inputs):
    """All of the backend but Inductor's code generation, which takes seconds."""
    fuse_graph(module.graph)
    module.recompile()
    return torch._dynamo.lookup_backend("aot_eager")(module, inputs)


def compiled(function, **arguments):
    return torch.compile(function, backend=light, fullgraph=True, **arguments)


def fused(found) -> list[str]:
    return [part.layers for part in found if part.reason is None]


def integers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(-2, 3, shape).to(dtype)


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
def test_every_form_is_fused(always, activation):
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
def test_a_chain_and_its_gradients(always, activation):
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
def test_some_gradients(always, wanted):
    problem = small_integers(draw(12, (9, 17, 5), "relu"))
    assert_same(run(compiled(eager), problem, wanted), run(eager, problem, wanted))


def net(*widths: int, end: bool = True) -> nn.Sequential:
    layers = [m for k, n in itertools.pairwise(widths) for m in (nn.Linear(k, n), nn.ReLU(), nn.Dropout(0.5))]
    model = nn.Sequential(*layers[: None if end else -2]).eval()
    for parameter in model.parameters():
        parameter.data = integers(*parameter.shape)
    return model


def test_batch_sizes_share_a_graph(always):
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
def test_leading_dimensions(always, leading, dynamic):
    model = net(9, 7, 4, end=False)
    x = integers(*leading, 9)
    with record() as found:
        out = compiled(model, dynamic=dynamic)(x)
    assert len(set(fused(found))) == 1  # Dynamo may begin again
    assert torch.equal(out, model(x))


@pytest.mark.parametrize("inside", [True, False])
def test_autocast(always, inside):
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


def test_without_gradients_nothing_is_kept(always):
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


def test_fastenc_layers_are_matched_too(always):
    """Neighbours become one operator; what the kernels do not take is the compiler's to fuse."""
    model = nn.Sequential(fastenc.Encoder(9, (7, 5)), fastenc.FusedDense(5, 4, activation="gelu"), nn.Linear(4, 3))
    x = torch.randn(6, 9)
    with record() as found:
        torch.testing.assert_close(compiled(model)(x), model(x))
        torch.testing.assert_close(compiled(model.double())(x.double()), model(x.double()))
    assert fused(found) == ["[6, 9] -> 7 relu -> 5 relu -> 4 gelu -> 3 float32"]
    assert {part.reason for part in found} == {None, "no kernels for torch.float64"}


# What must not be fused, or not all of it.


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
def test_left_alone(always, function):
    x, w, v = integers(3, 5), integers(5, 5), integers(5, 5)
    with record() as found:
        actual = compiled(function)(x, w, v)
    torch.testing.assert_close(actual, function(x, w, v))
    assert len(fused(found)) == NOT_ONE[function], found
    assert all(part.reason is None or len(part.reason) > 10 for part in found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.complex64], ids=str)
def test_other_dtypes(always, dtype):
    def chain(x, w):
        out = F.linear(F.linear(x, w), w)
        return out.tanh() if dtype.is_complex else out.relu()

    x, w = integers(3, 5, dtype=dtype), integers(5, 5, dtype=dtype)
    with record() as found:
        torch.testing.assert_close(compiled(chain)(x, w), chain(x, w))
    assert len(found) == 2
    assert not fused(found)


def test_subclasses_of_tensors(always):
    x, weight = integers(3, 5), TwoTensor(integers(4, 5), integers(4, 5))

    def layer(x, w):
        return F.relu(F.linear(x, w))

    with record() as found:
        actual = compiled(layer)(x, weight)
    assert [part.reason for part in found] == ["not of plain dense tensors"]
    assert torch.equal(actual.b, layer(x, weight.b))


@pytest.mark.parametrize("in_dims", [(0, None), (0, 0)], ids=str)
def test_within_vmap_and_grad(always, in_dims):
    """Inside a transform of torch.func, the compiler sees through ATen's functions."""

    def loss(weight, row):
        return F.relu(F.linear(row, weight)).square().sum()

    def gradients(x, weight):
        return torch.vmap(torch.func.grad(loss), in_dims=in_dims[::-1])(weight, x)

    x, weight = integers(6, 5), integers(*([6] if in_dims[1] == 0 else []), 4, 5)
    with record() as found:
        assert torch.equal(compiled(gradients)(x, weight), gradients(x, weight))
    assert not fused(found)


# The rule, and what is said of it.


def test_large_products_are_left_without_avx512():
    model, x = nn.Sequential(nn.Linear(768, 1024), nn.GELU(), nn.Linear(1024, 8), nn.ReLU()), torch.randn(32, 768)
    with cpu.configured("auto", brgemm=False), torch.no_grad():
        report = dynamo.explain(model, x)
    assert "AVX-512" in str(report)
    assert [(part.layers, part.reason is None) for part in report] == [
        ("[32, 768] -> 1024 gelu float32", False),
        ("[32, 1024] -> 8 relu float32", True),
    ]
    with cpu.configured("auto", brgemm=False), torch.no_grad():
        assert fused(dynamo.explain(net(9, 7, 4), torch.randn(3, 9)))


def test_a_part_of_a_chain_is_fused():
    model, x = net(784, 1024, 16, 8), torch.randn(16, 784)
    with cpu.configured("auto", brgemm=False), torch.no_grad():
        report = dynamo.explain(model, x)
    assert [part.layers for part in report if part.reason is None] == ["[16, 1024] -> 16 relu -> 8 relu float32"]
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


def test_log(always, caplog):
    with caplog.at_level("INFO", "fastenc.dynamo"):
        dynamo.explain(net(9, 7, 4), torch.randn(3, 9))
    assert "[3, 9] -> 7 relu -> 4 relu float32: fused" in caplog.text


# With Inductor.


def test_with_inductor(always):
    model = nn.Sequential(nn.Linear(9, 7), nn.SiLU(), nn.Linear(7, 4), nn.Softmax(-1))
    chain = torch.compile(model, backend="fastenc", fullgraph=True, options={"epilogue_fusion": True})
    x = torch.randn(5, 9, requires_grad=True)
    with fresh_cache():
        out, codes = run_and_get_code(lambda: chain(x))
        out.square().sum().backward()
    actual = [x.grad, *(parameter.grad for parameter in model.parameters())]
    expected = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    torch.testing.assert_close(out, model(x))
    torch.testing.assert_close(actual, list(expected))
    assert "fastenc_cpu.encoder_forward" in codes[0]  # without choosing again
    assert "softmax" in codes[0]  # Inductor's own
    for M in (6, 7, 8):
        torch.testing.assert_close(chain(torch.ones(M, 9)), model(torch.ones(M, 9)))


def test_double_backward_is_refused_as_ever(always):
    x = torch.randn(5, 9, requires_grad=True)
    (grad,) = torch.autograd.grad(compiled(net(9, 7, 4))(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        grad.sum().backward()


def test_one_layer_with_inductor_and_a_mode(always):
    layer = nn.Sequential(nn.Linear(9, 7), nn.ReLU())
    chain = torch.compile(layer, backend="fastenc", mode="max-autotune-no-cudagraphs")
    x = torch.randn(5, 9)
    chain(x).sum().backward()
    actual = [parameter.grad for parameter in layer.parameters()]
    torch.testing.assert_close(actual, list(torch.autograd.grad(layer(x).sum(), list(layer.parameters()))))


def test_as_passes_of_inductor(always):
    model, x = net(9, 7, 4), integers(3, 9)
    with fresh_cache(), record() as found, torch.no_grad():
        out, codes = run_and_get_code(torch.compile(model, options=dynamo.inductor_options()), x)
    assert torch.equal(out, model(x))
    assert len(fused(found)) == 1
    assert "fastenc_cpu.encoder_forward" in codes[0]


def test_options_are_inductors():
    with pytest.raises(Exception, match="Unexpected optimization option no_such_thing"):
        torch.compile(net(9, 7), backend="fastenc", options={"no_such_thing": 1})(integers(3, 9))


def test_without_a_compiler(always, monkeypatch):
    from torch._inductor import cpp_builder, exc

    def none():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    for cached in (inductor._why_no_inductor, inductor._warn_once):
        cached.cache_clear()
    model, x = net(9, 7, 4), integers(3, 9)
    with pytest.warns(RuntimeWarning, match="backend 'aot_eager': Inductor needs a C\\+\\+ compiler"):
        assert torch.equal(torch.compile(model, backend="fastenc")(x), model(x))
    inductor._why_no_inductor.cache_clear()


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
