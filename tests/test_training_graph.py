"""A recorded step must train as the ordinary one does, whatever the user changes meanwhile.

Without a GPU the recorder is `recording.CpuRecorder`, which runs recorded operations again without any Python code;
with one, the same tests run on CUDA graphs.
"""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import assert_same_weights, make_classifier, make_model, make_x
from torch import nn
from whole_steps import (
    ALL_REPLAYED,
    GPU,
    LR,
    At,
    NoRecorder,
    assert_replayed,
    fit,
    make_trainer,
    twins,
)

from fastenc import AutoEncoder, Encoder
from fastenc.backends.rule import as_if_captured
from fastenc.training import Callback
from fastenc.training.graph import WARM_UP

OPTIMIZERS = {
    "adam": {"weight_decay": 2**-7},
    "adamw": {"weight_decay": 2**-7},
    "sgd": {"momentum": 0.5, "weight_decay": 2**-7},
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_bits_of_ordinary_steps(optimizer):
    whole, ordinary = twins(optimizer=optimizer, **OPTIMIZERS[optimizer])
    assert_replayed(whole, ALL_REPLAYED)
    for ours, theirs in zip(whole.model.parameters(), ordinary.model.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    for ours, theirs in zip(whole.optimizer.state.values(), ordinary.optimizer.state.values(), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(value is theirs[name] or torch.equal(value, theirs[name]) for name, value in ours.items())


STEP_OPTIONS = {
    "nesterov": {"optimizer": "sgd", "momentum": 0.5, "nesterov": True},
    "l1": {"l1": 2**-5},
    "clip_norm": {"optimizer": "sgd", "clip_norm": 2**-6},
    "clip_value": {"clip_value": 2**-10},
    "l1 clip_norm": {"l1": 2**-5, "clip_norm": 2**-6},
}


@pytest.mark.parametrize("name", STEP_OPTIONS)
def test_penalty_and_clipping_are_recorded(name):
    options = STEP_OPTIONS[name]
    whole, ordinary = twins(**options)
    assert_replayed(whole, ALL_REPLAYED)
    for ours, theirs in zip(whole.model.parameters(), ordinary.model.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    without = make_trainer(
        make_model(), **{name: options[name] for name in ("optimizer", "momentum") if name in options}
    )
    fit(without)
    assert not torch.equal(next(without.model.parameters()), next(whole.model.parameters()))


def test_the_warm_up_launches_what_the_recording_will():
    """Backends are chosen as within a CUDA graph, or the recording would have to compile kernels."""
    seen: list[bool] = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(as_if_captured.get())
            return x

    trainer = make_trainer(nn.Sequential(make_model(), Spy()))
    fit(trainer, epochs=1)
    assert_replayed(trainer, 6 - WARM_UP, 7)
    # Then once while it is recorded, where CUDA itself tells, and in the smaller last batch.
    assert seen[-WARM_UP - 2 :] == [*[True] * WARM_UP, False, False]


def test_a_second_fit_goes_on():
    whole, ordinary = twins()
    for trainer in (whole, ordinary):
        fit(trainer, epochs=1)
    assert_same_weights(whole.model, ordinary.model)
    assert_replayed(whole, 6 - WARM_UP, 7)


def test_labels_and_order_as_it_is():
    x, y = make_x(48), torch.arange(48) % 3
    whole = make_trainer(make_classifier(), loss="cross_entropy")
    ordinary = make_trainer(make_classifier(), loss="cross_entropy", recorder=NoRecorder())
    for trainer in (whole, ordinary):
        fit(trainer, x, y, shuffle=False, validation_data=(x, y))
    assert whole.history.history == ordinary.history.history
    assert_same_weights(whole.model, ordinary.model)
    assert_replayed(whole, 4 * 6 - WARM_UP, 4 * 6)  # no ragged batch


@pytest.mark.parametrize("loss", ["mae", "huber", "bce", "bce_with_logits"])
def test_other_losses(loss):
    def make():
        torch.manual_seed(0)
        return AutoEncoder(Encoder(6, (5, 3), "tanh"), "sigmoid")

    whole, _ = twins(make, loss=loss)
    assert_replayed(whole, ALL_REPLAYED)


def test_plain_torch_modules_with_buffers():
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, 6))

    whole, _ = twins(make)
    assert_replayed(whole, ALL_REPLAYED)
    assert whole.model[1].num_batches_tracked == 4 * 7


def test_dropout_draws_the_numbers_of_ordinary_steps():
    whole, _ = twins(lambda: make_model(dropout=0.5))
    if GPU:
        assert_replayed(whole, ALL_REPLAYED)
    else:  # there the CPU's generator is the host's
        assert (
            whole.explain()
            == "step by step: a step draws random numbers on the CPU or changes attributes of the model's modules"
        )


# What changes meanwhile.


class Schedule(Callback):
    """Halves the rate after every epoch, as users do it by hand."""

    def on_epoch_end(self, epoch, logs):
        for group in self.trainer.optimizer.param_groups:
            group["lr"] /= 2


class TorchSchedule(Callback):
    def on_train_begin(self):
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.trainer.optimizer, 0.5)

    def on_epoch_end(self, epoch, logs):
        self.schedule.step()


class EveryStep(Callback):
    """Another rate after every step, and what a user sees then."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, batch, logs):
        group = self.trainer.optimizer.param_groups[0]
        gradients = [parameter.grad.sum().item() for parameter in self.trainer.model.parameters()]
        self.seen.append((batch, logs["loss"], group["lr"], gradients))
        group["lr"] = LR / 2**batch


@pytest.mark.parametrize("schedule", [Schedule, TorchSchedule])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_learning_rates_change_without_another_recording(optimizer, schedule):
    whole, _ = twins(optimizer=optimizer, callbacks=lambda: [schedule()])
    assert_replayed(whole, ALL_REPLAYED)
    assert whole.optimizer.param_groups[0]["lr"] == LR / 16
    if not GPU:
        assert len(whole.recorder.recordings) == 1


def rates(step):
    """A float32 for each step, and never the one before."""
    return LR * (1 + step % 5) / 8


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_rate_for_each_step_without_another_recording(optimizer):
    whole, ordinary = twins(optimizer=optimizer, lr=rates)
    assert_replayed(whole, ALL_REPLAYED)
    for trainer in (whole, ordinary):
        fit(trainer, epochs=1)
        assert trainer.optimizer.param_groups[0]["lr"] == rates(5 * 7 - 1)
    assert_same_weights(whole.model, ordinary.model)
    fixed = make_trainer(make_model(), optimizer, lr=rates(WARM_UP))  # what a replay would use that is told nothing
    fit(fixed)
    assert fixed.history.history != whole.history.history
    if not GPU:
        assert len(whole.recorder.recordings) == 2  # one for each fit


def test_a_rate_for_each_step_and_a_listener():
    listeners = [EveryStep(), EveryStep()]
    left = list(listeners)
    whole, _ = twins(lr=rates, callbacks=lambda: [left.pop(0)])
    assert listeners[0].seen == listeners[1].seen
    assert [lr for _, _, lr, _ in listeners[0].seen] == [rates(step) for step in range(4 * 7)]
    assert_replayed(whole, ALL_REPLAYED)


def test_listeners_see_each_step():
    listeners = [EveryStep(), EveryStep()]
    left = list(listeners)
    whole, _ = twins(callbacks=lambda: [left.pop(0)])
    assert listeners[0].seen == listeners[1].seen
    assert_replayed(whole, ALL_REPLAYED)
    assert isinstance(whole.optimizer.param_groups[0]["lr"], float)


def freeze(trainer):
    next(trainer.model.parameters()).requires_grad_(False)


def eval_mode(trainer):
    trainer.model.eval()


def other_options(trainer):
    trainer.optimizer.param_groups[0]["weight_decay"] = 0.25


def reload_optimizer(trainer):
    trainer.optimizer.load_state_dict(copy.deepcopy(trainer.optimizer.state_dict()))


def clear_optimizer(trainer):
    trainer.optimizer.state.clear()


def other_optimizer(trainer):
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), LR, fused=True)


def other_weights(trainer):
    state = {name: torch.full_like(value, 2**-4) for name, value in trainer.model.state_dict().items()}
    trainer.model.load_state_dict(state)


CHANGES = {
    freeze: True,
    eval_mode: True,
    other_options: True,
    reload_optimizer: True,
    clear_optimizer: True,
    other_weights: False,  # written into the same memory
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("step", [1, WARM_UP, 10, 14])
def test_what_users_change_between_steps_is_honoured(step, change):
    whole, _ = twins(callbacks=lambda: [At(step, change)])
    assert_replayed(whole, ALL_REPLAYED - (min(step, WARM_UP) if CHANGES[change] else 0))


def test_another_optimizer_from_the_next_epoch_on():
    whole, _ = twins(callbacks=lambda: [At(10, other_optimizer)])
    assert isinstance(whole.optimizer, torch.optim.SGD)
