"""fuse() on models of every form: the same answers and gradients, the same modules, and a true report."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from pathlib import Path

import fusible_models
import pytest
import torch
from accuracy import Worst
from fusible_models import MODELS
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import fastenc
from fastenc import ops

pytestmark = pytest.mark.usefixtures("one_thread")


def make(kind: type[nn.Module], dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind().to(dtype)
        return model, torch.randn(5, 6).to(dtype)


def answers(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output and all gradients."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        out = model(x)
    out.sin().sum().backward()
    return {"out": out.detach(), "x": x.grad, **{name: p.grad.clone() for name, p in model.named_parameters()}}


def assert_same_answers(fused: nn.Module, model: nn.Module, x: torch.Tensor) -> None:
    worst = Worst()
    worst.add(answers(fused, x), answers(model, x), answers(copy.deepcopy(model).double(), x.double()))
    worst.check()


def widths_fused(model: nn.Module, x: torch.Tensor) -> int:
    """How many layers ran fused."""
    with ops.record() as decisions:
        model(x)
    return sum(len(decision.activations) for decision in decisions)


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_same_answers(kind, training):
    model, x = make(kind)
    model.train(training)
    fused = fastenc.fuse(model, verbose=False)
    assert fused.training == training
    assert_same_answers(fused, model, x)


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_the_report_tells_what_runs(kind):
    model, x = make(kind)
    fused = fastenc.fuse(model.eval(), verbose=False)
    report = fastenc.fusion_report(fused)
    assert report.fused == kind.fused
    assert len(report.decided_later) == getattr(kind, "later", 0)
    if not report.decided_later and kind not in (fusible_models.Guarded,):  # which runs a layer at two places
        assert widths_fused(fused, x) == sum(run.count(" -> ") + 1 for run in report.fused)
    named = " ".join(report.fused).split()
    linears = [name for name, module in fused.named_modules() if isinstance(module, nn.Linear)]
    assert set(linears) - set(named) == set(report.left) or report.decided_later


def test_the_running_model_decides_where_the_report_cannot():
    model, x = make(fusible_models.LoopedWithSkips)
    assert widths_fused(fastenc.fuse(model, verbose=False), x) == 3
    model, x = make(fusible_models.Listed)
    assert widths_fused(fastenc.fuse(model, verbose=False), x) == 3


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_every_module_stays(kind):
    model, _ = make(kind)
    before = str(model)
    fused = fastenc.fuse(model, verbose=False)
    assert str(fused) == before == str(model)
    assert type(model) is kind
    assert isinstance(fused, kind)
    assert list(fused.state_dict()) == list(model.state_dict())
    for (name, ours), theirs in zip(fused.named_parameters(), model.parameters(), strict=True):
        assert ours is theirs, name
    assert [type(module) for module in fastenc.unfuse(fused).modules()] == [type(module) for module in model.modules()]


def test_inplace_changes_the_model_itself_and_back():
    model, x = make(fusible_models.Nested)
    assert fastenc.fuse(model, inplace=True, verbose=False) is model
    assert widths_fused(model, x) == 3
    assert fastenc.fuse(model, inplace=True, verbose=False) is model  # once more changes nothing
    assert widths_fused(model, x) == 3
    assert fastenc.unfuse(model, inplace=True) is model
    assert type(model) is fusible_models.Nested
    assert widths_fused(model, x) == 0


def test_buffers_are_shared():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.BatchNorm1d(8))
    fused = fastenc.fuse(model, verbose=False)
    fused(torch.randn(4, 6))
    assert model[2].num_batches_tracked == 1
    assert fused[2].running_mean is model[2].running_mean


def test_the_report_is_printed_and_short(capsys):
    fastenc.fuse(nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)) for _ in range(12))))
    assert capsys.readouterr().out == "fastenc.fuse: 24 layers fused:\n  *.0 + relu -> *.2 (x12)\n"
    fastenc.fuse(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
    assert capsys.readouterr().out == (
        "fastenc.fuse: nothing to fuse\nleft alone:\n  0: no activation follows it at once\n"
    )
    fastenc.fuse(nn.ReLU(), verbose=False)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copied_and_pickled(copied):
    model, x = make(fusible_models.Statements)
    fused = fastenc.fuse(model, verbose=False)
    twin = copied(fused)
    assert type(twin) is type(fused)
    assert torch.equal(twin(x), fused(x))
    assert widths_fused(twin, x) == 3
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype):
    model, x = make(fusible_models.Nested, dtype)
    fused = fastenc.fuse(model, verbose=False)
    out = fused(x)
    assert out.dtype == dtype
    assert next(fused.parameters()).dtype == dtype
    worst = Worst()
    worst.add({"out": out}, {"out": model(x)}, {"out": copy.deepcopy(model).double()(x.double())})
    worst.check()


def test_leading_dimensions_and_autocast():
    model, _ = make(fusible_models.Nested)
    fused = fastenc.fuse(model, verbose=False)
    x = torch.randn(2, 3, 6)
    assert fused(x).shape == (2, 3, 4)
    assert fused(x[0, 0]).shape == (4,)
    assert fused(x[:0]).shape == (0, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert fused(x).dtype == torch.bfloat16


def test_bad_shapes_raise_what_they_did():
    model, _ = make(fusible_models.Nested)
    fused = fastenc.fuse(model, verbose=False)
    with pytest.raises(RuntimeError) as expected:
        model(torch.randn(5, 7))
    with pytest.raises(RuntimeError) as actual:
        fused(torch.randn(5, 7))
    assert str(actual.value) == str(expected.value)


def test_sparse_weights_are_left_to_pytorch():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
    fused = fastenc.fuse(model, verbose=False)
    model[0].weight = nn.Parameter(model[0].weight.detach().to_sparse())
    with pytest.raises(RuntimeError) as expected:  # which takes no such weight in F.linear, in its own words
        model(torch.randn(5, 6))
    fused[0].weight = model[0].weight
    with pytest.raises(RuntimeError) as actual:
        fused(torch.randn(5, 6))
    assert str(actual.value) == str(expected.value)


# What is left alone.


def left_alone(model: nn.Module, x: torch.Tensor, reason: str) -> None:
    fused = fastenc.fuse(model, verbose=False)
    report = fastenc.fusion_report(fused)
    assert any(reason in why for why in report.left.values()), report
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # quantised tensors
        assert torch.equal(fused(x), model(x))
        assert widths_fused(fused, x) == 0


def chain(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(layer, nn.ReLU())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (parametrizations.weight_norm, "is a ParametrizedLinear"),
        (parametrizations.spectral_norm, "is a ParametrizedLinear"),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "has hooks"),
        (lambda layer: layer.register_forward_hook(lambda *args: None), "has hooks"),
        (lambda layer: layer.register_forward_pre_hook(lambda *args: None), "has hooks"),
        (lambda layer: layer.register_full_backward_hook(lambda *args: None), "has hooks"),
        (lambda layer: setattr(layer, "forward", layer.forward), "has hooks, or a forward of its own"),
    ],
    ids=["weight norm", "spectral norm", "pruned", "hook", "pre-hook", "backward hook", "forward"],
)
def test_changed_layers(change, reason):
    layer = nn.Linear(6, 8)
    model = chain(layer).eval()
    change(layer)
    left_alone(model, torch.randn(5, 6), reason)


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_subclasses():
    left_alone(chain(Doubling(6, 8)), torch.randn(5, 6), "is a Doubling, not nn.Linear itself")


@pytest.mark.filterwarnings("ignore:.*deprecated.*")
def test_dynamically_quantised_layers():
    model = torch.ao.quantization.quantize_dynamic(chain(nn.Linear(6, 8)), {nn.Linear}, torch.qint8)
    left_alone(model, torch.randn(5, 6), "is a Linear")


def test_a_hook_on_the_activation_sees_what_it_did():
    model = chain(nn.Linear(6, 8))
    seen = []
    model[1].register_forward_hook(lambda module, args, out: seen.append((args[0].clone(), out)))
    x = torch.randn(5, 6)
    fused = fastenc.fuse(model, verbose=False)
    assert torch.equal(fused(x), F.relu(model[0](x)))
    assert torch.equal(seen[0][0], model[0](x))
    assert fastenc.fusion_report(fused).fused == ()


def test_hooks_of_all_modules_see_each():
    model, x = make(fusible_models.Nested)
    fused = fastenc.fuse(model, verbose=False)
    seen = []
    with nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(type(module))):
        fused(x)
    assert seen.count(nn.Linear) == 3


def test_what_is_added_later_is_seen():
    model, x = make(fusible_models.Nested)
    fused = fastenc.fuse(model, verbose=False)
    seen = []
    handle = fused.fc2.register_forward_hook(lambda module, args, out: seen.append(out))
    assert widths_fused(fused, x) < 3
    assert len(seen) == 1
    handle.remove()
    assert widths_fused(fused, x) == 3
    fused.fc2 = Doubling(8, 8)
    other = copy.deepcopy(fastenc.unfuse(fused))
    assert torch.allclose(fused(x), other(x))


def test_tied_weights_and_frozen_layers():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU())
    model[2].weight = model[0].weight
    model[2].bias.requires_grad_(False)
    fused = fastenc.fuse(model, verbose=False)
    assert fused[2].weight is fused[0].weight is model[0].weight
    x = torch.randn(5, 6)
    fused(x).sum().backward()
    actual = fused[0].weight.grad.clone()
    model.zero_grad()
    model(x).sum().backward()
    assert torch.allclose(actual, model[0].weight.grad)
    assert fused[2].bias.grad is None


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")
def test_scripted_modules():
    model = torch.jit.script(chain(nn.Linear(6, 8)))
    fused = fastenc.fuse(model, inplace=True, verbose=False)
    assert fused is model
    assert "scripted" in next(iter(fastenc.fusion_report(fused).left.values()))


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")
def test_scripting_tracing_and_fx_see_the_original():
    model = chain(nn.Linear(6, 8)).eval()
    fused = fastenc.fuse(model, verbose=False)
    x = torch.randn(5, 6)
    traced = torch.jit.trace(fused, x)
    assert "fastenc::" not in str(traced.inlined_graph)
    assert torch.equal(traced(x), model(x))
    assert torch.equal(torch.jit.script(fused)(x), model(x))
    assert torch.equal(torch.fx.symbolic_trace(fused)(x), model(x))


class Sourceless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)


def test_methods_without_source_or_with_another():
    names: dict = {"F": F}
    exec("def forward(self, x):\n    return F.relu(self.fc(x))", names)
    kind = type("Sourceless", (Sourceless,), {"forward": names["forward"]})
    left_alone(kind(), torch.randn(5, 6), "has no Python source")

    def forward(self, x):
        return F.relu(self.fc(x))

    forward.__code__ = forward.__code__.replace(co_consts=(*forward.__code__.co_consts, "more"))
    kind = type("Sourceless", (Sourceless,), {"forward": forward})
    left_alone(kind(), torch.randn(5, 6), "runs other code than its source shows")


def test_a_decorator_that_hides_what_it_calls():
    class Hiding(Sourceless):
        def forward(self, x):
            return F.relu(self.fc(x))

    inner = Hiding.forward
    held = [inner]

    def wrapper(self, x):
        return held[0](self, x)

    wrapper.__wrapped__ = inner
    Hiding.forward = wrapper
    left_alone(Hiding(), torch.randn(5, 6), "has a decorator that does not show what it calls")


def test_a_class_that_lists_its_subclasses_gets_none():
    class Watching(nn.Module):
        known: list = []  # noqa: RUF012

        def __init_subclass__(cls):
            Watching.known.append(cls)

    class Watched(Watching):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def forward(self, x):
            return F.relu(self.fc(x))

    fused = fastenc.fuse(Watched(), verbose=False)
    assert Watching.known == [Watched]
    assert widths_fused(fused, torch.randn(5, 6)) == 1
    assert isinstance(fused, Watched)


def test_no_module_and_no_copy():
    with pytest.raises(TypeError, match="and this is a list"):
        fastenc.fuse([nn.Linear(2, 2)])
    model = chain(nn.Linear(6, 8))
    model.stream = (number for number in range(3))  # cannot be copied
    with pytest.raises(TypeError, match="change the model itself: inplace=True"):
        fastenc.fuse(model, verbose=False)
    fastenc.fuse(model, inplace=True, verbose=False)
    assert widths_fused(model, torch.randn(5, 6)) == 1


def test_compiled_in_one_graph():
    model, x = make(fusible_models.Statements)
    fused = fastenc.fuse(model, verbose=False)
    compiled = copy.deepcopy(fused)
    compiled.compile(backend="aot_eager", fullgraph=True)
    assert_same_answers(compiled, fused, x)
    torch._dynamo.reset()


def test_functional_transforms():
    model, x = make(fusible_models.Nested)
    fused = fastenc.fuse(model, verbose=False)
    parameters = dict(fused.named_parameters())
    exact, _ = make(fusible_models.Nested)
    for module in (fused, exact):
        loss = lambda p, x, module=module: torch.func.functional_call(module, p, (x,)).sum()  # noqa: E731
        per_row = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
        if module is fused:
            ours = per_row
    assert all(torch.allclose(ours[name], per_row[name], atol=1e-6) for name in parameters)


def test_the_block_of_the_docs_runs(capsys):
    text = (Path(__file__).parents[1] / "docs" / "fuse.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict = {}
    exec(block, names)
    assert capsys.readouterr().out.startswith("fastenc.fuse: 3 layers fused:\n  0 + relu -> 2 + relu -> 4\n32 rows, ")
    assert type(names["model"]) is nn.Sequential
