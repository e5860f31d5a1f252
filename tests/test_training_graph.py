"""A recorded step must train as the ordinary one does, whatever the user changes meanwhile.

Without a GPU the recorder is `recording.CpuRecorder`, which runs recorded operations again without any Python code;
with one, the same tests run on CUDA graphs.
"""

from __future__ import annotations

import copy
import gc
import random
import weakref

import pytest
import torch
from recording import CpuRecorder
from small_models import assert_same_weights, make_classifier, make_model, make_x
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastenc
from fastenc.training import Callback, Trainer
from fastenc.training.graph import WARM_UP
from fastenc.training.recorder import CudaRecorder

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
LR = 2**-6  # a float32: on the CPU the rate in `param_groups` is a double, on the device a float32
ROWS, BATCH = 50, 8  # 6 full batches and one of 2 rows


class place:  # noqa: N801 - a name for two values
    """Where the tests train: on a GPU if there is one, but for those that need the stand-in."""

    device = DEVICE
    recorder: type = CudaRecorder if GPU else CpuRecorder


@pytest.fixture(autouse=True)
def _same_kernels():
    """On the CPU the fused layers take another way while a recorder looks on, and their sums round differently."""
    with fastenc.use_backend("auto" if GPU else "reference"):
        yield


@pytest.fixture
def _cpu(monkeypatch):
    monkeypatch.setattr(place, "device", "cpu")
    monkeypatch.setattr(place, "recorder", CpuRecorder)
    with fastenc.use_backend("reference"):
        yield


on_the_cpu = pytest.mark.usefixtures("_cpu")


class NoRecorder(CudaRecorder):
    def why_not(self, device: torch.device) -> str | None:
        return "not in this test"


def make_trainer(model, optimizer="adam", recorder=None, **options) -> Trainer:
    trainer = Trainer(model.to(place.device), optimizer, **{"lr": LR, "seed": 3} | options)
    trainer._recorder = recorder or place.recorder()
    return trainer


def fit(trainer: Trainer, x=None, y=None, **options):
    x = make_x(ROWS) if x is None else x
    return trainer.fit(x, y, **{"epochs": 4, "batch_size": BATCH, "verbose": False} | options)


def twins(make=make_model, optimizer="adam", *, callbacks=lambda: (), x=None, y=None, epochs=4, **options):
    """A trainer that records and one that does not, after the same fit; the models must be the same to the bit."""
    whole = make_trainer(make(), optimizer, **options)
    ordinary = make_trainer(make(), optimizer, NoRecorder(), **options)
    histories = [fit(t, x, y, epochs=epochs, callbacks=callbacks()).history for t in (whole, ordinary)]
    assert histories[0] == histories[1]
    assert_same_weights(whole.model, ordinary.model)
    assert ordinary.explain() == "step by step: not in this test"
    return whole, ordinary


def assert_replayed(trainer: Trainer, replayed: int, taken: int = 4 * 7) -> None:
    assert trainer.explain() == f"{replayed} of {taken} steps were replayed from a CUDA graph"


HOST = "a step draws random numbers on the CPU or changes attributes of the model's modules"
OPTIMIZERS = {
    "adam": {"weight_decay": 2**-7},
    "adamw": {"weight_decay": 2**-7},
    "sgd": {"momentum": 0.5, "weight_decay": 2**-7},
}
ALL_REPLAYED = 4 * 6 - WARM_UP


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_bits_of_ordinary_steps(optimizer):
    whole, ordinary = twins(optimizer=optimizer, **OPTIMIZERS[optimizer])
    assert_replayed(whole, ALL_REPLAYED)
    for ours, theirs in zip(whole.model.parameters(), ordinary.model.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    for ours, theirs in zip(whole.optimizer.state.values(), ordinary.optimizer.state.values(), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(value is theirs[name] or torch.equal(value, theirs[name]) for name, value in ours.items())


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
        assert whole.explain() == f"step by step: {HOST}"


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
        assert len(whole._recorder.recordings) == 1


def test_listeners_see_each_step():
    listeners = [EveryStep(), EveryStep()]
    left = list(listeners)
    whole, _ = twins(callbacks=lambda: [left.pop(0)])
    assert listeners[0].seen == listeners[1].seen
    assert_replayed(whole, ALL_REPLAYED)
    assert isinstance(whole.optimizer.param_groups[0]["lr"], float)


class At(Callback):
    """Does something to the trainer once, after a step."""

    def __init__(self, step, change):
        self.left, self.change = step, change

    def on_train_batch_end(self, batch, logs):
        self.left -= 1
        if self.left == 0:
            self.change(self.trainer)


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


# What cannot be recorded.


class Stepping(nn.Sequential):
    """Counts its calls and changes with them: a replay would not."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * (1 + 2.0**-self.calls)


class Gambling(nn.Sequential):
    def forward(self, x):
        return super().forward(x) * random.random()


class Waiting(nn.Sequential):
    def forward(self, x):
        return super().forward(x) * (1 + x.sum().item())


@pytest.mark.parametrize(
    ("kind", "reason"), [(Stepping, HOST), (Gambling, HOST), (Waiting, "a step waits for the device: it waits")]
)
def test_python_that_a_replay_would_not_run(kind, reason):
    def make():
        torch.manual_seed(0)
        random.seed(0)
        return kind(nn.Linear(6, 6))

    trainers = [make_trainer(make()), make_trainer(make(), recorder=NoRecorder())]
    for trainer in trainers:
        random.seed(0)
        fit(trainer)
    assert_same_weights(trainers[0].model, trainers[1].model)
    assert trainers[0].explain().startswith(f"step by step: {reason}")


def forward_hook(trainer):
    trainer.model.encoder.register_forward_hook(lambda *_: None)


def gradient_hook(trainer):
    next(trainer.model.parameters()).register_hook(lambda gradient: gradient * 2)


def step_hook(trainer):
    trainer.optimizer.register_step_post_hook(lambda *_: None)


def own_step(trainer):
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda: step()


def not_fused(trainer):
    trainer.optimizer = torch.optim.Adam(trainer.model.parameters(), LR, foreach=True)


def other_kind(trainer):
    trainer.optimizer = torch.optim.RMSprop(trainer.model.parameters(), LR)


def in_float64(trainer):
    trainer.__init__(make_model(dtype=torch.float64).to(DEVICE), lr=LR, seed=3)
    trainer._recorder = CudaRecorder() if GPU else CpuRecorder()


REASONS = {
    forward_hook: "encoder has hooks",
    gradient_hook: "a parameter has hooks",
    step_hook: "the optimiser has hooks",
    own_step: "the optimiser's step was replaced",
    not_fused: "the optimiser is not PyTorch's Adam, AdamW or SGD with fused=True",
    other_kind: "the optimiser is not PyTorch's Adam, AdamW or SGD with fused=True",
    in_float64: "the model is in float64, and a recorded step keeps its learning rate in float32",
}


@pytest.mark.parametrize("prepare", REASONS, ids=lambda prepare: prepare.__name__)
def test_why_not(prepare):
    whole, ordinary = make_trainer(make_model()), make_trainer(make_model())
    for trainer in (whole, ordinary):
        prepare(trainer)
    ordinary._recorder = NoRecorder()
    for trainer in (whole, ordinary):
        fit(trainer)
    assert_same_weights(whole.model, ordinary.model)
    assert whole.explain() == f"step by step: {REASONS[prepare]}"


def test_why_not_in_words_of_the_rest():
    trainer = make_trainer(make_model())
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        fit(trainer)
    assert trainer.explain() == "step by step: anomaly detection is on"
    with torch.autocast(DEVICE, torch.bfloat16):
        fit(trainer)
    assert trainer.explain().startswith("step by step: autocast is on")
    fit(trainer, batch_size=ROWS, epochs=WARM_UP)
    assert trainer.explain() == "step by step: it takes more than 3 full batches to record one"


def test_why_not_without_a_gpu_and_from_a_stream():
    trainer = Trainer(make_model())
    assert trainer.explain() == "no fit was started"
    fit(trainer)
    assert trainer.explain() == "step by step: the model is on cpu, and CUDA graphs are for GPUs"
    fit(trainer, torch.utils.data.TensorDataset(make_x(9)))
    assert trainer.explain() == "step by step: the data comes from a Dataset or DataLoader"


def test_hooks_that_go_let_the_step_be_recorded():
    trainer = make_trainer(make_model())
    handle = trainer.model.register_forward_hook(lambda *_: None)
    fit(trainer, callbacks=[At(7, lambda _: handle.remove())])
    assert_replayed(trainer, 3 * 6 - WARM_UP)


@on_the_cpu
def test_a_recording_that_fails_warns_once_and_changes_nothing():
    failing = make_trainer(make_model(), recorder=CpuRecorder(fail=RuntimeError("out of luck\nand more")))
    ordinary = make_trainer(make_model(), recorder=NoRecorder())
    with pytest.warns(UserWarning, match="step by step, without a CUDA graph: .* out of luck$") as warned:
        fit(failing)
    assert len(warned) == 1
    fit(ordinary)
    assert_same_weights(failing.model, ordinary.model)
    assert failing.history.history == ordinary.history.history
    assert failing.explain() == "step by step: recording it failed: out of luck"
    assert "capturable" not in str({k: v for k, v in failing.optimizer.param_groups[0].items() if v is True})


# What is left behind.


class Interrupt(Callback):
    def on_train_batch_end(self, batch, logs):
        if batch == 5:
            raise KeyboardInterrupt


def test_ctrl_c_in_a_replayed_step():
    whole, ordinary = make_trainer(make_model()), make_trainer(make_model(), recorder=NoRecorder())
    for trainer in (whole, ordinary):
        with pytest.raises(KeyboardInterrupt):
            fit(trainer, callbacks=[Interrupt()])
    assert_same_weights(whole.model, ordinary.model)
    assert_replayed(whole, 6 - WARM_UP, 6)


def test_a_loss_that_becomes_nan_is_found_at_its_step():
    x = make_x(48)
    x[0] = 1e30
    trainer = make_trainer(make_model(), "sgd", lr=1e10)
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    with pytest.raises(FloatingPointError, match=r"in epoch 1, step \d"):
        fit(trainer, x)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_the_recording_goes_at_the_end_and_the_users_tensors_stay():
    trainer = make_trainer(make_model())
    model, parameters = trainer.model, [id(parameter) for parameter in trainer.model.parameters()]
    seen = []

    def remember(trainer):
        seen.extend(weakref.ref(parameter.grad) for parameter in trainer.model.parameters())

    fit(trainer, make_x(48), callbacks=[At(24, remember)])  # the last step of all was a replayed one
    gc.collect()
    assert_replayed(trainer, 24 - WARM_UP, 24)
    if not GPU:
        trainer._recorder.recordings.clear()
        gc.collect()
    assert all(reference() is None for reference in seen)
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    fresh = make_trainer(make_model()).optimizer
    fresh.load_state_dict(trainer.optimizer.state_dict())
    group = fresh.param_groups[0]
    assert (type(group["lr"]), group["lr"], group["capturable"]) == (float, LR, False)


@on_the_cpu
def test_between_replays_the_host_does_nothing():
    class Outside(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += 1
            return function(*args, **(kwargs or {}))

    counts = []
    for epochs in (3, 4):
        for rows in (48, 96):
            trainer = make_trainer(make_model())
            with Outside() as outside:
                fit(trainer, make_x(rows), epochs=epochs)
            counts.append(outside.count)
    assert counts[3] - counts[2] == counts[1] - counts[0]  # the host's work grows by epochs, not by steps
