"""How layers and whole models run on the CUDA backend; emulated where there is no GPU."""

from __future__ import annotations

import contextlib
import copy

import emulated
import pytest
import torch
from accuracy import Worst, assert_same, draw, eager, fused, run, small_integers
from guards import DEVICE
from torch import Tensor

import fastenc
from fastenc import ops
from fastenc.backends import cuda, gpu, rule

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def forced():
    with fastenc.use_backend("cuda"):
        yield


def of(*shape: int, **options) -> Tensor:
    return torch.ones(shape, device=DEVICE, **options)


# How layers run.


@contextlib.contextmanager
def called(monkeypatch):
    """The names of the operators that the backend calls inside the block."""
    names: list[str] = []

    class Noted:
        def __getattr__(self, name):
            names.append(name)
            return getattr(cuda._plain, name)

    with monkeypatch.context() as patch:
        patch.setattr(cuda, "_operators", Noted())
        yield names


@pytest.mark.parametrize(
    ("widths", "activation", "forward", "backward"),
    [
        ((9, 17), "relu", ["dense_forward"], ["preact_gradient"]),  # our one launch takes longer than three
        ((9, 17), "identity", [], ["preact_gradient"]),  # nothing to fuse forward
        ((9, 140), "relu", ["dense_forward"], ["preact_gradient"]),
        ((2000, 140), "relu", [], ["preact_gradient"]),  # sums too long for one block
        ((20, 33, 17), "relu", ["encoder_forward"], ["encoder_backward"]),
        ((20, 140, 17, 5), "relu", ["encoder_forward"], ["encoder_backward", "preact_gradient"]),
    ],
    ids=str,
)
def test_which_operators_run(forced, monkeypatch, widths, activation, forward, backward):
    problem = small_integers(draw(21, widths, activation), 1).map(lambda tensor: tensor.to(DEVICE))
    expected = run(eager, problem)
    with called(monkeypatch) as names:
        assert_same(run(fused, problem), expected)
    assert names == forward + backward


def test_the_product_is_left_to_cublas_as_the_rule_says(forced, monkeypatch):
    """Asked for with the facts of the layer."""
    asked = []
    monkeypatch.setattr(rule, "fuses", lambda *args: asked.append(args) or (False, False))
    cuda._fuses.cache_clear()
    problem = draw(21, (9, 17), "gelu", torch.bfloat16).map(lambda tensor: tensor.to(DEVICE))
    with called(monkeypatch) as names:
        run(fused, problem)
    cuda._fuses.cache_clear()
    ((of_layer, arch, kernels),) = asked
    assert names == ["preact_gradient"]
    assert of_layer == rule.Problem(21, (9, 17), ("gelu",), torch.bfloat16, True, True, True)
    assert (arch, kernels) == (gpu.arch(problem.x.device), rule.CUDA)


@pytest.mark.parametrize("activation", ["identity", "relu", "gelu"])
def test_left_to_cublas_only_what_is_wanted_is_computed(forced, monkeypatch, activation):
    monkeypatch.setattr(cuda, "_fuses", lambda *args: (False, False))
    products = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args: products.append(args) or mm(*args))
    problem = small_integers(draw(21, (9, 17), activation), 1).map(lambda tensor: tensor.to(DEVICE))
    for wanted in (["x"], ["weight0"], ["bias0"], ["x", "bias0"], ["x", "weight0", "bias0"]):
        products.clear()
        actual = run(fused, problem, wanted)
        assert len(products) == sum(name != "bias0" for name in wanted)
        assert actual.keys() == run(eager, problem, wanted).keys()
        if activation != "gelu":
            assert_same(actual, run(eager, problem, wanted))


@pytest.mark.parametrize(
    ("dtype", "grad", "bias", "used"),
    [
        (torch.bfloat16, False, True, True),
        (torch.float16, False, True, True),
        (torch.bfloat16, True, True, False),  # the backward pass reads what comes before the activation
        (torch.float32, False, True, False),  # how exact the epilogue is nobody says
        (torch.bfloat16, False, False, False),
    ],
)
def test_when_cublas_applies_gelu(forced, monkeypatch, dtype, grad, bias, used):
    monkeypatch.setattr(cuda, "_fuses", lambda *args: (False, False))
    epilogue, calls = torch._addmm_activation, []
    monkeypatch.setattr(
        torch, "_addmm_activation", lambda *args, **options: calls.append(1) or epilogue(*args, **options)
    )
    worst = Worst()
    for seed in range(8):
        problem = draw(33, (9, 17), "gelu_tanh", dtype, bias, seed=seed)
        wanted = ["weight0"] if grad else []
        actual = run(fused, problem.map(lambda tensor: tensor.to(DEVICE)), wanted)
        sides = run(eager, problem, wanted), run(eager, problem.map(Tensor.double), wanted)
        worst.add({name: value.cpu() for name, value in actual.items()}, *sides)
    worst.check()
    assert bool(calls) == used


def test_relu_is_never_left_to_cublas(forced, monkeypatch):
    """Its epilogue for relu gives 0 for NaN."""
    monkeypatch.setattr(cuda, "_fuses", lambda *args: (False, False))
    monkeypatch.setattr(torch, "_addmm_activation", None)
    x = of(3, 4, dtype=torch.bfloat16)
    x[1] = torch.nan
    out = fastenc.FusedDense(4, 5, device=DEVICE, dtype=torch.bfloat16)(x)
    assert out[1].isnan().all()
    assert not out[[0, 2]].isnan().any()


@emulated.only_emulated
def test_tf32_where_pytorch_allows_it(forced):
    more, ones = torch.full((32, 32), 1 + 2**-12), torch.ones(32, 32)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for setting, each in (("ieee", 1 + 2**-12), ("tf32", 1.0)):
            torch.backends.cuda.matmul.fp32_precision = setting
            assert (fastenc.fused_dense(more, ones) == 32 * each).all()
            assert (fused(more, [ones, ones], [None] * 2, ["relu"] * 2) == 1024 * each).all()
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


# Whole models.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_follows_the_reference(dtype):
    """Integers, and steps that keep them exact: every weight is the same after each of them."""
    encoders = {}
    generator = torch.Generator().manual_seed(0)
    for name in ("cuda", "reference"):
        torch.manual_seed(0)
        encoders[name] = fastenc.Encoder(12, (9, 140, 7), device=DEVICE, dtype=dtype)
        with torch.no_grad():
            for parameter in encoders[name].parameters():
                parameter.copy_(torch.randint(-1, 2, parameter.shape, generator=generator))
        generator.manual_seed(0)
    before = [parameter.clone() for parameter in encoders["cuda"].parameters()]
    x = torch.randint(-1, 2, (2, 6, 12), generator=generator).to(DEVICE, dtype)
    for batch in x:
        for name, encoder in encoders.items():
            with fastenc.use_backend(name):
                loss = encoder(batch).sum() / 2**10
                loss.backward()
            with torch.no_grad():
                for parameter in encoder.parameters():
                    parameter += (parameter.grad * 2**10).sign()
                    parameter.grad = None
        for ours, theirs in zip(*(encoder.parameters() for encoder in encoders.values()), strict=True):
            assert torch.equal(ours, theirs)
    assert not any(map(torch.equal, before, encoders["cuda"].parameters()))


def test_training_is_as_accurate_as_pytorch(forced):
    """Some steps of an autoencoder: the losses' and the weights' distance to float64, against eager PyTorch's."""
    worst = Worst()
    for seed in range(4):
        torch.manual_seed(seed)
        exact = fastenc.AutoEncoder(fastenc.Encoder(20, (16, 5), "tanh")).to(DEVICE, torch.float64)
        x = torch.randn(32, 20, device=DEVICE)
        sides = []
        for name, dtype in (("cuda", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
            model = copy.deepcopy(exact).to(dtype)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            with fastenc.use_backend(name), ops.record() as decisions:
                for _ in range(5):
                    optimizer.zero_grad()
                    loss = (model(x.to(dtype)) - x.to(dtype)).square().mean()
                    loss.backward()
                    optimizer.step()
            assert {decision.backend for decision in decisions} == {name}
            sides.append({"loss": loss.detach(), **{key: value.detach() for key, value in model.named_parameters()}})
        worst.add(*sides)
    worst.check()


def test_dropout_goes_layer_by_layer(forced):
    """With PyTorch's own random numbers between the kernels; in eval mode it is one kernel."""
    encoder = fastenc.Encoder(12, (32, 9), dropout=0.5, device=DEVICE)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(torch.randint(-1, 2, parameter.shape))
    x = torch.randint(-2, 3, (40, 12), device=DEVICE).float()
    torch.manual_seed(3)
    with ops.record() as decisions:
        out = encoder(x)
    torch.manual_seed(3)
    with fastenc.use_backend("reference"):
        assert torch.equal(out, encoder(x))
    assert not torch.equal(out, encoder(x))
    whole, *layers = decisions
    assert whole.backend == "eager PyTorch"
    assert "cuda: its kernels have no dropout, so that the layers run one by one" in whole.reason
    assert [layer.backend for layer in layers] == ["cuda", "cuda"]
    (decision,) = fastenc.explain(encoder, x).decisions
    assert str(decision) == f"40 rows, 12-32-9, float32: cuda (asked for; {cuda.describe()})"


def test_launches_are_named_when_asked(forced, monkeypatch):
    ranges = []

    @contextlib.contextmanager
    def named(name):
        ranges.append(name)
        yield

    monkeypatch.setattr("torch.cuda.nvtx.range", named)
    encoder = fastenc.Encoder(12, (9, 7), device=DEVICE)
    x = torch.randn(5, 12, device=DEVICE)
    plain = encoder(x)
    assert ranges == []
    try:
        cuda.name_launches(True)
        out = encoder(x)
        out.sum().backward()
    finally:
        cuda.name_launches(False)
    encoder(x)
    assert ranges == ["fastenc encoder_forward [5, 12]", "fastenc encoder_backward [5, 7]"]
    assert torch.equal(plain, out)
