"""When the CUDA backend runs, how, and in words why it does not; emulated where there is no GPU."""

from __future__ import annotations

import contextlib
import sys
from types import SimpleNamespace

import emulated
import pytest
import torch
from accuracy import Worst, assert_same, draw, eager, fused, run, small_integers
from guards import DEVICE
from torch import Tensor

import fastenc
from fastenc import ops
from fastenc.backends import choice, cuda, gpu, rule, triton

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def forced():
    with fastenc.use_backend("cuda"):
        yield


def of(*shape: int, **options) -> Tensor:
    return torch.ones(shape, device=DEVICE, **options)


def decisions_of(x: Tensor, *weights: Tensor) -> list[ops.Decision]:
    with ops.record() as decisions:
        fused(x, weights, [None] * len(weights), ["relu"] * len(weights))
    return decisions


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
        ((9, 17), "relu", ["dense_forward"], ["dense_backward"]),
        ((9, 17), "identity", [], ["dense_backward"]),  # nothing to fuse forward
        ((9, 140), "relu", ["dense_forward"], ["preact_gradient"]),
        ((2000, 140), "relu", [], ["preact_gradient"]),  # sums too long for one block
        ((20, 33, 17), "relu", ["encoder_forward"], ["encoder_backward"]),
        ((20, 140, 17, 5), "relu", ["dense_forward", "encoder_forward"], ["encoder_backward", "preact_gradient"]),
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


def test_dropout_goes_layer_by_layer(forced):
    """With PyTorch's own random numbers between the kernels; in eval mode it is one kernel."""
    encoder = fastenc.Encoder(12, (32, 9), dropout=0.5, device=DEVICE)
    x = torch.randn(40, 12, device=DEVICE)
    torch.manual_seed(3)
    with ops.record() as decisions:
        out = encoder(x)
    torch.manual_seed(3)
    with fastenc.use_backend("reference"):
        torch.testing.assert_close(out, encoder(x))
    whole, *layers = decisions
    assert whole.backend == "eager PyTorch"
    assert "cuda: its kernels have no dropout, so that the layers run one by one" in whole.reason
    assert [layer.backend for layer in layers] == ["cuda", "cuda"]
    (decision,) = fastenc.explain(encoder, x).decisions
    assert str(decision) == f"40 rows, 12-32-9, float32: cuda (asked for; {cuda.describe()})"


# The choice.


@pytest.fixture
def auto_on_this_device(monkeypatch):
    """As if `auto` were asked for tensors of a GPU."""
    monkeypatch.setitem(ops._ON_DEVICE, "cpu", [cuda, triton])
    monkeypatch.setattr("fastenc.functional.ops.everyday", lambda: None)
    monkeypatch.setattr(choice, "tuning", lambda: None)
    choice._verdict.cache_clear()
    yield
    choice._verdict.cache_clear()


def test_auto_leaves_cpu_tensors_to_the_cpu():
    (decision,) = decisions_of(torch.ones(4, 3), torch.ones(2, 3))
    assert decision.backend == "cpu"


def test_auto_chooses_by_the_rule(auto_on_this_device):
    """Before Triton, whose launches cost the host more; small single layers cost it more than they save."""
    weight = of(32, 32)
    (dense,) = decisions_of(of(4, 32), weight)
    assert dense.backend == "eager PyTorch"
    assert "cuda: modelled, not measured: eager PyTorch takes 1 times as long" in dense.reason
    (stack,) = decisions_of(of(4, 32), *[weight] * 4)
    assert stack.backend == "cuda"
    assert "modelled, not measured: eager PyTorch takes 4 times as long" in stack.reason
    assert cuda.describe() in stack.reason


def test_a_deep_stack_is_cut_into_kernels(auto_on_this_device):
    weights = [torch.eye(16, device=DEVICE)] * 11
    decisions = decisions_of(of(4, 16), *weights)
    assert [(len(decision.activations), decision.backend) for decision in decisions] == [(8, "cuda"), (3, "cuda")]


def test_parts():
    assert cuda.parts((128, 64, 16)) == [slice(0, 3)]
    assert cuda.parts((64,) * 9) == [slice(0, 8), slice(8, 9)]
    assert cuda.parts((1024, 64, 16)) == [slice(0, 1), slice(1, 3)]
    assert cuda.parts((128, 64, 128, 784)) == [slice(0, 4)]  # the last may be wide
    assert cuda.parts((512, 256)) == [slice(0, 1), slice(1, 2)]


def test_what_was_measured_goes_before_the_rule(auto_on_this_device, monkeypatch):
    """One measurement decides between all that were in it; what was not is not chosen."""
    measured: dict = {}
    monkeypatch.setattr(
        choice, "tuning", lambda: SimpleNamespace(choice=lambda kind, device: measured, bucket=lambda M: M)
    )
    for backend, times, chosen, words in (
        (
            "cuda",
            {"eager_us": 3.0, "cuda_us": 1.0, "triton_us": 2.0},
            "cuda",
            "measured: 1 us, eager PyTorch 3, triton 2",
        ),
        ("eager", {"eager_us": 1.0, "cuda_us": 2.0}, "eager PyTorch", "cuda: measured: 2 us, eager PyTorch 1"),
        ("triton", {"eager_us": 3.0, "triton_us": 2.0}, "other", "measured: eager PyTorch 3, triton 2"),
    ):
        measured.clear()
        measured.update({"backend": backend, **times})
        choice._verdict.cache_clear()
        verdict = cuda.verdict(of(4, 32), [of(32, 32)] * 4, ["relu"] * 4, False)
        assert words.removeprefix("cuda: ") == verdict.reason
        assert verdict.chosen == (chosen == "cuda")
        if chosen != "other":
            decision = decisions_of(of(4, 32), *[of(32, 32)] * 4)[0]
            assert decision.backend == chosen
            assert words in decision.reason


def test_a_warning_only_where_no_backend_is_there(auto_on_this_device, monkeypatch):
    """A GPU without the CUDA kernels runs Triton's without a word."""
    ops._warn_once.cache_clear()
    monkeypatch.setattr(cuda, "why_not", lambda *args: "not built")
    monkeypatch.setattr(cuda, "why_unavailable", lambda: "not built")
    monkeypatch.setattr(triton, "why_not", lambda *args: None)
    monkeypatch.setattr(triton, "verdict", lambda *args: choice.Verdict(False, "eager is as fast"))
    (decision,) = decisions_of(of(4, 32), of(32, 32))
    assert decision.reason == "cuda: not built; triton: eager is as fast"
    monkeypatch.setattr(triton, "why_not", lambda *args: "not installed")
    monkeypatch.setattr(triton, "why_unavailable", lambda: "not installed")
    with pytest.warns(RuntimeWarning, match="fastenc runs on eager PyTorch: not built; not installed"):
        decisions_of(of(4, 32), of(32, 32))
    ops._warn_once.cache_clear()


# Why not, in words.


@pytest.mark.parametrize(
    ("x", "weight", "reason"),
    [
        (of(4, 3).double(), of(2, 3).double(), "take fp32, bf16 or fp16; x is torch.float64, weight torch.fl"),
        (of(4, 3).to("meta"), of(2, 3), "the kernels run on CUDA tensors; x is on meta"),
        (of(4, 3), of(2, 4), "shapes do not match: x (4, 3), weight (2, 4)"),
        (of(4, 3, dtype=torch.complex64).conj().imag, of(2, 3), "negated when it is read"),
    ],
)
def test_why_not(forced, x, weight, reason):
    assert reason in cuda.why_not(x, weight, None)
    assert cuda.why_not(of(4, 3), of(2, 3), of(2)) is None
    with contextlib.suppress(Exception):  # the layer runs, or raises PyTorch's error
        assert "cuda: " in decisions_of(x, weight)[0].reason


@pytest.fixture
def compiled(monkeypatch):
    """As on a machine with a GPU, in a process that has not asked for the kernels yet."""
    cached = (cuda._why_not_loaded, gpu.why_no_gpu, gpu.why_not_gpu)
    for function in cached:
        function.cache_clear()
    monkeypatch.setattr(cuda, "emulated", lambda: False)
    monkeypatch.setattr(gpu, "why_no_gpu", lambda: None)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    yield monkeypatch
    monkeypatch.undo()
    for function in cached:
        function.cache_clear()


def test_not_built(compiled):
    for build in ({}, {"cxx": "g++"}):
        compiled.setattr(gpu, "build", lambda build=build: build)
        cuda._why_not_loaded.cache_clear()
        assert cuda.why_unavailable() == (
            "the CUDA kernels are not built; where there is an nvcc of CUDA 13, reinstall fastenc from source: "
            "pip install --no-build-isolation <folder>"
        )
    with pytest.raises(RuntimeError, match="backend 'cuda' is not available: the CUDA kernels are not built"):
        fastenc.use_backend("cuda")


def test_built_for_another_cuda(compiled):
    compiled.setattr(gpu, "build", lambda: {"cuda": "12.9.41"})
    compiled.setitem(sys.modules, "fastenc._C_cuda", None)  # importing it would raise
    assert cuda.why_unavailable().startswith(
        "the CUDA kernels are built for CUDA 12.9.41, and this PyTorch is for 13.0; where there is an nvcc of CUDA 13, "
    )


def test_built_and_broken(compiled):
    compiled.setattr(gpu, "build", lambda: {"cuda": "13.1.2", "cuda_archs": "8.0+PTX"})
    compiled.setitem(sys.modules, "fastenc._C_cuda", None)
    assert cuda.why_unavailable().startswith("the CUDA kernels cannot be loaded (import of fastenc._C_cuda halted")
    assert cuda.why_not(torch.ones(4, 3), torch.ones(2, 3), None) == "the kernels run on CUDA tensors; x is on cpu"


def test_built(compiled):
    compiled.setattr(gpu, "build", lambda: {"cuda": "13.1.2", "cuda_archs": "8.0+PTX"})
    compiled.setitem(sys.modules, "fastenc._C_cuda", SimpleNamespace())
    assert cuda.why_unavailable() is None
    assert cuda.describe() == "built with CUDA 13.1.2 for 8.0+PTX"


def test_without_a_gpu_nothing_is_loaded(compiled):
    compiled.setattr(gpu, "why_no_gpu", lambda: "there is no GPU")
    compiled.setattr(gpu, "build", lambda: pytest.fail("it asks for the build"))
    assert cuda.why_unavailable() == "there is no GPU"


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
