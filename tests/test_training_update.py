"""What Trainer does with gradients beside the optimiser's own rule: against loops written by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import assert_near, assert_same_weights, make_model, make_x
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset

from fastenc.training import Callback, Trainer
from fastenc.training.steps import take_step
from fastenc.training.update import Update

ROWS, BATCH, EPOCHS, LR = 22, 8, 3, 0.25  # batches of 8, 8 and 6
STEPS = 3 * EPOCHS
MOMENTUM, DECAY, L1 = 0.75, 0.125, 0.01
NORM, VALUE = 0.05, 0.01  # each below what the gradients reach


def falling(step: int) -> float:
    return LR / (1 + step)


def model_in_double() -> nn.Module:
    return make_model(dtype=torch.float64)


def by_hand(model: nn.Module, losses: list[float], options: dict) -> None:
    """SGD as its formula says, with one tensor at a time and nothing of PyTorch's optimisers or of `nn.utils`."""
    x = make_x(ROWS).double()
    velocity: dict[nn.Parameter, torch.Tensor] = {}
    step = 0
    for _ in range(EPOCHS):
        total = 0.0
        for batch in x.split(BATCH):
            model.zero_grad()
            value = ((model(batch) - batch) ** 2).mean()
            value.backward()
            total += value.item() * len(batch)
            trained = [p for p in model.parameters() if p.requires_grad]
            gradients = [p.grad.clone() for p in trained]
            if l1 := options.get("l1"):
                gradients = [g + l1 * p.sign() if p.ndim == 2 else g for p, g in zip(trained, gradients, strict=True)]
            if limit := options.get("clip_norm"):
                norm = sum((g * g).sum() for g in gradients).sqrt()
                if norm > limit:
                    gradients = [g * (limit / (norm + 1e-6)) for g in gradients]  # PyTorch's guard against 0
            if limit := options.get("clip_value"):
                gradients = [torch.where(g.abs() > limit, limit * g.sign(), g) for g in gradients]
            lr = options.get("lr", LR)
            rate = lr(step) if callable(lr) else lr
            for p, g in zip(trained, gradients, strict=True):
                g = g + options.get("weight_decay", 0.0) * p.detach()
                if momentum := options.get("momentum"):
                    velocity[p] = momentum * velocity.get(p, torch.zeros_like(g)) + g
                    g = g + momentum * velocity[p] if options.get("nesterov") else velocity[p]
                p.data -= rate * g
            step += 1
        losses.append(total / ROWS)


OPTIONS = {
    "momentum": {"momentum": MOMENTUM},
    "nesterov": {"momentum": MOMENTUM, "nesterov": True},
    "weight_decay": {"weight_decay": DECAY},
    "l1": {"l1": L1},
    "clip_norm": {"clip_norm": NORM},
    "clip_value": {"clip_value": VALUE},
    "lr": {"lr": falling},
    "l1 clip_norm": {"l1": L1, "clip_norm": NORM},
    "l1 clip_value": {"l1": L1, "clip_value": VALUE},
    "all": {
        "momentum": MOMENTUM,
        "nesterov": True,
        "weight_decay": DECAY,
        "l1": L1,
        "clip_norm": NORM,
        "lr": falling,
    },
}


def fitted(model: nn.Module, options: dict) -> list[torch.Tensor]:
    """The losses of the epochs, and the weights after them, by Trainer."""
    trainer = Trainer(model, "sgd", **{"lr": LR} | options)
    history = trainer.fit(make_x(ROWS), epochs=EPOCHS, batch_size=BATCH, shuffle=False, verbose=False)
    return [torch.tensor(history.history["loss"], dtype=torch.float64), *(p.detach() for p in model.parameters())]


def expected(model: nn.Module, options: dict) -> list[torch.Tensor]:
    losses: list[float] = []
    by_hand(model, losses, options)
    return [torch.tensor(losses, dtype=torch.float64), *(p.detach() for p in model.parameters())]


@pytest.mark.parametrize("frozen", [False, True], ids=["all trained", "first frozen"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_those_of_a_loop_by_hand(name, frozen):
    trained, hand, plain = model_in_double(), model_in_double(), model_in_double()
    if frozen:
        for model in (trained, hand, plain):
            next(model.parameters()).requires_grad_(False)
    exact = expected(hand, OPTIONS[name])
    assert_near(fitted(trained, OPTIONS[name]), exact)
    for without in OPTIONS[name]:  # so that each option matters in this data
        others = {option: value for option, value in OPTIONS[name].items() if option != without}
        others |= {"nesterov": False} if without == "momentum" else {}
        with pytest.raises(AssertionError, match="is off by"):
            assert_near(expected(copy.deepcopy(plain), others), exact)


def test_limits_that_are_not_reached_change_nothing():
    plain, limited = make_model(), make_model()
    for model, options in ((plain, {}), (limited, {"clip_value": 1e6})):
        Trainer(model, "sgd", 0.1, seed=0, **options).fit(make_x(), verbose=False)
    assert_same_weights(limited, plain)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_options_of_other_optimizers_are_those_of_a_loop_by_hand(optimizer):
    trained, hand = model_in_double(), model_in_double()
    x = make_x(ROWS).double()
    made = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimizer](hand.parameters(), weight_decay=0.01)
    for step, batch in enumerate(x.split(BATCH) * EPOCHS):
        made.param_groups[0]["lr"] = falling(step)
        made.zero_grad()
        F.mse_loss(hand(batch), batch).backward()
        for p in hand.parameters():
            p.grad += L1 * p.detach().sign() * (p.ndim == 2)
            p.grad.clamp_(-VALUE, VALUE)
        made.step()
    trainer = Trainer(trained, optimizer, falling, weight_decay=0.01, l1=L1, clip_value=VALUE)
    trainer.fit(x, epochs=EPOCHS, batch_size=BATCH, shuffle=False, verbose=False)
    assert_near([p.detach() for p in trained.parameters()], [p.detach() for p in hand.parameters()])


def test_options_go_with_an_optimizer_of_ones_own_and_with_data_from_a_loader():
    by_name, own = model_in_double(), model_in_double()
    x = make_x(ROWS).double()
    options = {"l1": L1, "clip_norm": NORM}
    Trainer(by_name, "sgd", LR, **options).fit(x, batch_size=BATCH, shuffle=False, verbose=False)
    trainer = Trainer(own, torch.optim.SGD(own.parameters(), LR, fused=True), **options)
    trainer.fit(TensorDataset(x), batch_size=BATCH, shuffle=False, verbose=False)
    assert_same_weights(own, by_name)


def test_parameters_without_a_gradient_stay():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.used(x)

    model = Half()
    used, unused = copy.deepcopy(model.used), copy.deepcopy(model.unused)
    Trainer(model, "sgd", LR, l1=L1, clip_norm=NORM).fit(make_x(), verbose=False)
    assert_same_weights(model.unused, unused)
    assert not torch.equal(model.used.weight, used.weight)


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({}, set()),
        ({"l1": L1}, {"aten._foreach_sign.default", "aten._foreach_add_.List"}),
        ({"clip_value": VALUE}, {"aten._foreach_clamp_min_.Scalar", "aten._foreach_clamp_max_.Scalar"}),
    ],
    ids=["none", "l1", "clip_value"],
)
def test_a_step_does_no_more_than_its_options_ask_for(options, more):
    model, x = nn.Linear(6, 6), make_x(BATCH)
    optimizer = torch.optim.SGD(model.parameters(), LR, fused=True)
    with Operations() as plain:
        F.mse_loss(model(x), x).backward()
        optimizer.step()
    optimizer.zero_grad()
    with Operations() as taken:
        take_step(model, [*model.parameters()], F.mse_loss, Update(optimizer, **options), x, x)
    taken.names.remove("aten.detach.default")  # of the loss that is given back
    assert sorted(set(taken.names) - set(plain.names)) == sorted(more)
    assert len(taken.names) == len(plain.names) + len(more)


# Rates that are a function of the step's number.


class Rates(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, batch, logs):
        self.seen.append(self.trainer.optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_steps_count_over_the_life_of_the_trainer(dtype):
    rates = Rates()
    trainer = Trainer(make_model(dtype=dtype), lr=falling)
    assert trainer.optimizer.param_groups[0]["lr"] == falling(0)
    trainer.fit(make_x(ROWS), epochs=2, batch_size=BATCH, callbacks=[rates], verbose=False)
    trainer.evaluate(make_x(ROWS))
    trainer.fit(TensorDataset(make_x(ROWS)), batch_size=BATCH, callbacks=[rates], verbose=False)
    trainer.fit(make_x(ROWS), batch_size=BATCH, verbose=False)
    trainer.fit(make_x(ROWS), batch_size=BATCH, callbacks=[rates], verbose=False)
    assert rates.seen == [falling(step) for step in (*range(9), 12, 13, 14)]


def test_a_rate_of_zero_is_a_step_that_changes_nothing():
    model = make_model()
    Trainer(model, lr=lambda step: 0.0).fit(make_x(), verbose=False)
    assert_same_weights(model, make_model())


def test_a_function_goes_before_what_a_callback_sets_and_for_an_optimizer_set_later():
    class Other(Callback):
        def on_epoch_begin(self, epoch):
            self.trainer.optimizer = torch.optim.SGD(self.trainer.model.parameters(), 1e9)

    rates = Rates()
    trainer = Trainer(make_model(), lr=falling)
    trainer.fit(make_x(ROWS), batch_size=BATCH, callbacks=[Other(), rates], verbose=False)
    assert rates.seen == [falling(step) for step in range(3)]


def test_rates_of_many_steps_are_those_of_single_ones():
    def make() -> Update:
        groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.5, 0.25)]
        return Update(torch.optim.SGD(groups), rate=falling)

    single, many = make(), make()
    for update in (single, many):
        update.begin()
    assert many.rates(3).tolist() == [[falling(step)] * 2 for step in (1, 2, 3)]
    for _ in range(3):
        single.begin()
    many.advance(3)
    assert many.steps.taken == single.steps.taken == 4
    assert [g["lr"] for g in many.optimizer.param_groups] == [g["lr"] for g in single.optimizer.param_groups]
    many.advance(0)
    assert many.steps.taken == 4
    fixed = Update(many.optimizer)
    assert fixed.rates(2).tolist() == [[falling(3)] * 2] * 2


# What is refused.

MODEL = make_model()
BAD = {
    "lr is -1; give a number of at least 0": {"lr": -1},
    "lr is nan; give": {"lr": float("nan")},
    "lr gives -0.5 for step 0; make it give a number of at least 0": {"lr": lambda step: step - 0.5},
    "lr gives nan for step 0": {"lr": lambda step: float("nan")},
    "lr gives None for step 0": {"lr": lambda step: None},
    "weight_decay is -1; give": {"weight_decay": -1},
    "weight_decay is nan; give": {"weight_decay": float("nan")},
    "momentum is -0.5; give": {"optimizer": "sgd", "momentum": -0.5},
    "momentum is nan; give": {"momentum": float("nan")},
    "nesterov=True needs a momentum above 0": {"optimizer": "sgd", "nesterov": True},
    "nesterov is True and adam takes none": {"nesterov": True},
    "l1 is -0.1; give a finite number of at least 0": {"l1": -0.1},
    "l1 is nan; give": {"l1": float("nan")},
    "l1 is inf; give": {"l1": float("inf")},
    "l1 is '1'; give": {"l1": "1"},
    "clip_norm is 0.0; give a finite number above 0, or None": {"clip_norm": 0.0},
    "clip_norm is nan; give": {"clip_norm": float("nan")},
    "clip_value is -1; give a finite number above 0, or None": {"clip_value": -1},
    "clip_value is inf; give": {"clip_value": float("inf")},
    "clip_norm and clip_value are both given; leave one of them out": {"clip_norm": 1.0, "clip_value": 1.0},
    "lr, weight_decay, momentum and nesterov belong to optimisers given by name": {
        "optimizer": torch.optim.SGD,
        "lr": falling,
    },
    "and nesterov belong to optimisers given by name; set them on your": {
        "optimizer": torch.optim.SGD,
        "nesterov": True,
    },
}


@pytest.mark.parametrize("message", BAD)
def test_bad_options_are_refused_in_words(message):
    with pytest.raises(ValueError, match=message) as caught:
        Trainer(MODEL, **BAD[message])
    assert "\n" not in str(caught.value)


def test_a_function_that_fails_later_stops_before_its_step():
    rates = Rates()
    trainer = Trainer(make_model(), lr=lambda step: 0.1 if step < 2 else -0.1)
    with pytest.raises(ValueError, match=r"lr gives -0\.1 for step 2; make it give"):
        trainer.fit(make_x(ROWS), batch_size=BATCH, callbacks=[rates], verbose=False)
    assert rates.seen == [0.1, 0.1]
