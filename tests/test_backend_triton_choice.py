"""When the Triton backend runs, which kernels, and in words why it does not; interpreted where there is no GPU."""

from __future__ import annotations

import contextlib
import sys
from types import SimpleNamespace

import interpreter  # first: it decides how Triton runs
import pytest
import torch
from accuracy import Problem, draw, fused, run
from guards import DEVICE
from torch import Tensor

import fastenc
from fastenc import ops
from fastenc.backends import choice, gpu, stack, triton

pytestmark = pytest.mark.usefixtures("one_thread")

DENSE, NARROW, MIXED = (9, 17), (20, 33, 17, 5), (20, 130, 17, 5)
in_each = pytest.mark.parametrize("widths", [DENSE, NARROW, MIXED], ids=["dense", "narrow stack", "mixed stack"])


@pytest.fixture
def forced():
    with fastenc.use_backend("triton"):
        yield


def problem_of(M: int, widths: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Problem:
    return draw(M, widths, dtype=dtype).map(lambda tensor: tensor.to(DEVICE))


# Which kernels run, and when.


@contextlib.contextmanager
def launches():
    """The names of the kernels launched inside the block; only where they are interpreted can they be counted."""
    names: list[str] = []
    with interpreter.watched() as watched:
        yield names
    names += [launch.kernel for launch in watched]


@pytest.mark.skipif(not interpreter.INTERPRETED, reason="launches are counted where kernels are interpreted")
@pytest.mark.parametrize(
    ("widths", "forward", "backward"), [(DENSE, 1, 3), (NARROW, 1, 3), (MIXED, 2, 6), ((9,) * 11, 2, 6)], ids=str
)
def test_launches(forced, widths, forward, backward):
    problem = problem_of(40, widths)
    with launches() as names:
        fused(problem.x, problem.weights, problem.biases, problem.activations)
    assert len(names) == forward
    with launches() as names:
        run(fused, problem)
    assert forward < len(names) <= forward + backward


@pytest.mark.skipif(not interpreter.INTERPRETED, reason="launches are counted where kernels are interpreted")
@in_each
def test_frozen_layers_cost_nothing(forced, widths):
    problem = problem_of(40, widths, torch.bfloat16)
    with launches() as names:
        run(fused, problem, [f"bias{len(widths) - 2}"])
    with launches() as all_names:
        run(fused, problem)
    assert len(names) < len(all_names)


def chosen(x: Tensor, *weights: Tensor) -> ops.Decision:
    with ops.record() as decisions:
        fused(x, weights, [None] * len(weights), ["relu"] * len(weights))
    return decisions[0]


def test_auto_leaves_cpu_tensors_to_the_cpu():
    x, weight = torch.ones(4, 3), torch.ones(2, 3)
    assert chosen(x, weight).backend == "cpu"
    assert "triton" not in chosen(x.double(), weight.double()).reason


@pytest.fixture
def auto_on_this_device(monkeypatch):
    """As if `auto` were asked for tensors of a GPU."""
    monkeypatch.setitem(ops._ON_DEVICE, DEVICE, [triton])
    monkeypatch.setattr("fastenc.functional.ops.everyday", lambda: None)
    choice._verdict.cache_clear()
    yield
    choice._verdict.cache_clear()


def test_auto_chooses_by_the_rule(auto_on_this_device):
    """Small single layers cost the host more than they save; narrow stacks save launches."""
    x, weight = torch.ones(4, 32, device=DEVICE), torch.ones(32, 32, device=DEVICE)
    dense = chosen(x, weight)
    assert dense.backend == "eager PyTorch"
    assert "triton: modelled, not measured: eager PyTorch takes 0." in dense.reason
    stack = chosen(x, *[weight] * 4)
    assert stack.backend == "triton"
    assert "modelled, not measured: eager PyTorch takes 1." in stack.reason
    assert triton.describe() in stack.reason


def test_steps_before_a_recording_choose_as_the_recording_will(auto_on_this_device):
    """In a CUDA graph the host costs nothing, and so a layer can be worth a kernel that it is not worth outside."""
    x, weight = (torch.ones(N, 64, device=DEVICE, dtype=torch.bfloat16) for N in (4096, 64))
    outside = chosen(x, weight)
    with ops.as_if_captured():
        inside = chosen(x, weight)
    assert (outside.backend, inside.backend) == ("eager PyTorch", "triton")
    assert chosen(x, weight) == outside


def test_a_deep_stack_is_cut_into_kernels(auto_on_this_device):
    weights = [torch.eye(16, device=DEVICE)] * 11
    with ops.record() as decisions:
        out = fused(torch.ones(4, 16, device=DEVICE), weights, [None] * 11, ["relu"] * 11)
    assert torch.equal(out, torch.ones_like(out))
    assert [len(decision.activations) for decision in decisions] == [8, 3]


def test_parts():
    assert stack.parts((128, 64, 16), triton.is_narrow) == [slice(0, 3)]
    assert stack.parts((64,) * 9, triton.is_narrow) == [slice(0, 8), slice(8, 9)]
    assert stack.parts((1024, 64, 16), triton.is_narrow) == [slice(0, 1), slice(1, 3)]
    assert stack.parts((128, 64, 128, 784), triton.is_narrow) == [slice(0, 4)]  # the last may be wide
    assert stack.parts((64, 784, 64, 784), triton.is_narrow) == [slice(0, 2), slice(2, 4)]
    assert stack.parts((512, 256), triton.is_narrow) == [slice(0, 1), slice(1, 2)]


# Why not, in words.


def of(*shape: int, **options) -> Tensor:
    return torch.ones(shape, device=DEVICE, **options)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "reason"),
    [
        (of(4, 3).double(), of(2, 3).double(), None, "take fp32, bf16 or fp16; x is torch.float64, weight torch.fl"),
        (of(4, 3), of(2, 3).half(), None, "x is torch.float32, weight torch.float16"),
        (of(4, 3).to("meta"), of(2, 3), None, "the kernels run on CUDA tensors; x is on meta"),
        (of(4, 3), of(2, 3).to("meta"), None, "and weight on meta; they must be on one device"),
        (of(4, 3).to_sparse_coo(), of(2, 3), None, "not plain dense tensors"),
        (of(4, 3), of(2, 4), None, "shapes do not match: x (4, 3), weight (2, 4)"),
        (of(2, 4, 3), of(2, 3), None, "shapes do not match: x (2, 4, 3)"),
        (of(4, 3), of(2, 3), of(3), "bias is torch.float32 (3,) on"),
        (of(4, 3), of(2, 3), of(2).half(), "it must be torch.float32 (2,) on"),
        (of(4, 3, dtype=torch.complex64).conj().imag, of(2, 3), None, "negated when it is read"),
    ],
)
def test_why_not(x, weight, bias, reason):
    assert reason in triton.why_not(x, weight, bias)
    assert triton.why_not(of(4, 3), of(2, 3), of(2)) is None
    # Whatever it is, the layer runs, or raises PyTorch's error.
    with fastenc.use_backend("triton"), contextlib.suppress(Exception):
        assert "triton: " in chosen(x, weight).reason


@pytest.fixture
def fresh():
    """What was found out about this process is found out again, before and after."""
    cached = (triton._why_not_imported, gpu.why_no_gpu, gpu.why_not_gpu, triton._kernels)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


def test_triton_is_missing(fresh, monkeypatch):
    monkeypatch.delitem(sys.modules, "triton")
    monkeypatch.setattr("importlib.import_module", raising(ModuleNotFoundError("No module", name="triton")))
    assert triton.why_unavailable().startswith("triton is not installed; it comes with PyTorch's CUDA builds")
    with pytest.raises(RuntimeError, match="backend 'triton' is not available: triton is not installed"):
        fastenc.use_backend("triton")


def raising(error: Exception):
    def call(*args, **kwargs):
        raise error

    return call


@pytest.mark.parametrize(
    "error",
    [ModuleNotFoundError("No module named 'z'", name="z"), ImportError("libz.so"), OSError("z"), AttributeError("z")],
    ids=lambda error: type(error).__name__,
)
def test_triton_is_broken(fresh, monkeypatch, error):
    monkeypatch.setattr("importlib.import_module", raising(error))
    assert f"triton is installed, but cannot be imported ({error}); reinstall it" == triton.why_unavailable()
    assert triton.why_not(of(4, 3), of(2, 3), None) == triton.why_unavailable()


def test_triton_is_too_old(fresh, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.2.0"))
    assert triton.why_unavailable() == 'triton 3.2.0 is too old for the kernels; run: pip install "triton>=3.7"'


def test_the_kernels_do_not_know_this_triton(fresh, monkeypatch):
    monkeypatch.setattr(triton, "_kernels", raising(AttributeError("tl has no dot")))
    assert "the kernels cannot be imported with triton" in triton.why_unavailable()
    assert "(tl has no dot); install another version of it" in triton.why_unavailable()
    monkeypatch.undo()


@pytest.fixture
def compiled(fresh, monkeypatch):
    """As if kernels were compiled."""
    kernels = SimpleNamespace(**{**vars(triton._kernels()), "interpreted": lambda: False})
    monkeypatch.setattr(triton, "_kernels", lambda: kernels)
    yield
    monkeypatch.undo()


def test_no_gpu(compiled, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    assert triton.why_unavailable() == "this PyTorch has no GPU that it can use; nvidia-smi tells if the driver runs"
    assert triton.why_not(torch.ones(4, 3), torch.ones(2, 3), None) == "the kernels run on CUDA tensors; x is on cpu"


def test_no_cuda(compiled, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", None)
    assert triton.why_unavailable() == "this PyTorch has no CUDA"


def test_amd(compiled, monkeypatch):
    monkeypatch.setattr("torch.version.hip", "7.0")
    assert "built for AMD GPUs" in triton.why_unavailable()


@pytest.mark.parametrize(("capability", "usable"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_compute_capability(compiled, monkeypatch, capability, usable):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index: capability)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: "Tesla T4")
    reason = triton.why_unavailable()
    assert (reason is None) == usable
    assert usable or reason == "the kernels need compute capability 8.0 or higher; Tesla T4 has 7.5"


def test_launches_go_to_the_tensors_device(monkeypatch):
    """A launch goes to the current device; another device's tensor makes that one current for as long."""
    current = [0]

    @contextlib.contextmanager
    def device(index):
        before, current[0] = current[0], index
        yield
        current[0] = before

    monkeypatch.setattr("torch.cuda.device", device)
    monkeypatch.setattr("torch.cuda.current_device", lambda: current[0])
    launch = triton._on_its_device(lambda x, other: (current[0], other))
    for index in (0, 1):
        assert launch(SimpleNamespace(is_cuda=True, get_device=lambda i=index: i, device=index), "y") == (index, "y")
        assert current == [0]
    assert launch(SimpleNamespace(is_cuda=False), "y") == (0, "y")
