"""What cannot be recorded trains by ordinary steps, with the reason in words; and a recording leaves nothing behind."""

from __future__ import annotations

import gc
import random
import weakref

import pytest
import torch
from recording import CpuRecorder
from small_models import assert_same_weights, make_model, make_x
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from whole_steps import DEVICE, GPU, LR, ROWS, At, NoRecorder, assert_replayed, fit, make_trainer

from fastenc.training import Callback, Trainer
from fastenc.training.graph import WARM_UP
from fastenc.training.recorder import CudaRecorder

HOST = "a step draws random numbers on the CPU or changes attributes of the model's modules"


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
    trainer.recorder = CudaRecorder() if GPU else CpuRecorder()


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
    ordinary.recorder = NoRecorder()
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
    assert trainer.explain() == "step by step: use_backend('reference') asks for that"
    fit(trainer, torch.utils.data.TensorDataset(make_x(9)))
    assert trainer.explain() == "step by step: the data comes from a Dataset or DataLoader"


def test_hooks_that_go_let_the_step_be_recorded():
    trainer = make_trainer(make_model())
    handle = trainer.model.register_forward_hook(lambda *_: None)
    fit(trainer, callbacks=[At(7, lambda _: handle.remove())])
    assert_replayed(trainer, 3 * 6 - WARM_UP)


def test_a_recording_that_fails_warns_once_and_changes_nothing():
    failing = make_trainer(make_model(), recorder=CpuRecorder(fail=RuntimeError("out of luck\nand more")), device="cpu")
    ordinary = make_trainer(make_model(), recorder=NoRecorder(), device="cpu")
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
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
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
    if isinstance(trainer.recorder, CpuRecorder):
        trainer.recorder.recordings.clear()
        gc.collect()
    assert all(reference() is None for reference in seen)
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    fresh = make_trainer(make_model()).optimizer
    fresh.load_state_dict(trainer.optimizer.state_dict())
    group = fresh.param_groups[0]
    assert (type(group["lr"]), group["lr"], group["capturable"]) == (float, LR, False)


def test_between_replays_the_host_does_nothing():
    class Outside(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += 1
            return function(*args, **(kwargs or {}))

    counts = []
    for epochs in (3, 4):
        for rows in (48, 96):
            trainer = make_trainer(make_model(), device="cpu")
            with Outside() as outside:
                fit(trainer, make_x(rows), epochs=epochs)
            counts.append(outside.count)
    assert counts[3] - counts[2] == counts[1] - counts[0]  # the host's work grows by epochs, not by steps
