"""The training engine: the ordinary steps' results, for every optimiser, loss, activation and option."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from accuracy import Worst
from torch.nn import functional as F

from fastenc import AutoEncoder, Encoder, Trainer, use_backend
from fastenc.activation import ACTIVATIONS
from fastenc.backends import cpu
from fastenc.backends.reference import dropout_scale
from fastenc.training.engine import LOSS_CODES, EngineSteps
from fastenc.training.losses import BATCH_LOSSES, LOSSES
from fastenc.training.sources import Rows
from fastenc.training.update import Update

ROWS, STEPS_A_EPOCH, BATCH = 70, 4, 19  # the last batch is short

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "decay": lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.003, betas=(0.8, 0.99), weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.003, weight_decay=0.1),
}


def make_model(activation: str = "tanh", final: str = "identity", bias: bool = True, dropout: float = 0.0) -> Encoder:
    return Encoder(17, (33, 20, 5), activation, final, bias, dropout)


def make_data(loss: str) -> Rows:
    x = torch.randn(ROWS, 17)
    if loss == "cross_entropy":
        return Rows(x, torch.randint(5, (ROWS,)))
    return Rows(x, torch.rand(ROWS, 5))


def orders(epochs: int) -> list[torch.Tensor]:
    return [torch.randint(ROWS, (ROWS,)) for _ in range(epochs)]  # rows may come more than once


def train(model, data, loss, optimizer, epochs, *, engine: bool, **options):
    """The losses of all steps; by the engine, or by autograd."""
    update = Update(optimizer, **options)
    steps = EngineSteps(data, BATCH, elsewhere="")
    losses = []
    with use_backend("auto" if engine else "reference"):
        for order in epochs:
            losses.append(steps.train(model, LOSSES[loss], update, order)[0].double())
    assert ("C++" in steps.explanation) == engine, steps.explanation
    return torch.cat(losses)


def in_double(data: Rows) -> Rows:
    target = data.target.double() if data.target.is_floating_point() else data.target
    return Rows(data.x.double(), target, weight=None if data.weight is None else data.weight.double())


def compare(model, data, loss, make_optimizer, epochs=50, order=None, **options):
    """The engine, autograd in float32 and in float64, each from the same weights and over the same batches."""
    order = order or orders(epochs)
    results = []
    for engine, double in ((True, False), (False, False), (False, True)):
        twin = copy.deepcopy(model).double() if double else copy.deepcopy(model)
        trained = [p for p in twin.parameters() if p.requires_grad]
        losses = train(
            twin, in_double(data) if double else data, loss, make_optimizer(trained), order, engine=engine, **options
        )
        results.append([losses, *(p.detach() for p in twin.parameters())])
    check(*results)
    return results[0]


def check(actual, eager, exact):
    """The error rule, for each tensor."""
    worst = Worst()
    worst.add(*({str(i): tensor for i, tensor in enumerate(result)} for result in (actual, eager, exact)))
    worst.check()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers_over_200_steps(optimizer):
    torch.manual_seed(0)
    compare(make_model(), make_data("mse"), "mse", OPTIMIZERS[optimizer])


@pytest.mark.parametrize("loss", LOSS_CODES)
def test_losses_over_200_steps(loss):
    torch.manual_seed(1)
    model = make_model(final="sigmoid" if loss == "bce" else "identity")
    data = make_data(loss)
    if loss in ("mae", "huber"):  # far from where rounding decides the sign
        data = Rows(data.x, data.target + torch.where(data.target > 0.5, 5.0, -5.0))
    compare(model, data, loss, OPTIMIZERS["sgd"])


def test_losses_have_the_order_of_the_engine():
    assert set(LOSS_CODES) == set(LOSSES) - set(BATCH_LOSSES)


@pytest.mark.parametrize("side", ["output", "target"])
@pytest.mark.parametrize("size", [0.0, 1e-12, 1e-9, 1e-7])
def test_cosines_of_tiny_vectors(side, size):
    """Norms below 1e-8 are raised to it, and have PyTorch's gradient."""
    torch.manual_seed(9)
    model = Encoder(5, (5,), final_activation="identity")
    with torch.no_grad():
        model.layers[0].weight.copy_(torch.eye(5))
        model.layers[0].bias.zero_()
    x, target = torch.randn(BATCH, 5), torch.randn(BATCH, 5)
    data = Rows(x * size, target) if side == "output" else Rows(x, target * size)
    compare(model, data, "cosine", lambda p: torch.optim.SGD(p, lr=1.0), order=[torch.arange(BATCH)])


@pytest.mark.parametrize("loss", LOSS_CODES)
def test_weights_of_rows_over_200_steps(loss):
    torch.manual_seed(10)
    model = make_model(final="sigmoid" if loss == "bce" else "identity")
    data = make_data(loss)
    if loss in ("mae", "huber"):
        data = replace(data, target=data.target + torch.where(data.target > 0.5, 5.0, -5.0))
    weight = 2 * torch.rand(ROWS)
    weight[::5] = 0.0
    compare(model, replace(data, weight=weight), loss, OPTIMIZERS["sgd"])


def test_cross_entropy_with_probabilities():
    torch.manual_seed(2)
    data = Rows(torch.randn(ROWS, 17), torch.softmax(torch.randn(ROWS, 5), 1))
    compare(make_model(), data, "cross_entropy", OPTIMIZERS["adam"], epochs=10)


@pytest.mark.parametrize("activation", sorted(set(ACTIVATIONS) - {"relu", "leaky_relu"}))
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_smooth_activations_over_200_steps(activation, bias):
    torch.manual_seed(3)
    compare(make_model(activation, bias=bias), make_data("mse"), "mse", OPTIMIZERS["sgd"])


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_activations_with_a_kink(activation):
    # Few steps: later, rounding alone decides on which side of 0 some value falls.
    torch.manual_seed(4)
    compare(make_model(activation), make_data("mse"), "mse", OPTIMIZERS["sgd"], epochs=3)


@pytest.mark.parametrize(
    "options",
    [{"clip_norm": 0.05}, {"clip_value": 0.002}, {"l1": 0.001}, {"rate": lambda step: 0.05 / (1 + step)}],
    ids=lambda options: next(iter(options)),
)
def test_options(options):
    torch.manual_seed(5)
    compare(make_model(), make_data("mse"), "mse", OPTIMIZERS["sgd"], epochs=5, **options)


def test_large_batches_are_cut_into_chunks(monkeypatch):
    monkeypatch.setitem(globals(), "BATCH", 1300)
    monkeypatch.setitem(globals(), "ROWS", 3000)
    torch.manual_seed(6)
    for options in ({}, {"clip_norm": 0.05}):
        compare(make_model(), make_data("mse"), "mse", OPTIMIZERS["adam"], epochs=2, **options)


def test_every_build_of_the_kernels(build):
    torch.manual_seed(7)
    compare(make_model("gelu"), make_data("mse"), "mse", OPTIMIZERS["adam"], epochs=5)


def test_frozen_parameters_stay_and_cost_no_gradient():
    torch.manual_seed(8)
    for frozen in (["layers.0.weight", "layers.0.bias"], ["layers.1.weight"], ["layers.2.bias", "layers.0.bias"]):
        model = make_model()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        _, *after = compare(model, make_data("mse"), "mse", OPTIMIZERS["adam"], epochs=3)
        for (name, old), new in zip(before.items(), after, strict=True):
            assert torch.equal(old, new) == (name in frozen), name


def test_dropout_drops_what_its_numbers_say():
    torch.manual_seed(9)
    model, data = make_model(dropout=0.3), make_data("mse")
    twin = copy.deepcopy(model)
    order = torch.randperm(ROWS)
    torch.manual_seed(10)
    losses = train(model, data, "mse", OPTIMIZERS["sgd"](model.parameters()), [order], engine=True)
    torch.manual_seed(10)
    seed = torch.randint(2**62, (1,))
    optimizer = OPTIMIZERS["sgd"](twin.parameters())
    exact = []
    for step, rows in enumerate(order.split(BATCH)):
        out = data.x[rows]
        for index, layer in enumerate(twin.layers):
            out = ACTIVATIONS[layer.activation].forward(F.linear(out, layer.weight, layer.bias))
            if index < 2:
                out = out * dropout_scale(seed + step * 64, index, len(rows), layer.out_features, 0.3)
        optimizer.zero_grad()
        value = F.mse_loss(out, data.target[rows])
        value.backward()
        optimizer.step()
        exact.append(value.detach().double())
    torch.testing.assert_close(losses, torch.stack(exact), rtol=1e-5, atol=0)  # other dropped elements: some percent
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("brgemm", [True, False], ids=["brgemm where there is one", "our own products"])
@pytest.mark.parametrize("widths", [(17, 33, 20, 5), (401, 170, 5)], ids=str)
def test_bfloat16_under_autocast(widths, brgemm):
    torch.manual_seed(11)
    model = Encoder(widths[0], widths[1:], "tanh", "identity")
    data = Rows(torch.randn(ROWS, widths[0]), torch.rand(ROWS, widths[-1]))
    order, results = orders(5), []
    for engine, double in ((True, False), (False, False), (False, True)):
        twin = copy.deepcopy(model).double() if double else copy.deepcopy(model)
        optimizer = OPTIMIZERS["sgd"](twin.parameters())
        with torch.autocast("cpu", torch.bfloat16, enabled=not double), cpu.configured("auto", brgemm):
            losses = train(twin, in_double(data) if double else data, "mse", optimizer, order, engine=engine)
        results.append([losses, *(p.detach() for p in twin.parameters())])
    check(*results)


def test_resumes_in_the_middle_of_an_epoch():
    torch.manual_seed(14)
    model, data = make_model(), make_data("mse")
    order = torch.randperm(ROWS)
    whole, first = copy.deepcopy(model), copy.deepcopy(model)
    train(whole, data, "mse", OPTIMIZERS["adam"](whole.parameters()), [order], engine=True)
    optimizer = OPTIMIZERS["adam"](first.parameters())
    train(first, data, "mse", optimizer, [order[: 2 * BATCH]], engine=True)
    second = make_model()
    second.load_state_dict(first.state_dict())
    resumed = OPTIMIZERS["adam"](second.parameters())
    resumed.load_state_dict(optimizer.state_dict())
    train(second, data, "mse", resumed, [order[2 * BATCH :]], engine=True)
    for one, other in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_mixes_with_ordinary_steps():
    torch.manual_seed(15)
    model, data = make_model(), make_data("mse")
    twin = copy.deepcopy(model)
    optimizers = [OPTIMIZERS["adam"](m.parameters()) for m in (model, twin)]
    order = orders(3)
    for i, engine in enumerate((True, False, True)):
        train(model, data, "mse", optimizers[0], order[i : i + 1], engine=engine)
    train(twin, data, "mse", optimizers[1], order, engine=False)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
    steps = [float(optimizers[0].state[p]["step"]) for p in model.parameters()]
    assert set(steps) == {3.0 * STEPS_A_EPOCH}


def test_parameters_may_have_taken_different_numbers_of_steps():
    torch.manual_seed(18)
    model, data = make_model(), make_data("mse")
    first, rest = torch.randperm(ROWS)[:BATCH], orders(3)
    results = []
    for engine, double in ((True, False), (False, False), (False, True)):
        twin = copy.deepcopy(model).double() if double else copy.deepcopy(model)
        rows = in_double(data) if double else data
        optimizer = OPTIMIZERS["adam"](twin.parameters())
        twin.layers[0].requires_grad_(False)
        losses = [train(twin, rows, "mse", optimizer, [first], engine=engine)]
        twin.layers[0].requires_grad_(True)  # from here on one step behind the others
        losses.append(train(twin, rows, "mse", optimizer, rest, engine=engine, rate=lambda step: 0.01 / (1 + step)))
        results.append([torch.cat(losses), *(p.detach() for p in twin.parameters())])
    check(*results)


def test_the_loss_of_a_bad_row_far_down_a_large_batch_is_told(one_thread):
    model, data = make_model(), Rows(torch.randn(1300, 17), torch.rand(1300, 5))
    data.target[1290] = np.nan
    for threads in (1, 4):
        torch.set_num_threads(threads)
        steps = EngineSteps(data, 1300, elsewhere="")
        losses, _ = steps.train(model, LOSSES["mse"], Update(OPTIMIZERS["adam"](model.parameters())), None)
        assert steps.stopped_in_time
        assert losses.isnan().tolist() == [True]


def test_leaves_no_state_where_pytorch_keeps_none():
    model = make_model()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    train(model, make_data("mse"), "mse", optimizer, orders(1), engine=True)
    assert optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize("where", ["x", "target"])
def test_a_loss_that_is_not_finite_stops_before_its_update(where):
    torch.manual_seed(16)
    model, data = make_model(), make_data("mse")
    getattr(data, where)[40] = np.inf
    order = torch.arange(ROWS)
    good, optimizer = copy.deepcopy(model), OPTIMIZERS["adam"](model.parameters())
    steps = EngineSteps(data, BATCH, elsewhere="")
    losses, counts = steps.train(model, LOSSES["mse"], Update(optimizer), order)
    assert steps.stopped_in_time
    assert len(losses) == len(counts) == 3
    assert losses.isfinite().tolist() == [True, True, False]
    train(good, data, "mse", OPTIMIZERS["adam"](good.parameters()), [order[: 2 * BATCH]], engine=True)
    for one, other in zip(model.parameters(), good.parameters(), strict=True):
        assert torch.equal(one, other)


def test_parameters_have_no_gradient_afterwards_and_graphs_of_before_are_void():
    model, x = AutoEncoder(Encoder(100)), torch.rand(64, 100)
    loss = F.mse_loss(model(x), x)
    Trainer(model).fit(x)
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
