"""torch.compile(model, backend="fastenc") with Inductor behind it, whose options, passes and errors it keeps."""

from __future__ import annotations

import pytest
import torch
from compiling import compiled, fused, integers, net
from torch import nn
from torch._inductor.utils import fresh_cache, run_and_get_code

from fastenc import dynamo
from fastenc.dynamo import inductor
from fastenc.dynamo.fusing import record

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_compiler")


def test_with_inductor(always_fused):
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


def test_double_backward_is_refused_as_ever(always_fused):
    x = torch.randn(5, 9, requires_grad=True)
    (grad,) = torch.autograd.grad(compiled(net(9, 7, 4))(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        grad.sum().backward()


def test_one_layer_with_inductor_and_a_mode(always_fused):
    layer = nn.Sequential(nn.Linear(9, 7), nn.ReLU())
    chain = torch.compile(layer, backend="fastenc", mode="max-autotune-no-cudagraphs")
    x = torch.randn(5, 9)
    chain(x).sum().backward()
    actual = [parameter.grad for parameter in layer.parameters()]
    torch.testing.assert_close(actual, list(torch.autograd.grad(layer(x).sum(), list(layer.parameters()))))


def test_as_passes_of_inductor(always_fused):
    model, x = net(9, 7, 4), integers(3, 9)
    with fresh_cache(), record() as found, torch.no_grad():
        out, codes = run_and_get_code(torch.compile(model, options=dynamo.inductor_options()), x)
    assert torch.equal(out, model(x))
    assert len(fused(found)) == 1
    assert "fastenc_cpu.encoder_forward" in codes[0]


def test_options_are_inductors():
    with pytest.raises(Exception, match="Unexpected optimization option no_such_thing"):
        torch.compile(net(9, 7), backend="fastenc", options={"no_such_thing": 1})(integers(3, 9))


def test_without_a_compiler(always_fused, monkeypatch):
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
