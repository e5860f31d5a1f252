"""The layers on the Triton backend: interpreted where there is no GPU. What each kernel does is tested beside it."""

from __future__ import annotations

import contextlib
import itertools
import sys
from dataclasses import replace
from types import SimpleNamespace

import interpreter  # first: it decides how Triton runs
import pytest
import torch
from accuracy import (
    VIEWS,
    Problem,
    Worst,
    assert_as_accurate,
    assert_same,
    draw,
    eager,
    fused,
    run,
    small_integers,
)
from guards import DEVICE
from torch import Tensor
from torch.func import grad, vmap
from torch.library import opcheck

import fastenc
from fastenc import ops
from fastenc.activation import ACTIVATIONS
from fastenc.backends import triton

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # By opcheck itself, of its own tensors.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

DENSE, NARROW, MIXED = (9, 17), (20, 33, 17, 5), (20, 130, 17, 5)
in_each = pytest.mark.parametrize("widths", [DENSE, NARROW, MIXED], ids=["dense", "narrow stack", "mixed stack"])


@pytest.fixture
def forced():
    with fastenc.use_backend("triton"):
        yield


def problem_of(M: int, widths: tuple[int, ...], *args, **options) -> Problem:
    return draw(M, widths, *args, **options).map(lambda tensor: tensor.to(DEVICE))


def integers(M: int, widths: tuple[int, ...], activation: str = "relu", dtype: torch.dtype = torch.float32) -> Problem:
    return small_integers(draw(M, widths, activation, dtype), 1).map(lambda tensor: tensor.to(DEVICE))


# Values and gradients.


@pytest.mark.parametrize(
    ("widths", "activation"), [*itertools.product((DENSE, NARROW), ACTIVATIONS), (MIXED, "relu"), (MIXED, "gelu")]
)
def test_as_accurate_as_pytorch(forced, activation, widths):
    assert_as_accurate(problem_of(33, widths, activation, seed=seed) for seed in range(8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@in_each
def test_half_types(forced, dtype, widths):
    assert_as_accurate(problem_of(33, widths, "gelu", dtype, seed=seed) for seed in range(8))


@pytest.mark.parametrize("M", [0, 1, 16, 67])
@in_each
def test_integers_are_exact(forced, M, widths):
    problem = integers(M, widths)
    assert_same(run(fused, problem), run(eager, problem))


@pytest.mark.parametrize("widths", [(0, 4), (4, 0), (0, 4, 3), (4, 0, 3), (4, 3, 0), (1, 1), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("M", [0, 3])
def test_empty_and_smallest_layers(forced, M, widths):
    problem = integers(M, widths)
    assert_same(run(fused, problem), run(eager, problem))


def same_in_views(problem: Problem) -> None:
    """Equal to eager; by autograd.grad, as an expanded leaf has no `.grad` of its shape to write to."""
    results = []
    for forward in (fused, eager):
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in problem.leaves().items()}
        weights = [leaves[f"weight{i}"] for i in range(len(problem.weights))]
        biases = [leaves[f"bias{i}"] for i in range(len(problem.weights))]
        out = forward(leaves["x"], weights, biases, problem.activations)
        grads = torch.autograd.grad(out, list(leaves.values()), problem.grad_out)
        results.append({"out": out.detach(), **dict(zip(leaves, grads, strict=True))})
    assert_same(*results)


@pytest.mark.parametrize("view", VIEWS)
@in_each
def test_odd_strides_and_alignments(forced, widths, view):
    if DEVICE == "cuda" and view in ("sliced", "step 2", "one element off alignment"):
        VIEWS_ON_DEVICE = {"one element off alignment": lambda t: t.new_zeros(t.numel() + 1)[1:].view_as(t).copy_(t)}
        change = VIEWS_ON_DEVICE.get(view, lambda t: torch.stack((t, t), -1)[..., 0])
    else:
        change = VIEWS[view]
    problem = integers(19, widths)
    same_in_views(replace(problem, x=change(problem.x)))
    same_in_views(replace(problem, weights=tuple(map(change, problem.weights))))
    same_in_views(replace(problem, grad_out=change(problem.grad_out)))


@in_each
def test_biases_with_strides(forced, widths):
    problem = integers(5, widths)
    same_in_views(replace(problem, biases=tuple(torch.stack((bias, bias), 1)[:, 0] for bias in problem.biases)))


@in_each
def test_gradient_of_a_sum_has_stride_zero(forced, widths):
    problem = integers(33, widths)
    results = []
    for forward in (fused, eager):
        leaves = [leaf.detach().requires_grad_() for leaf in (problem.x, *problem.weights)]
        forward(leaves[0], leaves[1:], problem.biases, problem.activations).sum().backward()
        results.append({str(i): leaf.grad for i, leaf in enumerate(leaves)})
    assert_same(*results)


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (0, 3)], ids=str)
def test_leading_dimensions(forced, leading):
    flat = integers(torch.Size(leading).numel(), NARROW)
    problem = replace(flat, x=flat.x.reshape(*leading, 20), grad_out=flat.grad_out.reshape(*leading, 5))
    assert_same(run(fused, problem), run(eager, problem))


@pytest.mark.parametrize("activation", ["identity", "relu"])
@in_each
def test_every_subset_of_gradients(forced, activation, widths):
    problem = integers(20, widths, activation)
    names = dict.fromkeys(("x", "weight0", "bias0", f"weight{len(widths) - 2}"))
    for wanted in (subset for n in range(4) for subset in itertools.combinations(names, n)):
        assert_same(run(fused, problem, wanted), run(eager, problem, wanted))


@pytest.mark.parametrize("wanted", ["x", "weight0", "bias0"])
@in_each
def test_one_gradient_from_saved_preactivations(forced, widths, wanted):
    assert_as_accurate([problem_of(33, widths, "gelu", seed=seed) for seed in range(8)], wanted=[wanted])


@in_each
def test_without_gradients(forced, widths):
    problem = integers(12, widths)
    args = problem.x, problem.weights, problem.biases, problem.activations
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(fused(*args), eager(*args))


def test_a_lazily_negated_view(forced):
    """Its memory holds the other sign."""
    negated = torch.complex(*torch.randint(-2, 3, (2, 6, 9), device=DEVICE).float()).conj().imag
    assert negated.is_neg()
    x = negated.resolve_neg()
    weight = torch.randint(-2, 3, (4, 9), device=DEVICE).float().requires_grad_()
    assert torch.equal(fastenc.fused_dense(negated, weight), fastenc.fused_dense(x, weight))
    for weights in ([weight], [weight, torch.eye(4, device=DEVICE)]):
        names, biases = ["identity"] * len(weights), [None] * len(weights)
        by_negated, by_itself = (
            torch.autograd.grad(fused(x, weights, biases, names), weight, g)[0] for g in (negated[:, :4], x[:, :4])
        )
        assert torch.equal(by_negated, by_itself)


# What looks on.


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@in_each
def test_second_derivatives(forced, activation, widths):
    worst = Worst()
    for seed in range(4):
        problem = problem_of(20, widths, activation, seed=seed)
        sides = []
        for forward, dtype in ((fused, torch.float32), (eager, torch.float32), (eager, torch.float64)):
            leaves = [
                leaf.detach().to(dtype).requires_grad_() for leaf in (*problem.leaves().values(), problem.grad_out)
            ]
            x, *parameters, grad_out = leaves
            out = forward(x, parameters[::2], parameters[1::2], problem.activations)
            grads = torch.autograd.grad(out, leaves[:-1], grad_out, create_graph=True)
            scalar = sum((g * g.detach().cos()).sum() for g in grads) + (out * out).sum()
            sides.append({str(i): g for i, g in enumerate(torch.autograd.grad(scalar, leaves)) if g is not None})
        worst.add(*sides)
    worst.check()


def test_backward_twice(forced):
    problem = problem_of(12, NARROW)
    x = problem.x.requires_grad_()
    out = fused(x, problem.weights, problem.biases, problem.activations)
    first, second = (torch.autograd.grad(out.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@in_each
def test_batched_gradients(forced, widths):
    """A backward pass under vmap, of torch.func or of autograd itself."""
    problem = integers(4, widths)
    weight = problem.weights[0].requires_grad_()
    grads = torch.stack((problem.grad_out, problem.grad_out * 2))
    sides = []
    for forward in (fused, eager):
        out = forward(problem.x, problem.weights, problem.biases, problem.activations)

        def one(grad_out: Tensor, out: Tensor = out) -> Tensor:
            return torch.autograd.grad(out, weight, grad_out, retain_graph=True)[0]

        batched = torch.autograd.grad(out, weight, grads, is_grads_batched=True, retain_graph=True)[0]
        sides.append({"func": vmap(one)(grads), "autograd": batched})
    assert_same(*sides)


@in_each
def test_vmap_and_per_sample_gradients(forced, widths):
    problem = integers(6, widths)

    def forward(row: Tensor, weights: list[Tensor]) -> Tensor:
        return fused(row, weights, problem.biases, problem.activations)

    weights = list(problem.weights)
    args = problem.x, weights, problem.biases, problem.activations
    assert torch.equal(vmap(forward, in_dims=(0, None))(problem.x, weights), eager(*args))

    def loss(weights: list[Tensor], row: Tensor) -> Tensor:
        return forward(row, weights).sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))(weights, problem.x)
    whole = grad(lambda weights: eager(problem.x, weights, problem.biases, problem.activations).sum())(weights)
    for ours, theirs in zip(per_sample, whole, strict=True):
        assert torch.equal(ours.sum(0), theirs)


@in_each
def test_autocast(forced, widths):
    problem = integers(12, widths)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert_same(run(fused, problem), run(eager, problem))


@in_each
def test_compile(forced, widths):
    torch.compiler.reset()
    problem = integers(12, widths)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    assert_same(run(compiled, problem), run(eager, problem))


@pytest.mark.parametrize("widths", [(7, 5, 4, 3), (7, 130, 3)], ids=str)
def test_opcheck(forced, widths):
    activations = ["gelu", "relu", "silu"][: len(widths) - 1]
    problem = problem_of(6, widths, activations)
    x, weights, biases = problem.x, list(problem.weights), list(problem.biases)
    operators = torch.ops.fastenc
    leaves = [tensor.detach().requires_grad_() for tensor in (x, weights[0], biases[0])]
    opcheck(operators.dense_forward.default, (*leaves, "gelu", True))
    out, preact = operators.dense_forward(x, weights[0], biases[0], "gelu", True)
    opcheck(operators.dense_backward.default, (out, x, weights[0], preact, "gelu", [True, False, True]))
    trained = [weight.detach().requires_grad_() for weight in weights]
    opcheck(operators.encoder_forward.default, (x, trained, biases, activations, True))
    results = operators.encoder_forward(x, weights, biases, activations, True)
    mask = [True, *[True, False] * len(weights)]
    last = torch.ones_like(results[len(weights) - 1])
    opcheck(operators.encoder_backward.default, (last, x, weights, results, activations, mask))


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
    problem = problem_of(40, widths)
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
    monkeypatch.setitem(ops._ON_DEVICE, "cpu", [triton])
    monkeypatch.setattr("fastenc.functional.ops.everyday", lambda: None)
    triton._verdict.cache_clear()
    yield
    triton._verdict.cache_clear()


def test_auto_chooses_by_the_rule(auto_on_this_device):
    """Small single layers cost the host more than they save; narrow stacks save launches."""
    x, weight = torch.ones(4, 32, device=DEVICE), torch.ones(32, 32, device=DEVICE)
    dense = chosen(x, weight)
    assert dense.backend == "eager PyTorch"
    assert "triton: modelled, not measured: eager PyTorch takes 0." in dense.reason
    stack = chosen(x, *[weight] * 4)
    assert stack.backend == "triton"
    assert "modelled, not measured: eager PyTorch takes 2." in stack.reason
    assert triton.describe() in stack.reason


def test_a_deep_stack_is_cut_into_kernels(auto_on_this_device):
    weights = [torch.eye(16, device=DEVICE)] * 11
    with ops.record() as decisions:
        out = fused(torch.ones(4, 16, device=DEVICE), weights, [None] * 11, ["relu"] * 11)
    assert torch.equal(out, torch.ones_like(out))
    assert [len(decision.activations) for decision in decisions] == [8, 3]


def test_parts():
    assert triton.parts((128, 64, 16)) == [slice(0, 3)]
    assert triton.parts((64,) * 9) == [slice(0, 8), slice(8, 9)]
    assert triton.parts((1024, 64, 16)) == [slice(0, 1), slice(1, 3)]
    assert triton.parts((128, 64, 128, 784)) == [slice(0, 4)]  # the last may be wide
    assert triton.parts((64, 784, 64, 784)) == [slice(0, 2), slice(2, 4)]
    assert triton.parts((512, 256)) == [slice(0, 1), slice(1, 2)]


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
    cached = (triton._why_not_imported, triton._why_no_gpu, triton._why_not_gpu, triton._kernels)
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
