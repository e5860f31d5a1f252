"""fused_dense() and encoder(), by each way that runs them: shapes, dtypes, views, memory, and PyTorch's own errors."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from accuracy import VIEWS, Problem, assert_as_accurate, assert_same, draw, eager, fused, run, small_integers
from torch import Tensor

from fastenc import encoder, fused_dense
from fastenc.activation import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("one_thread")

STACKS = {"dense": (9, 17), "stack": (9, 17, 5)}
in_both = pytest.mark.parametrize("widths", STACKS.values(), ids=STACKS)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@in_both
def test_as_accurate_as_pytorch(path, activation, widths):
    """The kernels have more shapes in test_backend_cpu.py; here it is that every path is given the same."""
    assert_as_accurate(draw(65, widths, activation, seed=seed) for seed in range(32))


@pytest.mark.parametrize("leading", [(), (0,), (1,), (7,), (2, 3), (0, 3), (2, 1, 3), (2, 1, 3, 1, 2)], ids=str)
@in_both
def test_leading_dimensions(path, widths, leading):
    rows = torch.Size(leading).numel()
    flat = small_integers(draw(rows, widths))
    problem = replace(flat, x=flat.x.reshape(*leading, widths[0]), grad_out=flat.grad_out.reshape(*leading, widths[-1]))
    assert_same(run(fused, problem), run(eager, problem))


def test_rows_of_nothing(path):
    """The shape cannot be inferred with -1."""
    for leading in [(0,), (3,), (2, 0)]:
        x, weight = torch.ones(*leading, 0), torch.ones(4, 0)
        assert fused_dense(x, weight, torch.ones(4)).shape == (*leading, 4)
        assert fused_dense(torch.ones(*leading, 4), torch.ones(0, 4)).shape == (*leading, 0)


@pytest.mark.parametrize("layers", [(0, 4), (4, 0), (0, 4, 3), (4, 0, 3), (4, 3, 0)], ids=str)
@pytest.mark.parametrize("M", [0, 3])
def test_empty_layers(path, M, layers):
    problem = small_integers(draw(M, layers))
    assert_same(run(fused, problem), run(eager, problem))


@pytest.mark.parametrize("view", VIEWS)
@in_both
def test_views(path, widths, view):
    change = VIEWS[view]
    problem = small_integers(draw(33, widths))
    assert_same(with_grads(fused, problem), with_grads(eager, problem))
    for changed in (
        replace(problem, x=change(problem.x)),
        replace(problem, weights=tuple(change(weight) for weight in problem.weights)),
        replace(problem, grad_out=change(problem.grad_out)),
        replace(problem, biases=tuple(torch.stack((bias, bias), 1)[:, 0] for bias in problem.biases)),
    ):
        assert_same(with_grads(fused, changed), with_grads(eager, changed))


def with_grads(forward: Callable[..., Tensor], problem: Problem) -> dict[str, Tensor]:
    """As `run`, but by autograd.grad: an expanded leaf has no `.grad` of its shape to write to."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in problem.leaves().items()}
    weights = [leaves[f"weight{i}"] for i in range(len(problem.weights))]
    biases = [leaves[f"bias{i}"] for i in range(len(problem.weights))]
    out = forward(leaves["x"], weights, biases, problem.activations)
    grads = torch.autograd.grad(out, list(leaves.values()), problem.grad_out)
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


@in_both
def test_three_dimensional_views(path, widths):
    """Leading dimensions that no reshape can flatten without a copy."""
    problem = small_integers(draw(30, widths))
    x = problem.x.view(5, 6, -1).transpose(0, 1)
    problem = replace(problem, x=x, grad_out=problem.grad_out.view(5, 6, -1).transpose(0, 1))
    assert_same(with_grads(fused, problem), with_grads(eager, problem))


@in_both
def test_gradient_of_a_sum_has_stride_zero(path, widths):
    problem = small_integers(draw(33, widths))
    results = []
    for forward in (fused, eager):
        leaves = [leaf.detach().requires_grad_() for leaf in (problem.x, *problem.weights)]
        forward(leaves[0], leaves[1:], problem.biases, problem.activations).sum().backward()
        results.append({str(i): leaf.grad for i, leaf in enumerate(leaves)})
    assert_same(*results)


@pytest.mark.parametrize("wanted", [s for n in range(4) for s in itertools.combinations(("x", "weight0", "bias0"), n)])
@pytest.mark.parametrize("activation", ["identity", "relu", "gelu"])
def test_every_subset_of_gradients(path, activation, wanted):
    """Those that exist are right, and the others are None; of a stack too, where upper layers still need theirs."""
    for widths in STACKS.values():
        problems = [draw(40, widths, activation, seed=seed) for seed in range(8)]
        assert_as_accurate(problems, wanted=wanted)
        assert run(fused, problems[0], wanted).keys() == {"out", *(f"grad_{name}" for name in wanted)}


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode])
@in_both
def test_without_gradients(path, widths, grad_mode):
    problem = draw(33, widths)
    expected = run(fused, problem)["out"]
    weights = [torch.nn.Parameter(weight) for weight in problem.weights]
    with grad_mode():
        out = fused(problem.x, weights, problem.biases, problem.activations)
    assert torch.equal(out, expected)
    assert not out.requires_grad
    assert out.is_inference() == (grad_mode is torch.inference_mode)
    with torch.inference_mode():
        x = problem.x.clone()
    assert torch.equal(fused(x, problem.weights, problem.biases, problem.activations), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.int64, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_other_dtypes_are_pytorch_s(path, activation, dtype):
    """The same bits, or the same refusal."""
    x, weight, bias = (torch.randint(0, 2, shape).to(dtype) for shape in ((5, 4), (3, 4), (3,)))
    if dtype == torch.float64:
        x, weight, bias = (torch.randn_like(t) for t in (x, weight, bias))
    for layers in (1, 2):
        weights, biases, names = [weight, weight[:, :3]][:layers], [bias, bias][:layers], [activation] * layers
        assert_same_outcome(
            lambda w=weights, b=biases, n=names: fused(x, w, b, n),
            lambda w=weights, b=biases, n=names: eager(x, w, b, n),
        )


def outcome(call: Callable[[], Tensor]) -> Tensor | Exception:
    try:
        return call()
    except Exception as error:
        return error


def assert_same_outcome(actual: Callable[[], Tensor], expected: Callable[[], Tensor]) -> None:
    found, wanted = outcome(actual), outcome(expected)
    if isinstance(wanted, Tensor):
        assert isinstance(found, Tensor), found
        assert_same({"out": found}, {"out": wanted})
    else:
        assert type(found) is type(wanted), (found, wanted)


def of(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


# x, weight, bias; what the message must name.
BAD = {
    "last dimension": ((of(2, 3), of(4, 5), of(4)), ["2x3", "5x4"]),
    "last dimension, no bias": ((of(2, 3), of(4, 5), None), ["2x3", "5x4"]),
    "last dimension of 1-D x": ((of(3), of(4, 5), of(4)), []),
    "last dimension of 3-D x": ((of(2, 2, 3), of(4, 5), of(4)), ["3", "5x4"]),
    "no rows": ((of(0, 3), of(4, 5), of(4)), ["0x3", "5x4"]),
    "dtype of weight": ((of(2, 3), of(4, 3, dtype=torch.float64), None), ["float", "double"]),
    "dtype of x": ((of(2, 3, dtype=torch.bfloat16), of(4, 3), of(4)), ["BFloat16", "Float"]),
    "dtype of bias": ((of(2, 3), of(4, 3), of(4, dtype=torch.float64)), []),
    "integer x": ((of(2, 3, dtype=torch.int64), of(4, 3), of(4)), []),
    "size of bias": ((of(2, 3), of(4, 3), of(5)), []),
    "scalar x": ((of(), of(4, 3), of(4)), []),
    "3-D weight": ((of(2, 3), of(2, 4, 3), None), []),
    "sparse weight": ((of(2, 3), of(4, 3).to_sparse_coo().to(torch.float64), None), []),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_raise_pytorch_s_errors(path, name):
    (x, weight, bias), named = BAD[name]
    with pytest.raises(Exception) as expected:
        torch.nn.functional.linear(x, weight, bias)
    with pytest.raises(expected.type) as found:
        fused_dense(x, weight, bias)
    with pytest.raises(expected.type):
        encoder(x, [weight, of(2, 4)], [bias, None], ["relu", "relu"])
    for word in named:
        assert word.lower() in str(expected.value).lower()
        assert word.lower() in str(found.value).lower()


@pytest.mark.parametrize("which", ["x", "weight", "bias"])
def test_device_mismatch(path, which):
    shapes = {"x": (2, 3), "weight": (4, 3), "bias": (4,)}
    args = [of(*shape, device="meta" if name == which else "cpu") for name, shape in shapes.items()]
    assert_same_outcome(
        lambda: fused_dense(*args).to("meta"), lambda: eager(args[0], args[1:2], args[2:], ["relu"]).to("meta")
    )


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        (of(2, 3), of(4, 3), of(1)),
        (of(2, 3), of(4, 3), of()),
        (of(2, 3), of(4, 3), of(2, 4)),
        (of(2, 3), of(3), None),
        (of(3), of(3), None),
        (of(2, 2, 3), of(4, 3), of(1)),
        (of(2, 3).to_sparse_coo(), of(4, 3), None),
    ],
    ids=["bias [1]", "scalar bias", "bias [M, N]", "weight [K]", "dot product", "3-D, bias [1]", "sparse x"],
)
def test_what_linear_takes_beyond_its_documentation(path, x, weight, bias):
    assert_same_outcome(
        lambda: fused_dense(x, weight, bias, "identity"), lambda: eager(x, [weight], [bias], ["identity"])
    )


def test_a_layer_of_a_stack_that_does_not_fit(path):
    with pytest.raises(RuntimeError, match=r"2x4 and 5x3"):
        encoder(of(2, 3), [of(4, 3), of(3, 5)], [None, None], ["relu", "relu"])


def test_unknown_activation(path):
    with pytest.raises(ValueError, match=r"unknown activation 'rleu'; choose one of identity, relu, .*silu"):
        fused_dense(of(2, 3), of(4, 3), None, "rleu")
    with pytest.raises(ValueError, match="unknown activation None"):
        fused_dense(of(2, 3), of(4, 3), None, None)
    with pytest.raises(ValueError, match="unknown activation 'rleu'"):
        encoder(of(2, 3), [of(4, 3), of(4, 4)], [None, None], ["relu", "rleu"])


@pytest.mark.parametrize("counts", [(2, 1, 2), (1, 2, 2), (2, 2, 1), (0, 0, 0)])
def test_lists_of_different_lengths(path, counts):
    weights, biases, names = ([value] * count for value, count in zip((of(3, 3), None, "relu"), counts, strict=True))
    with pytest.raises(ValueError, match="got {}, {} and {}".format(*counts)):
        encoder(of(2, 3), weights, biases, names)


def test_as_many_dropouts_as_layers(path):
    with pytest.raises(ValueError, match="a stack of 2 layers needs as many dropouts, not 1"):
        encoder(of(2, 3), [of(3, 3)] * 2, [None] * 2, ["relu"] * 2, [0.5])


@pytest.mark.parametrize("wanted", [None, ("x",), ("weight0",), ("bias0",), ("weight0", "bias0"), ("weight1",)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_more_is_kept_for_the_gradients_than_eager_keeps(path, activation, wanted):
    for widths in [(40, 30), (40, 30, 20, 10)]:
        problem = draw(50, widths, activation)
        if wanted is None or set(wanted) <= problem.leaves().keys():
            assert kept_bytes(fused, problem, wanted) <= kept_bytes(eager, problem, wanted)


def kept_bytes(forward: Callable[..., Tensor], problem: Problem, wanted: tuple[str, ...] | None) -> int:
    """Bytes of all different memory that the graph holds, and the output."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    leaves = {name: leaf.detach() for name, leaf in problem.leaves().items()}
    for name in leaves if wanted is None else wanted:
        leaves[name].requires_grad_()
    depth = len(problem.weights)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        weights, biases = [leaves[f"weight{i}"] for i in range(depth)], [leaves[f"bias{i}"] for i in range(depth)]
        note(forward(leaves["x"], weights, biases, problem.activations))
    return sum(kept.values())
