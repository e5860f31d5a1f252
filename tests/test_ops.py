"""The operators torch.ops.fastenc, the choice of backend, and what happens without the extension."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from accuracy import ON_THE_CPU, PATHS, Worst, assert_same, draw, eager, fused, run, small_integers, take_path
from torch import Tensor
from torch.library import opcheck

import fastenc
from fastenc import ops
from fastenc.activation import ACTIVATIONS
from fastenc.backends import cpu

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # By opcheck itself, of its own tensors.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

for_each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def dense_arguments(activation: str, bias: bool = True, grad: bool = True, M: int = 6) -> tuple:
    problem = draw(M, (5, 4), activation, bias=bias)
    x, weight, b = problem.x, problem.weights[0], problem.biases[0]
    return tuple(t if t is None else t.requires_grad_(grad) for t in (x, weight, b))


# opcheck: the schema tells the truth, fakes have the right shapes and strides, gradients are registered properly, and
# all of it holds under torch.compile with dynamic shapes.


@pytest.mark.parametrize("bias", [True, False])
@for_each_activation
def test_opcheck_dense_forward(activation, bias):
    opcheck(torch.ops.fastenc.dense_forward.default, (*dense_arguments(activation, bias), activation, True))
    opcheck(
        torch.ops.fastenc.dense_forward.default, (*dense_arguments(activation, bias, grad=False), activation, False)
    )


@pytest.mark.parametrize("mask", [[True, True, True], [False, True, False], [True, False, True]], ids=str)
@for_each_activation
def test_opcheck_dense_backward(activation, mask):
    x, weight, bias = dense_arguments(activation, grad=False)
    out, preact = torch.ops.fastenc.dense_forward(x, weight, bias, activation, True)
    saved = preact if ACTIVATIONS[activation].saves_preact else out
    opcheck(torch.ops.fastenc.dense_backward.default, (torch.ones_like(out), x, weight, saved, activation, mask))


STACK = (7, 5, 4, 3)
MIXED = ["gelu", "relu", "silu"]


def stack_arguments(grad: bool, bias: bool = True) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    problem = draw(6, STACK, MIXED, bias=bias)
    leaves = [[t if t is None else t.requires_grad_(grad) for t in ts] for ts in (problem.weights, problem.biases)]
    return problem.x.requires_grad_(grad), *leaves


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck_encoder_forward(bias):
    opcheck(torch.ops.fastenc.encoder_forward.default, (*stack_arguments(True, bias), MIXED, True))
    opcheck(torch.ops.fastenc.encoder_forward.default, (*stack_arguments(False, bias), MIXED, False))


@pytest.mark.parametrize("mask", [[True] * 7, [False] * 5 + [True, True], [True] + [False] * 6], ids=str)
def test_opcheck_encoder_backward(mask):
    x, weights, biases = stack_arguments(False)
    results = torch.ops.fastenc.encoder_forward(x, weights, biases, MIXED, True)
    args = (torch.ones_like(results[2]), x, weights, results, MIXED, mask)
    opcheck(torch.ops.fastenc.encoder_backward.default, args)


@pytest.mark.parametrize("backend", ON_THE_CPU)
@for_each_activation
def test_operators_match_eager(backend, activation):
    """Called directly, with gradients by their registered formulas."""

    def stack(x, weights, biases, activations):
        if len(weights) == 1:
            return torch.ops.fastenc.dense_forward(x, weights[0], biases[0], activations[0], True)[0]
        return torch.ops.fastenc.encoder_forward(x, weights, biases, activations, True)[len(weights) - 1]

    with fastenc.use_backend(backend):
        for widths in [(9, 17), (9, 17, 16)]:
            worst = Worst()
            for seed in range(8):
                problem = draw(40, widths, activation, seed=seed)
                worst.add(run(stack, problem), run(eager, problem), run(eager, problem.map(Tensor.double)))
            worst.check()


@pytest.mark.parametrize("cut", [(1,), (2,), (3,), (1, 2), (1, 3), (1, 2, 3)], ids=str)
@pytest.mark.parametrize(
    "activations", [("gelu", "relu", "silu", "tanh"), ("relu", "gelu", "identity", "gelu")], ids=str
)
def test_cut_stacks_match_eager(cut, activations, monkeypatch):
    """As where a layer is left to eager PyTorch's product: each part by itself, forward and backward, any mask."""
    ends = [*cut, len(activations)]
    found = [slice(first, last) for first, last in zip([0, *cut], ends, strict=True)]
    monkeypatch.setattr(cpu, "parts", lambda x, weights, training: found)

    def stack(x, weights, biases, activations):
        return torch.ops.fastenc.encoder_forward(x, weights, biases, activations, True)[len(weights) - 1]

    worst = Worst()
    for seed in range(8):
        problem = draw(40, (9, 17, 16, 5, 8), activations, seed=seed)
        worst.add(run(stack, problem), run(eager, problem), run(eager, problem.map(Tensor.double)))
    worst.check()
    x, weights, biases = problem.x, list(problem.weights), list(problem.biases)
    results = torch.ops.fastenc.encoder_forward(x, weights, biases, activations, True)
    (last,) = torch.ops.fastenc.encoder_forward(x, weights, biases, activations, False)
    assert torch.equal(last, results[3])
    everything = torch.ops.fastenc.encoder_backward(problem.grad_out, x, weights, results, activations, [True] * 9)
    for wanted in range(9):
        mask = [number == wanted for number in range(9)]
        grads = torch.ops.fastenc.encoder_backward(problem.grad_out, x, weights, results, activations, mask)
        assert torch.equal(grads[wanted], everything[wanted])
        assert all(grad.numel() == 0 for number, grad in enumerate(grads) if number != wanted)


@pytest.mark.parametrize("backend", ON_THE_CPU)
def test_what_is_not_saved_is_empty(backend):
    with fastenc.use_backend(backend):
        for activation, record in ACTIVATIONS.items():
            args = dense_arguments(activation, grad=False)
            for save in (True, False):
                out, preact = torch.ops.fastenc.dense_forward(*args, activation, save)
                assert preact.shape == (out.shape if save and record.saves_preact else (0,))
        x, weights, biases = stack_arguments(False)
        every = torch.ops.fastenc.encoder_forward(x, weights, biases, MIXED, True)
        (last,) = torch.ops.fastenc.encoder_forward(x, weights, biases, MIXED, False)
        assert [tuple(result.shape) for result in every] == [(6, 5), (6, 4), (6, 3), (6, 5), (6, 3)]
        assert torch.equal(last, every[2])


def test_double_backward_through_the_operator():
    def by_operator(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.ops.fastenc.dense_forward(x, weight, bias, "gelu", True)[0]

    def by_eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return eager(x, [weight], [bias], ["gelu"])

    worst = Worst()
    for seed in range(8):
        problem = draw(40, (16, 17), "gelu", seed=seed)
        sides = []
        for forward, dtype in ((by_operator, torch.float32), (by_eager, torch.float32), (by_eager, torch.float64)):
            leaves = [t.detach().to(dtype).requires_grad_() for t in problem.leaves().values()]
            grads = torch.autograd.grad(forward(*leaves).sum(), leaves, create_graph=True)
            second = torch.autograd.grad(sum(grad.pow(2).sum() for grad in grads), leaves)
            sides.append({str(i): grad for i, grad in enumerate(second)})
        worst.add(*sides)
    worst.check()


def test_gradient_of_a_stack_that_saved_nothing_is_refused():
    x, weights, biases = stack_arguments(True)
    (out,) = torch.ops.fastenc.encoder_forward(x, weights, biases, MIXED, False)
    with pytest.raises(RuntimeError, match="save=True"):
        out.sum().backward()


# The choice of backend.


def kernels_ran(call) -> bool:
    """Whether no product was ATen's."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    names = {event.name for event in profile.events()}
    return not names & {"aten::addmm", "aten::mm", "aten::linear", "aten::matmul"}


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("widths", [(784, 128, 64), (64, 32)], ids=str)
def test_the_kernels_run(name, widths):
    """Not eager PyTorch in their place, which would give right answers and be slow, or have other bits."""
    problem = draw(64, widths, "gelu")
    with take_path(name):
        assert kernels_ran(lambda: run(fused, problem)) == (name != "reference")
        with torch.no_grad():
            args = problem.x, problem.weights, problem.biases, problem.activations
            assert kernels_ran(lambda: fused(*args)) == (name != "reference")


@pytest.mark.parametrize("layer", [fastenc.FusedDense(784, 64), fastenc.Encoder(784, (64, 32))], ids=["dense", "stack"])
def test_modules_run_the_kernels(layer):
    assert kernels_ran(lambda: layer(torch.randn(64, 784)).sum().backward())


def chosen(x: Tensor, weight: Tensor) -> str:
    with ops.record() as records:
        fastenc.fused_dense(x, weight)
    (decision,) = records
    return decision.backend


X, WEIGHT = torch.ones(64, 64), torch.ones(32, 64)


def test_unknown_backend():
    with pytest.raises(ValueError, match="unknown backend 'tritn'; choose one of auto, cpu, cuda, triton, reference"):
        fastenc.use_backend("tritn")


@pytest.mark.parametrize("backend", ON_THE_CPU)
def test_forced(backend):
    with fastenc.use_backend(backend):
        assert chosen(X, WEIGHT) == backend
    assert chosen(X, WEIGHT) == "cpu"


def test_nested():
    with fastenc.use_backend("reference"):
        with fastenc.use_backend("cpu"):
            with fastenc.use_backend("auto"):
                assert chosen(X.double(), WEIGHT.double()) == "eager PyTorch"
            assert chosen(X, WEIGHT) == "cpu"
        assert chosen(X, WEIGHT) == "reference"
    assert chosen(X, WEIGHT) == "cpu"


def test_put_back_after_an_error():
    with pytest.raises(KeyError), fastenc.use_backend("reference"):
        raise KeyError
    assert chosen(X, WEIGHT) == "cpu"


def test_a_call_holds_from_here_on_and_only_in_its_thread():
    found = {}

    def worker(name: str) -> None:
        fastenc.use_backend(name)
        started.wait()
        found[name] = chosen(X, WEIGHT)

    started = threading.Barrier(len(ON_THE_CPU))
    workers = [threading.Thread(target=worker, args=(name,)) for name in ON_THE_CPU]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join()
    assert found == {name: name for name in ON_THE_CPU}
    assert chosen(X, WEIGHT) == "cpu"


def test_a_forced_backend_is_not_used_where_it_cannot():
    with fastenc.use_backend("cpu"):
        assert chosen(X.double(), WEIGHT.double()) == "eager PyTorch"
        assert torch.equal(fastenc.fused_dense(X.double(), WEIGHT.double()), torch.full((64, 32), 64.0).double())


def test_the_backend_of_the_forward_pass_runs_the_backward_pass():
    problem = small_integers(draw(12, (9, 7), "relu"))
    weight = problem.weights[0].requires_grad_()
    with fastenc.use_backend("reference"):
        out = fastenc.fused_dense(problem.x, weight)
    out.sum().backward()
    assert torch.equal(weight.grad, ((problem.x @ weight.T > 0).float().T @ problem.x))


# Without the extension.


@pytest.fixture
def no_extension(monkeypatch):
    reason = "the C++ extension fastenc._C is not built; reinstall fastenc where there is a C++ compiler"
    monkeypatch.setattr(cpu, "why_unavailable", lambda: reason)
    monkeypatch.setattr(cpu, "eager_operators", lambda: None)
    ops._warn_once.cache_clear()
    yield reason
    ops._warn_once.cache_clear()


def test_without_the_extension_one_warning_and_right_results(no_extension):
    problem = draw(12, (9, 17, 5), "gelu")
    with pytest.warns(RuntimeWarning, match="fastenc runs on eager PyTorch: .* not built; reinstall"):
        actual = run(fused, problem)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(fused, problem)
    assert_same(actual, run(eager, problem))


def test_no_warning_where_eager_is_asked_for(no_extension):
    with warnings.catch_warnings(), fastenc.use_backend("reference"):
        warnings.simplefilter("error")
        fastenc.FusedDense(4, 3)(torch.ones(2, 4))


def test_forcing_what_is_not_there(no_extension):
    with pytest.raises(RuntimeError, match=r"backend 'cpu' is not available: .* is not built"):
        fastenc.use_backend("cpu")


# The cpu backend in words.


def test_configure():
    before = cpu.describe()
    with cpu.configured("generic", False) as description:
        assert description == cpu.describe() == "generic, no brgemm"
    assert cpu.describe() == before
    with pytest.raises(ValueError, match="this CPU cannot run kernels built for 'sse9'"):
        cpu.configure("sse9", True)
    assert cpu.describe() == before


@pytest.mark.parametrize(
    ("x", "weight", "bias", "reason"),
    [
        (
            X.double(),
            WEIGHT.double(),
            None,
            "the kernels take fp32, bf16 or fp16; x is torch.float64, weight torch.float64",
        ),
        (X, WEIGHT.bfloat16(), None, "x is torch.float32, weight torch.bfloat16"),
        (X.to("meta"), WEIGHT, None, "the kernels run on the CPU; x is on meta, weight on cpu"),
        (X.to_sparse_coo(), WEIGHT, None, "not plain dense tensors"),
        (X, WEIGHT[:, 1:], None, "shapes do not match: x (64, 64), weight (32, 63)"),
        (X, WEIGHT, torch.ones(31), "bias is torch.float32 (31,) on cpu; it must be torch.float32 (32,)"),
        (X, WEIGHT, torch.ones(32).half(), "bias is torch.float16 (32,) on cpu"),
    ],
)
def test_why_not(x, weight, bias, reason):
    assert reason in cpu.why_not(x, weight, bias)
    assert cpu.why_not(X, WEIGHT, torch.ones(32)) is None
