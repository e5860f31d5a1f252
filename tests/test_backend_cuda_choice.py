"""When the CUDA backend runs, and in words why it does not; emulated where there is no GPU."""

from __future__ import annotations

import contextlib
import sys
from types import SimpleNamespace

import emulated  # noqa: F401 - before the backend is asked for anything
import pytest
import torch
from accuracy import fused
from guards import DEVICE
from torch import Tensor

import fastenc
from fastenc import ops
from fastenc.backends import choice, cuda, gpu, stack, triton

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
    assert "cuda: modelled, not measured: eager PyTorch takes 0." in dense.reason
    (stack,) = decisions_of(of(4, 32), *[weight] * 4)
    assert stack.backend == "cuda"
    assert "modelled, not measured: eager PyTorch takes 2.4 times as long" in stack.reason
    assert cuda.describe() in stack.reason


def test_a_deep_stack_is_cut_into_kernels(auto_on_this_device):
    weights = [torch.eye(16, device=DEVICE)] * 11
    decisions = decisions_of(of(4, 16), *weights)
    assert [(len(decision.activations), decision.backend) for decision in decisions] == [(8, "cuda"), (3, "cuda")]


def test_parts():
    assert stack.parts((128, 64, 16), cuda.is_narrow) == [slice(0, 3)]
    assert stack.parts((64,) * 9, cuda.is_narrow) == [slice(0, 8), slice(8, 9)]
    assert stack.parts((1024, 64, 16), cuda.is_narrow) == [slice(0, 1), slice(1, 3)]
    assert stack.parts((128, 64, 128, 784), cuda.is_narrow) == [slice(0, 4)]  # the last may be wide
    assert stack.parts((512, 256), cuda.is_narrow) == [slice(0, 1), slice(1, 2)]


@pytest.mark.parametrize(
    ("times", "chosen", "by_triton"),
    [
        ({"eager": 3.0, "cuda": 1.0, "triton": 2.0}, "cuda", True),  # Triton is asked where CUDA cannot, as for dropout
        ({"eager": 3.0, "cuda": 2.0, "triton": 1.0}, "triton", True),
        ({"eager": 1.0, "cuda": 2.0, "triton": 2.0}, "eager PyTorch", False),
        ({"eager": 1.0, "cuda": 1.0, "triton": 1.0}, "eager PyTorch", False),
        ({"eager": 3.0, "triton": 2.0}, "triton", True),  # what was not measured is not chosen
    ],
    ids=str,
)
def test_what_was_measured_goes_before_the_rule(auto_on_this_device, monkeypatch, times, chosen, by_triton):
    measured = {f"{name}_us": time for name, time in times.items()}
    store = SimpleNamespace(choice=lambda kind, device: measured, bucket=lambda M: M)
    monkeypatch.setattr(choice, "tuning", lambda: store)
    layers = of(4, 32), [of(32, 32)] * 4, ["relu"] * 4, False
    words = "measured, in us: " + ", ".join(f"{name} {time:.4g}" for name, time in times.items())
    expected = choice.Verdict(chosen == "cuda", words.replace("eager", "eager PyTorch"))
    assert cuda.verdict(*layers) == expected
    by_rule = choice._verdict("triton", lambda widths: True, choice.problem_of(*layers), layers[0].device)
    assert by_rule == (by_triton, expected.reason)


@pytest.mark.parametrize("usable", [True, False])
def test_a_stack_that_triton_is_modelled_to_run_faster_is_left_to_it(auto_on_this_device, monkeypatch, usable):
    monkeypatch.setattr(gpu, "arch", lambda device: 90)
    monkeypatch.setattr(triton, "why_unavailable", lambda: None if usable else "not installed")
    large = choice.problem_of(of(1, 128).expand(1 << 16, -1), [of(128, 128)] * 6, ["relu"] * 6, False)
    large = large._replace(dtype=torch.bfloat16, tensor_cores=True)
    verdict = choice._verdict("cuda", cuda.is_narrow, large, torch.device(DEVICE))
    assert verdict.chosen != usable
    assert verdict.reason.endswith(", and triton less") == usable


def test_what_must_be_loaded_number_by_number_is_left_to_others(auto_on_this_device):
    """16-bit numbers in rows of odd length, down columns or from an odd place."""
    even = of(32, 16, dtype=torch.bfloat16)
    assert cuda.verdict(even, [even], ["relu"], False).reason.startswith("modelled")
    odd = of(32 * 17 + 1, dtype=torch.bfloat16)
    for matrix in (odd[:-1].view(32, 17), odd[1:513].view(32, 16), even.T.contiguous().T):
        for x, weight in ((matrix, even), (even, matrix)):
            verdict = cuda.verdict(x, [weight], ["relu"], False)
            assert verdict == (False, "x or a weight lies in memory so that 16-bit numbers must be loaded one by one")
    assert cuda.verdict(odd[:-1].view(32, 17).float(), [of(32, 17)], ["relu"], False).reason.startswith("modelled")


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
    cached = (cuda._why_not_loaded, cuda._why_not_built_for, gpu.why_no_gpu, gpu.why_not_gpu)
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


@pytest.mark.parametrize(
    ("archs", "capability", "covered"),
    [
        ("8.0+PTX", (8, 0), True),
        ("8.0+PTX", (12, 0), True),
        ("8.0", (8, 9), True),
        ("8.6;9.0", (8, 0), False),
        ("8.0;8.6;9.0;12.0+PTX", (11, 0), False),
        ("8.0 8.6 9.0+PTX", (11, 0), True),
        ("9.0a", (9, 0), True),
        ("8.0,10.0a", (10, 3), False),
        ("Ampere;Hopper", (12, 0), True),  # what the names mean PyTorch knows
    ],
)
def test_built_for_which_gpus(compiled, archs, capability, covered):
    compiled.setattr(gpu, "build", lambda: {"cuda": "13.1.2", "cuda_archs": archs})
    compiled.setitem(sys.modules, "fastenc._C_cuda", SimpleNamespace())
    compiled.setattr("torch.cuda.current_device", lambda: 0)
    compiled.setattr("torch.cuda.get_device_capability", lambda index: capability)
    compiled.setattr("torch.cuda.get_device_name", lambda index: "Thor")
    assert cuda.describe() == f"built with CUDA 13.1.2 for {archs}"
    wanted = ".".join(map(str, capability))
    assert cuda.why_unavailable() == (
        None
        if covered
        else f"the CUDA kernels are built for GPUs {archs}, and Thor has compute capability {wanted}; set "
        f"TORCH_CUDA_ARCH_LIST={wanted} and {cuda.FROM_SOURCE}"
    )


def test_without_a_gpu_nothing_is_loaded(compiled):
    compiled.setattr(gpu, "why_no_gpu", lambda: "there is no GPU")
    compiled.setattr(gpu, "build", lambda: pytest.fail("it asks for the build"))
    assert cuda.why_unavailable() == "there is no GPU"


def test_where_no_backend_wins_nothing_more_is_asked(auto_on_this_device, monkeypatch):
    layers = of(4, 32), [of(32, 32)], ["relu"], False
    problem, device = choice.problem_of(*layers), torch.device(DEVICE)
    for usable, expected in ((True, True), (False, False)):  # that none is usable is said once, elsewhere
        for backend in (cuda, triton):
            monkeypatch.setattr(backend, "why_unavailable", lambda there=usable: None if there else "not there")
        choice.none_wins.cache_clear()
        assert choice.none_wins(problem, device) == expected
    stack = choice.problem_of(of(4, 32), [of(32, 32)] * 4, ["relu"] * 4, False)
    monkeypatch.setattr(cuda, "why_unavailable", lambda: None)
    assert not choice.none_wins(stack, device)
    assert not ops._none_wins(of(32), *layers[1:])
    choice.none_wins.cache_clear()
