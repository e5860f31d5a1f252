import math

import pytest
import torch
from small_models import assert_same_weights, make_model, make_x
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, IterableDataset

from fastenc.data import DataError
from fastenc.training import Callback, Cosine, OneCycle, Plateau, Schedule, StepDecay, TorchSchedule, Trainer, WarmUp

STEPS, EPOCHS = 7, 4  # 50 rows in batches of 8


class Rates(Callback):
    """The rate of each step, or what it is after each epoch."""

    def __init__(self, each_step=True):
        self.seen, self.each_step = [], each_step

    @property
    def inside_steps(self):
        return self.each_step

    def on_train_batch_end(self, batch, logs):
        self.seen.append(self.trainer.optimizer.param_groups[0]["lr"])

    def on_epoch_end(self, epoch, logs):
        if not self.each_step:
            self.seen.append(self.trainer.optimizer.param_groups[0]["lr"])


def fit(rates=None, model=None, x=None, callbacks=(), epochs=EPOCHS, **options):
    trainer = Trainer(model or make_model(), **({"lr": 0.1, "seed": 0, "optimizer": "sgd"} | options))
    callbacks = [*callbacks, *([] if rates is None else [rates])]
    trainer.fit(make_x(50) if x is None else x, epochs=epochs, batch_size=8, callbacks=callbacks, verbose=False)
    return trainer


def torchs(make, each_step, lr=0.1):
    """The rates that a torch scheduler gives for the steps of the fit."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr)
    scheduler, seen = make(optimizer), []
    for _ in range(EPOCHS):
        for _ in range(STEPS):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if each_step:
                scheduler.step()
        if not each_step:
            scheduler.step()
    return seen


LIKE_TORCH = {
    "step": (StepDecay(2, 0.5), lambda o: lr_scheduler.StepLR(o, 2, 0.5), False),
    "cosine": (Cosine(final=0.1), lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS * EPOCHS, 0.01), True),
    "warm up": (WarmUp(10), lambda o: lr_scheduler.LambdaLR(o, lambda step: min(1.0, (step + 1) / 10)), True),
    "one cycle": (
        OneCycle(),
        lambda o: lr_scheduler.OneCycleLR(o, 0.1, STEPS * EPOCHS, cycle_momentum=False),
        True,
    ),
}


@pytest.mark.parametrize("case", LIKE_TORCH)
def test_the_rates_of_torch_schedulers(case):
    schedule, make, each_step = LIKE_TORCH[case]
    rates = Rates()
    fit(rates, schedule=schedule)
    expected = torchs(make, each_step)
    assert len(rates.seen) == len(expected)
    assert all(math.isclose(rate, other, rel_tol=1e-9) for rate, other in zip(rates.seen, expected, strict=True))


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle", "warm_up", "step", "plateau"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_engine_follows_a_schedule_in_long_calls(schedule, optimizer):
    """It must learn what it does a step a call, at the rates that a function of the step's number gives."""
    rates = Rates()
    whole = fit(schedule=schedule, optimizer=optimizer)
    assert whole.explain() == "28 of 28 steps were taken whole, by the C++ engine"
    fit(rates, schedule=schedule, optimizer=optimizer)
    by_number = fit(lr=rates.seen.__getitem__, optimizer=optimizer)
    assert_same_weights(whole.model, by_number.model)


def test_each_fit_starts_anew_and_history_has_the_rates():
    trainer = fit(schedule="cosine")
    first = trainer.history.history["lr"]
    assert list(trainer.history.history) == ["loss", "lr"]
    assert len(first) == EPOCHS
    assert first == sorted(first, reverse=True)
    again = trainer.fit(make_x(50), epochs=EPOCHS, batch_size=8, verbose=False)
    assert again.history["lr"] == first


def test_schedules_are_multiplied():
    rates = Rates()
    fit(rates, schedule="cosine", callbacks=[WarmUp(10)])
    warm = torchs(LIKE_TORCH["warm up"][1], True, 1.0)
    alone = Rates()
    fit(alone, schedule="cosine")
    assert rates.seen[10:] == alone.seen[10:]
    for rate, other, grown in zip(rates.seen[:10], alone.seen, warm, strict=False):
        assert math.isclose(rate, other * grown, rel_tol=1e-9)


def test_groups_keep_their_own_rates():
    model = make_model()
    parameters = [*model.parameters()]
    groups = [{"params": parameters[:2], "lr": 0.1}, {"params": parameters[2:], "lr": 0.01}]
    trainer = fit(model=model, optimizer=torch.optim.SGD(groups), lr=1e-3, schedule=StepDecay(1, 0.5))
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.1 / 8, 0.01 / 8]
    assert "C++ engine" in trainer.explain()


class Scripted(Callback):
    def __init__(self, values):
        self.values = values

    def on_epoch_end(self, epoch, logs):
        logs["val_loss"] = self.values[epoch]


@pytest.mark.parametrize(
    ("values", "options", "factors"),
    [
        ([3, 2, 2, 2, 2, 2], {"patience": 2}, [1, 1, 1, 1, 0.1, 0.1]),
        ([3, 4, 2, 5, 6, 7], {"patience": 1, "gamma": 0.5}, [1, 1, 0.5, 0.5, 0.25, 0.125]),
        ([3, 4, 5, 6, 7, 8], {"patience": 1, "gamma": 0.5, "lowest": 0.3}, [1, 1, 0.5, 0.3, 0.3, 0.3]),
        ([1, 2, 2, 3, 4, 5], {"patience": 1, "gamma": 0.5, "mode": "max"}, [1, 1, 1, 0.5, 0.5, 0.5]),
        ([3, 2.5, 2.4, 1, 1, 1], {"patience": 1, "gamma": 0.5, "min_delta": 0.4}, [1, 1, 1, 0.5, 0.5, 0.25]),
        ([math.nan, math.nan, 1, 1, 1, 1], {"patience": 2, "gamma": 0.5}, [1, 1, 0.5, 0.5, 0.5, 0.25]),
    ],
)
def test_plateau(values, options, factors):
    rates = Rates(each_step=False)
    trainer = Trainer(make_model(), "sgd", 1.0, seed=0)
    callbacks = [Scripted(values), Plateau(**options), rates]
    trainer.fit(make_x(), epochs=6, callbacks=callbacks, verbose=False)
    assert rates.seen == factors


@pytest.mark.parametrize("instance", [True, False])
def test_a_torch_scheduler_steps_after_each_epoch(instance):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def make(optimizer):
        return lr_scheduler.ExponentialLR(optimizer, 0.5)

    rates = Rates()
    schedule = make(optimizer) if instance else make
    trainer = fit(rates, model=model, optimizer=optimizer, lr=1e-3, schedule=schedule)
    assert rates.seen == torchs(make, False)
    trainer.fit(make_x(50), batch_size=8, verbose=False)
    assert trainer.optimizer.param_groups[0]["lr"] == 0.1 * 0.5**5  # it goes on
    assert trainer.explain() == "7 of 7 steps were taken whole, by the C++ engine"


def test_torchs_one_cycle_steps_after_each_batch_and_changes_momentum():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    schedule = lr_scheduler.OneCycleLR(optimizer, 0.1, STEPS * EPOCHS + 1)
    rates = Rates()
    trainer = fit(callbacks=[rates], model=model, optimizer=optimizer, lr=1e-3, schedule=schedule)
    assert "one a call for callbacks inside the epoch" in trainer.explain()
    other = make_model()
    by_hand = torch.optim.SGD(other.parameters(), 0.1, momentum=0.9)
    scheduler = lr_scheduler.OneCycleLR(by_hand, 0.1, STEPS * EPOCHS + 1)
    for step in range(STEPS * EPOCHS):
        by_hand.step()
        scheduler.step()
        assert rates.seen[step] == by_hand.param_groups[0]["lr"]  # it has stepped before Rates looks
    assert optimizer.param_groups[0]["momentum"] == by_hand.param_groups[0]["momentum"] != 0.9


def test_torchs_plateau_is_told_what_was_measured():
    rates = Rates(each_step=False)

    def schedule(optimizer):
        return lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)

    trainer = Trainer(make_model(), "sgd", 1.0, schedule=schedule)
    values = [3, 4, 5]
    trainer.schedule.insert(0, Scripted(values))
    trainer.fit(make_x(), epochs=3, callbacks=[rates], verbose=False)
    assert rates.seen == pytest.approx([1.0, 0.1, 0.01])


def test_a_schedule_of_ones_own():
    class Halves(Schedule):
        def factor(self, step):
            return 0.5**step

    rates = Rates()
    fit(rates, schedule=Halves(), epochs=1)
    assert rates.seen == [0.1 * 0.5**step for step in range(STEPS)]


def test_a_stream_without_a_length():
    class Endless(IterableDataset):
        def __iter__(self):
            return iter(make_x(20))

    loader = DataLoader(Endless(), 5)
    fit(x=loader, schedule="step", epochs=2)
    with pytest.raises(ValueError, match="Cosine needs to know how many steps an epoch has, and x does not tell"):
        fit(x=loader, schedule="cosine")
    rates = Rates()
    fit(rates, x=DataLoader(make_x(56), 8), schedule=WarmUp())
    assert rates.seen[: STEPS + 1] == [0.1 * min(1.0, (step + 1) / STEPS) for step in range(STEPS + 1)]


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (
            {"schedule": "stairs"},
            ValueError,
            "schedule is 'stairs'; give one of step, cosine, warm_up, one_cycle, pla",
        ),
        ({"schedule": 3}, TypeError, "schedule is a int; give one of"),
        ({"schedule": lr_scheduler.StepLR}, TypeError, "schedule is a type; give one of"),
        ({"schedule": Rates()}, TypeError, "schedule is a Rates; give one of"),
        ({"schedule": torch.optim.SGD(make_model().parameters())}, TypeError, "schedule is a SGD; give one of"),
        ({"schedule": "cosine", "lr": lambda step: 0.1}, ValueError, "lr is a function and schedule is given; leave"),
        ({"optimizer": 3}, TypeError, "optimizer is a int; give one of sgd, adam, adamw, an Optimizer, or a function"),
        ({"optimizer": lambda parameters: 3, "lr": 1e-3}, TypeError, "function gives a int; make it give a torch.opt"),
    ],
)
def test_wrong_kinds(options, error, match):
    with pytest.raises(error, match=match):
        fit(**options)


def test_two_sides_that_set_the_rates():
    def torchs(optimizer):
        return lr_scheduler.StepLR(optimizer, 1)

    for options, sides in (
        ({"lr": lambda step: 0.1, "callbacks": [Cosine()]}, "lr, which is a function and by Cosine"),
        ({"schedule": torchs, "callbacks": [WarmUp()]}, "WarmUp and by a torch TorchSchedule"),
        ({"schedule": torchs, "callbacks": [TorchSchedule(torchs)]}, "a torch TorchSchedule and by a torch"),
    ):
        with pytest.raises(ValueError, match=f"the learning rates are set by {sides}.*; leave one of them out"):
            fit(**options)


def test_torch_schedulers_of_something_else():
    other = lr_scheduler.StepLR(torch.optim.SGD(make_model().parameters()), 1)
    with pytest.raises(ValueError, match="changes the rates of another optimiser than the Trainer's"):
        fit(schedule=other)
    with pytest.raises(TypeError, match="the schedule's function gives a int; make it give a scheduler"):
        fit(schedule=lambda optimizer: 3)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    schedule = lr_scheduler.OneCycleLR(optimizer, 0.1, 100)
    with pytest.raises(ValueError, match="steps with each batch does not know of accumulate"):
        fit(model=model, optimizer=optimizer, lr=1e-3, schedule=schedule, accumulate=2)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: StepDecay(0), "every is 0; it must be greater than 0"),
        (lambda: WarmUp(-1), "steps is -1; it must be"),
        (lambda: Cosine(1.0), "warm_up is 1.0; it must be at least 0 and less than 1"),
        (lambda: OneCycle(final=math.nan), "final is nan; it must be"),
        (lambda: Plateau(mode="best"), "mode is 'best'; give auto, min or max"),
    ],
)
def test_bad_options(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_find_lr(tmp_path):
    model, expected = make_model(), make_model()
    trainer = Trainer(model, "sgd", 0.1, seed=0)
    trainer.fit(make_x(), verbose=False)
    twin = Trainer(expected, "sgd", 0.1, seed=0)
    twin.fit(make_x(), verbose=False)
    found = trainer.find_lr(make_x(), highest=1e4, batch_size=8)
    assert found.rates[0] == pytest.approx(1e-7)
    assert len(found.rates) == len(found.losses) == len(found.smoothed) <= 100
    assert found.rates[0] < found.suggestion < found.rates[-1] < 1e4  # it exploded before
    found.plot(tmp_path / "rates.png")
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")
    trainer.fit(make_x(), epochs=2, verbose=False)  # as if nothing had been
    twin.fit(make_x(), epochs=2, verbose=False)
    assert_same_weights(model, expected)


def test_the_rate_that_is_found_learns():
    def after(lr):
        return Trainer(make_model(), "sgd", lr, seed=0).fit(make_x(), epochs=5, verbose=False).history["loss"][-1]

    suggestion = Trainer(make_model(), "sgd", seed=0).find_lr(make_x(), batch_size=8, highest=1e3).suggestion
    assert after(suggestion) < after(suggestion / 1000)


def test_find_lr_refuses_what_it_cannot_try():
    trainer = Trainer(make_model())
    with pytest.raises(ValueError, match="lowest is 1 and highest 0"):
        trainer.find_lr(make_x(), lowest=1, highest=0.5)
    with pytest.raises(ValueError, match="steps is 3; give at least 10"):
        trainer.find_lr(make_x(), steps=3)
    with pytest.raises(ValueError, match="the loss is not finite from step 1 on"):
        Trainer(make_model(), loss=lambda p, y: p.sum() * math.nan).find_lr(make_x())
    with pytest.raises(DataError, match="find_lr needs arrays"):
        trainer.find_lr(DataLoader(make_x()))
