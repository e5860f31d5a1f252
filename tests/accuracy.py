"""What the tests of the layers share: inputs, eager PyTorch's answer, the answer in float64, and the rule between them.

Everything here takes a stack of layers; one dense layer is a stack of one.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import fastenc
from fastenc.activation import ACTIVATIONS
from fastenc.backends import BACKENDS
from fastenc.functional import encoder, fused_dense

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# How near to zero, beside the sum of its terms' sizes, rounding may decide which side of a kink a sum is on. The last
# number is for sums of hidden outputs, which were themselves rounded to the dtype.
MARGINS = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-5, 2**-7), torch.float16: (1e-5, 2**-10)}
KINKED = ("relu", "leaky_relu")

Forward = Callable[[Tensor, Sequence[Tensor], Sequence["Tensor | None"], Sequence[str]], Tensor]


@dataclass(frozen=True)
class Problem:
    """Inputs of a stack: x [M, K], weights [N_i, N_(i-1)], biases [N_i] or None, grad_out [M, N_last]."""

    x: Tensor
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    activations: tuple[str, ...]
    grad_out: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> Problem:
        return replace(
            self,
            x=change(self.x),
            weights=tuple(change(weight) for weight in self.weights),
            biases=tuple(None if bias is None else change(bias) for bias in self.biases),
            grad_out=change(self.grad_out),
        )

    def leaves(self) -> dict[str, Tensor]:
        named = {"x": self.x}
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            named[f"weight{i}"] = weight
            if bias is not None:
                named[f"bias{i}"] = bias
        return named


def draw(
    M: int,
    widths: Sequence[int],
    activations: str | Sequence[str] = "relu",
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    seed: int = 0,
) -> Problem:
    """Random inputs for `M` rows through layers widths[0] -> widths[1] -> ...

    No sum before a kink is so near to zero that rounding decides whether its gradient passes: neither decision would be
    wrong. Such rows are drawn again.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    names = (activations,) * (len(widths) - 1) if isinstance(activations, str) else tuple(activations)
    pairs = list(itertools.pairwise(widths))
    weights = tuple((normal(N, K) / math.sqrt(max(K, 1))).to(dtype) for K, N in pairs)
    biases = tuple(normal(N) / 2 if bias else None for _, N in pairs)
    problem = Problem(normal(M, widths[0]), weights, biases, names, normal(M, widths[-1]))
    if widths[0] == 0:
        return problem
    doubtful = _near_a_kink(problem, problem.x).nonzero().flatten()
    while len(doubtful):
        problem.x[doubtful] = normal(len(doubtful), widths[0])
        doubtful = doubtful[_near_a_kink(problem, problem.x[doubtful])]
    return problem


def _near_a_kink(problem: Problem, x: Tensor) -> Tensor:
    near = torch.zeros(len(x), dtype=torch.bool)
    out = x.double()
    for i, (weight, bias, name) in enumerate(zip(problem.weights, problem.biases, problem.activations, strict=True)):
        weight, bias = weight.double(), torch.zeros(()) if bias is None else bias.double()
        preact = out @ weight.T + bias
        if name in KINKED:
            margin = MARGINS.get(x.dtype, (1e-12, 1e-12))[min(i, 1)]
            near |= (preact.abs() < margin * (out.abs() @ weight.T.abs() + bias.abs())).any(1)
        out = ACTIVATIONS[name].forward(preact)
    return near


def eager(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], activations: Sequence[str]) -> Tensor:
    """What the layers mean: F.linear, then the activation, layer by layer."""
    for weight, bias, name in zip(weights, biases, activations, strict=True):
        x = ACTIVATIONS[name].forward(torch.nn.functional.linear(x, weight, bias))
    return x


def fused(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], activations: Sequence[str]) -> Tensor:
    """The code under test: `fused_dense` for one layer, `encoder` for more."""
    if len(weights) == 1:
        return fused_dense(x, weights[0], biases[0], activations[0])
    return encoder(x, weights, biases, activations)


def run(forward: Forward, problem: Problem, wanted: Iterable[str] | None = None) -> dict[str, Tensor]:
    """out, and the gradients of the leaves named in `wanted` (all, if None), by name."""
    leaves = {name: leaf.detach() for name, leaf in problem.leaves().items()}
    asked = [leaves[name].requires_grad_() for name in (leaves if wanted is None else wanted)]
    depth = len(problem.weights)
    weights = [leaves[f"weight{i}"] for i in range(depth)]
    biases = [leaves.get(f"bias{i}") for i in range(depth)]
    out = forward(leaves["x"], weights, biases, problem.activations)
    if asked:
        out.backward(problem.grad_out)
    grads = {f"grad_{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"out": out.detach(), **grads}


def assert_as_accurate(
    problems: Iterable[Problem], forward: Forward = fused, wanted: Iterable[str] | None = None
) -> None:
    """The rule: |actual - fp64| <= 2 |eager - fp64| + 1e-6 |fp64|, each the largest over a tensor and all problems."""
    worst = Worst()
    for problem in problems:
        actual, expected = run(forward, problem, wanted), run(eager, problem, wanted)
        worst.add(actual, expected, run(eager, problem.map(Tensor.double), wanted))
    worst.check()


class Worst:
    """The largest errors so far, for each name."""

    def __init__(self) -> None:
        self._errors: dict[str, list[float]] = {}

    def add(self, actual: dict[str, Tensor], expected: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
        assert actual.keys() == expected.keys() == exact.keys()
        for name, value in actual.items():
            assert (value.shape, value.dtype) == (expected[name].shape, expected[name].dtype), name
            sizes = [distance(value, exact[name]), distance(expected[name], exact[name]), largest(exact[name])]
            # Written so that NaN stays.
            before = self._errors.get(name, [0.0, 0.0, 0.0])
            self._errors[name] = [old if old >= new else new for old, new in zip(before, sizes, strict=True)]

    def check(self) -> None:
        assert self._errors
        for name, (error, of_eager, size) in self._errors.items():
            limit = 2 * of_eager + 1e-6 * size
            assert limit < math.inf, f"{name} of eager is off by {of_eager}"
            assert error <= limit, f"{name} is off by {error:.3g}; eager's {of_eager:.3g} allows {limit:.3g}"


def distance(actual: Tensor, exact: Tensor) -> float:
    return largest(actual.detach().double() - exact)


def largest(tensor: Tensor) -> float:
    return tensor.detach().abs().max().item() if tensor.numel() else 0.0


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal values, shapes and dtypes; NaN equals NaN, and 0.0 equals -0.0."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert (value.shape, value.dtype) == (expected[name].shape, expected[name].dtype), name
        torch.testing.assert_close(
            value, expected[name], rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


def small_integers(problem: Problem, highest: int = 3) -> Problem:
    """The same shapes with integers from -highest to highest: every sum is exact in fp32, whatever its order."""
    generator = torch.Generator().manual_seed(1)

    def integers(like: Tensor) -> Tensor:
        return torch.randint(-highest, highest + 1, like.shape, generator=generator).to(like.dtype)

    return problem.map(integers)


def put_nan_and_inf(problem: Problem, weights: bool = True) -> Problem:
    """The problem with NaN, Inf and -Inf in single places of x, of grad_out and, unless told not to, of a weight."""
    for i, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        problem.x[i, 5] = value
        problem.grad_out[10 + i, 3] = value
        if weights:
            problem.weights[0][7 + i, 2] = value
    return problem


def assert_nan_and_inf_as_in_pytorch(by_kernels: Callable[[Problem], dict[str, Tensor]], problem: Problem) -> None:
    """As in float64, where PyTorch's fp32 on a CPU differs: gelu(inf) is NaN in its vectors alone."""
    if problem.activations[0] == "relu":  # its values as well: the gradient passes at NaN
        assert_same(by_kernels(problem), run(eager, problem))
    actual, expected = by_kernels(problem), run(eager, problem.map(Tensor.double))
    for name, value in expected.items():
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            torch.testing.assert_close(kind(actual[name]), kind(value), msg=lambda m, n=name: f"{n}: {m}")


def second_derivatives(problem: Problem) -> list[dict[str, Tensor]]:
    """Of a scalar of the gradients of x and of the parameters, by every leaf and by grad_out: of the fused layers, of
    eager PyTorch, and of that in float64.
    """
    sides = []
    for forward, dtype in ((fused, torch.float32), (eager, torch.float32), (eager, torch.float64)):
        leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in (*problem.leaves().values(), problem.grad_out)]
        x, *parameters, grad_out = leaves
        out = forward(x, parameters[::2], parameters[1::2], problem.activations)
        grads = torch.autograd.grad(out, leaves[:-1], grad_out, create_graph=True)
        scalar = sum((grad * grad.detach().cos()).sum() for grad in grads) + (out * out).sum()
        sides.append({str(i): g for i, g in enumerate(torch.autograd.grad(scalar, leaves)) if g is not None})
    return sides


def inside_nan(tensor: Tensor) -> Tensor:
    """The same values and strides, with NaN before and behind, at an address one element off alignment."""
    buffer = torch.full((tensor.numel() + 64,), torch.nan, dtype=tensor.dtype)
    view = buffer[1 : 1 + tensor.numel()].view(tensor.shape)
    view.copy_(tensor)
    return view


def _in_nan_matrix(tensor: Tensor, step: int) -> Tensor:
    buffer = torch.full((tensor.shape[0] + 2, step * tensor.shape[1] + 3), torch.nan, dtype=tensor.dtype)
    view = buffer[1:-1, 1 : 1 + step * tensor.shape[1] : step]
    view.copy_(tensor)
    return view


def _windows(tensor: Tensor) -> Tensor:
    rows, columns = tensor.shape
    return tensor.flatten()[: rows + columns - 1].clone().unfold(0, columns, 1)[:rows]


# From a matrix of at least 2 x 2 to one of the same shape that lies differently in memory; the last four have fewer
# different values.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.t().contiguous().t(),
    "sliced": lambda t: _in_nan_matrix(t, 1),
    "step 2": lambda t: _in_nan_matrix(t, 2),
    "one element off alignment": inside_nan,
    "expanded rows": lambda t: t[:1].expand_as(t),
    "expanded columns": lambda t: t[:, :1].expand_as(t),
    "one value": lambda t: t[:1, :1].expand_as(t),
    "overlapping rows": _windows,
}


def leave_nan_in_free_memory() -> None:
    """Take all of the process's free memory, fill it with NaN, and free it: what is not written is then seen.

    glibc would map large blocks afresh, and give memory at the end back; it is told not to.
    """
    libc = ctypes.CDLL(None)
    for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        libc.mallopt(option, 1 << 30)
    blocks = [torch.full((1 << size,), torch.nan) for size in range(4, 20) for _ in range(min(1000, 1 << (22 - size)))]
    del blocks
    assert torch.empty(1 << 12).isnan().any()


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def take_path(name: str) -> Iterator[None]:
    """One of PATHS, for a while."""
    if name == "functions":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(BACKENDS["cpu"], "eager_operators", lambda: None)
            yield
    elif name == "everyday":
        yield
    else:
        with fastenc.use_backend(name):
            yield


# The GPU backends run on CPU tensors only emulated or interpreted, which is slow: test_backend_gpu.py has those.
ON_THE_CPU = tuple(name for name, backend in BACKENDS.items() if backend.DEVICE != "cuda")
# The ways that run the layers on plain tensors: what users get, the autograd Functions in Python where the operators
# with autograd in C++ are not built, and each backend by force.
PATHS = ("everyday", "functions", *ON_THE_CPU)
