"""Who looks on while the layers run: torch.func, torch.compile, torch.export, modes, fake tensors, subclasses."""

from __future__ import annotations

import pytest
import torch
from accuracy import Worst, assert_same, draw, eager, fused, run, small_integers, take_path
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastenc
from fastenc import fused_dense
from fastenc.activation import ACTIVATIONS

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # By torch's own formulas for forward-mode derivatives.
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning"),
]

for_each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
WIDTHS = (6, 5, 4)


def double(activation: str, M: int = 3) -> tuple[Tensor, list[Tensor], list[Tensor], list[str]]:
    problem = draw(M, WIDTHS, activation, torch.float64)
    return problem.x, list(problem.weights), list(problem.biases), list(problem.activations)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """In float64 all ways are ATen's: what differs is the order of sums."""
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@for_each_activation
@pytest.mark.parametrize("transform", [jacrev, jacfwd, hessian], ids=lambda t: t.__name__)
def test_jacobians(activation, transform):
    x, weights, biases, names = double(activation)
    for argnum in (0, 1, 2):

        def of(forward, argnum=argnum):
            def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
                return forward(x, [weight, weights[1]], [bias, biases[1]], names)

            return transform(call, argnums=argnum)(x, weights[0], biases[0])

        assert_close(of(fused), of(eager))


@for_each_activation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_per_sample_gradients(activation, dtype):
    """vmap over grad, the usual way to them."""
    problem = draw(7, WIDTHS, activation, dtype)

    def per_sample(forward, parameters: list[Tensor], x: Tensor) -> tuple[list[Tensor], Tensor]:
        def loss(parameters: list[Tensor], row: Tensor) -> Tensor:
            return forward(row, parameters[:2], parameters[2:], problem.activations).pow(2).sum()

        return vmap(grad(loss, argnums=(0, 1)), in_dims=(None, 0))(parameters, x)

    parameters = [*problem.weights, *problem.biases]
    exact_parameters = [p.double() for p in parameters]
    sides = []
    for forward, args in (
        (fused, (parameters, problem.x)),
        (eager, (parameters, problem.x)),
        (eager, (exact_parameters, problem.x.double())),
    ):
        of_parameters, of_x = per_sample(forward, *args)
        sides.append({str(i): t for i, t in enumerate((*of_parameters, of_x))})
    worst = Worst()
    worst.add(*sides)
    worst.check()


@pytest.mark.parametrize(
    "in_dims",
    [
        (0, None, None),
        (1, None, None),
        (None, 0, 0),
        (0, 0, 0),
        (0, 0, None),
        (1, 2, 1),
        (None, None, 0),
        (None, 1, None),
    ],
    ids=str,
)
@for_each_activation
def test_vmap(path, activation, in_dims):
    """Every operand batched or not, in any dimension; exact where the activation is."""
    base = [torch.randint(-2, 3, shape).float() for shape in ((4, 6), (5, 6), (5,))]
    args = [t if dim is None else torch.stack([t, t + 1, -t], dim) for t, dim in zip(base, in_dims, strict=True)]
    out = vmap(lambda *a: fused_dense(*a, activation), in_dims=in_dims)(*args)
    expected = vmap(lambda x, w, b: eager(x, [w], [b], [activation]), in_dims=in_dims)(*args)
    torch.testing.assert_close(out, expected)
    if activation in ("identity", "relu"):
        assert torch.equal(out, expected)


def test_vmap_of_vmap_and_no_bias(path):
    x, weight = torch.randint(-2, 3, (2, 3, 4, 6)).float(), torch.randint(-2, 3, (2, 5, 6)).float()
    out = vmap(vmap(fused_dense, in_dims=(0, None)))(x, weight)
    assert torch.equal(out, torch.relu(x @ weight[:, None].mT))


@pytest.mark.parametrize("dims", [(None,), (0,)], ids=str)
def test_vmap_then_backward(path, dims):
    """Ordinary autograd through a vmapped call."""
    problem = small_integers(draw(4, (6, 5), "relu"))
    grads = []
    for forward in (lambda x, w: fused_dense(x, w), lambda x, w: torch.relu(x @ w.T)):
        weight = problem.weights[0].clone().requires_grad_()
        stacked = torch.stack([weight, weight + 1]) if dims == (0,) else weight
        x = torch.stack([problem.x, problem.x + 1]).requires_grad_()
        vmap(forward, in_dims=(0, *dims))(x, stacked).sum().backward()
        grads.append({"weight": weight.grad, "x": x.grad})
    assert_same(*grads)


@for_each_activation
def test_vjp_and_jvp(path, activation):
    x, weights, biases, names = double(activation)
    for forward in (fused, eager):
        out, pull = vjp(lambda x, f=forward: f(x, weights, biases, names), x)
        pulled = pull(torch.ones_like(out))[0]
        pushed = jvp(lambda x, f=forward: f(x, weights, biases, names), (x,), (torch.ones_like(x),))[1]
        if forward is fused:
            actual = pulled, pushed
    assert_close(actual[0], pulled)
    assert_close(actual[1], pushed)


def test_functional_call():
    model = fastenc.Encoder(6, (5, 4))
    x = torch.randn(3, 6)
    doubled = {name: 2 * parameter.detach() for name, parameter in model.named_parameters()}
    weights, biases = [doubled[f"layers.{i}.weight"] for i in (0, 1)], [doubled[f"layers.{i}.bias"] for i in (0, 1)]
    assert torch.equal(functional_call(model, doubled, x), fused(x, weights, biases, ["relu", "relu"]).detach())


# torch.compile and torch.export. "aot_eager" is all of torch.compile but the code generation, which takes seconds.


@for_each_activation
def test_compile_is_full_graph(fresh_compiler, activation):
    for widths in [(9, 17), (9, 17, 5)]:
        compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
        worst = Worst()
        for seed in range(8):
            problem = draw(20, widths, activation, seed=seed)
            worst.add(run(compiled, problem), run(eager, problem), run(eager, problem.map(Tensor.double)))
        worst.check()


def test_compile_with_the_default_compiler(fresh_compiler):
    model = fastenc.AutoEncoder(fastenc.Encoder(9, (7, 4), activation="silu"))
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(20, 9, requires_grad=True)
    compiled(x).sum().backward()
    actual = {name: parameter.grad for name, parameter in model.named_parameters()} | {"x": x.grad}
    model.zero_grad()
    x.grad = None
    model(x).sum().backward()
    for name, parameter in {**dict(model.named_parameters()), "x": x}.items():
        torch.testing.assert_close(actual[name], parameter.grad)


def test_compile_sees_one_operator_a_stack(fresh_compiler):
    seen = []

    def note(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if "fastenc" in str(node.target))
        return graph

    model = fastenc.Encoder(9, (7, 4, 3))
    with torch.no_grad():
        assert torch.equal(
            torch.compile(model, backend=note, fullgraph=True)(torch.ones(2, 9)), model(torch.ones(2, 9))
        )
    assert len(seen) == 1
    assert "encoder_forward" in seen[0]


def test_compile_does_not_compile_for_each_batch_size(fresh_compiler):
    count = 0

    def counting(graph, inputs):
        nonlocal count
        count += 1
        return graph

    model = fastenc.Encoder(9, (7, 4))
    compiled = torch.compile(model, backend=counting, dynamic=True, fullgraph=True)
    for M in (5, 6, 7, 64, 65):
        x = torch.randn(M, 9)
        torch.testing.assert_close(compiled(x), model(x))
    assert count == 1


@pytest.mark.parametrize("leading", [(), (2, 3), (0,)], ids=str)
def test_compile_other_ranks(fresh_compiler, leading):
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    problem = draw(max(1, torch.Size(leading).numel()), (9, 17, 5), "relu")
    x = torch.ones(*leading, 9)
    expected = eager(x, problem.weights, problem.biases, problem.activations)
    torch.testing.assert_close(compiled(x, problem.weights, problem.biases, problem.activations), expected)


@pytest.mark.parametrize("wanted", [("x",), ("weight0",), ("bias0",), ("weight1",), ("weight0", "bias1")], ids=str)
def test_compile_with_some_gradients(fresh_compiler, wanted):
    problem = small_integers(draw(12, (9, 17, 5), "relu"))
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    assert_same(run(compiled, problem, wanted), run(eager, problem, wanted))


@pytest.mark.parametrize("given", [torch.float32, torch.float64], ids=str)
def test_compile_under_autocast(fresh_compiler, given):
    problem = small_integers(draw(12, (9, 17, 5), "relu", given), 1)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(run(compiled, problem), run(eager, problem))


def test_export(tmp_path):
    model = fastenc.Encoder(9, (7, 4), activation="gelu").eval()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (torch.randn(5, 9),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "encoder.pt2")
    loaded = torch.export.load(tmp_path / "encoder.pt2").module()
    for M in (5, 8, 100):
        x = torch.randn(M, 9)
        torch.testing.assert_close(loaded(x), model(x))


# Modes, fake tensors, subclasses, other layouts.


def test_flop_counter(path):
    problem = small_integers(draw(8, (9, 7), "relu"))
    counts = []
    for forward in (fused, eager):
        with FlopCounterMode(display=False) as counter:
            assert_same(run(forward, problem), run(eager, problem))
        counts.append(counter.get_total_flops())
    if path == "reference":  # the kernels' operators have no formula for the counter
        assert counts[0] == counts[1]


def test_dispatch_mode(path):
    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    problem = small_integers(draw(8, (9, 7, 5), "relu"))
    expected = run(eager, problem)
    with Note():
        assert_same(run(fused, problem), expected)
    assert seen


def test_fake_tensors(path):
    with FakeTensorMode() as mode:
        x = mode.from_tensor(torch.ones(8, 9)).requires_grad_()
        model = fastenc.Encoder(9, (7, 4), activation="gelu")
        out = model(x)
        assert out.shape == (8, 4)
        out.sum().backward()
        assert x.grad.shape == (8, 9)
        assert fused_dense(x, model.layers[0].weight, None, "silu").shape == (8, 7)


def test_meta_device(path):
    x = torch.ones(2, 8, 9, device="meta", requires_grad=True)
    model = fastenc.Encoder(9, (7, 4), activation="gelu", device="meta")
    out = model(x)
    assert (out.shape, out.device.type) == ((2, 8, 4), "meta")
    out.sum().backward()
    assert x.grad.shape == (2, 8, 9)


class Logged(torch.Tensor):
    """A subclass that only notes what is done with it."""

    seen: list[str] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(getattr(func, "__name__", str(func)))
        return super().__torch_function__(func, types, args, kwargs or {})


def test_subclass_is_kept(path):
    """The result of a subclass is of the subclass, as with F.linear."""
    x = torch.randint(-2, 3, (4, 6)).float().as_subclass(Logged)
    weight = torch.randint(-2, 3, (5, 6)).float()
    out = fused_dense(x, weight)
    assert type(out) is Logged
    assert torch.equal(out.as_subclass(Tensor), torch.relu(x.as_subclass(Tensor) @ weight.T))


def test_parallel_paths_agree():
    """The paths are different code; on integers they must give the same bits."""
    problem = small_integers(draw(33, (9, 17, 5), "relu"))
    results = []
    for name in ("everyday", "functions", "cpu", "reference"):
        with take_path(name):
            results.append(run(fused, problem))
    for result in results[1:]:
        assert_same(result, results[0])
