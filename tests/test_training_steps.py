"""Hooks around steps, several batches for an update, precisions, and partial_fit."""

import gc
import math
import weakref

import pytest
import torch
from small_models import assert_near, assert_same_weights, make_classifier, make_model, make_x, weights
from torch import nn
from torch.amp import GradScaler
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils.data import DataLoader

from fastenc.data import DataError
from fastenc.training import Callback, Trainer
from fastenc.training.sources import Rows
from fastenc.training.steps import train_rows
from fastenc.training.update import Update


class Recorder(Callback):
    def __init__(self):
        self.calls = []

    def on_train_begin(self):
        self.calls.append("begin")

    def on_epoch_begin(self, epoch):
        self.calls.append(f"epoch {epoch}")

    def on_train_batch_begin(self, batch):
        self.calls.append(f"batch {batch}")

    def on_train_batch_end(self, batch, logs):
        self.calls.append(f"batch {batch} {' '.join(logs)}")

    def on_test_begin(self):
        self.calls.append("test")

    def on_test_end(self, logs):
        self.calls.append(f"test {' '.join(logs)}")

    def on_epoch_end(self, epoch, logs):
        self.calls.append(f"epoch {epoch} {' '.join(logs)}")

    def on_train_end(self):
        self.calls.append("end")


@pytest.mark.parametrize("data", [make_x(10), DataLoader(make_x(10), 5)], ids=["engine", "stream"])
def test_keras_hooks_in_order(data):
    recorder = Recorder()
    trainer = Trainer(make_model())
    trainer.fit(data, epochs=1, batch_size=5, validation_data=make_x(3), callbacks=[recorder], verbose=False)
    steps = ["batch 0", "batch 0 loss", "batch 1", "batch 1 loss"]
    tested = ["test", "test loss"]
    assert recorder.calls == ["begin", "epoch 0", *steps, *tested, "epoch 0 loss val_loss", "end"]
    recorder.calls = []
    trainer.evaluate(make_x(3), callbacks=[recorder])
    assert recorder.calls == tested


def test_a_hook_before_a_step_sees_it_all_and_may_change_it():
    class Freeze(Callback):
        def on_train_batch_begin(self, batch):
            self.trainer.model.encoder.requires_grad_(batch != 0)
            if batch == 1:
                self.kept = weights(self.trainer.model.encoder)

    model, freeze = make_model(), Freeze()
    first = weights(model.encoder)
    trainer = Trainer(model)
    trainer.fit(make_x(20), batch_size=10, callbacks=[freeze], verbose=False)
    assert all(map(torch.equal, freeze.kept, first))  # the first step left it alone
    assert not all(map(torch.equal, weights(model.encoder), first))
    assert trainer.explain().startswith("2 of 2 steps were taken whole, by the C++ engine, one a call for callbacks")


def test_hooks_between_epochs_leave_the_engine_its_long_calls(monkeypatch):
    from fastenc.training.engine import EngineSteps

    calls, run = [], EngineSteps._run

    def watched(self, update, order, losses, done, count, first_step):
        calls.append(count)
        return run(self, update, order, losses, done, count, first_step)

    class Between(Callback):
        def on_epoch_begin(self, epoch): ...
        def on_test_begin(self): ...

    monkeypatch.setattr(EngineSteps, "_run", watched)
    Trainer(make_model()).fit(make_x(64), batch_size=8, callbacks=[Between()], verbose=False)
    assert calls == [8]


@pytest.mark.parametrize("rows", [48, 50])  # 50: the last update has one batch of two rows
@pytest.mark.parametrize("stream", [True, False])
def test_accumulated_batches_make_the_update_of_all_their_rows(rows, stream):
    x = make_x(rows).double()
    small, large = make_model(dtype=torch.float64), make_model(dtype=torch.float64)
    options = {"optimizer": "sgd", "lr": 0.1, "clip_norm": 0.05, "l1": 1e-3, "schedule": "step"}
    trainer = Trainer(small, **options, accumulate=3)
    data = DataLoader(x, 8) if stream else x
    losses = trainer.fit(data, epochs=2, batch_size=8, shuffle=False, verbose=False).history["loss"]
    expected = Trainer(large, **options)
    exact = expected.fit(x, epochs=2, batch_size=24, shuffle=False, verbose=False).history["loss"]
    assert_near(weights(small), weights(large))
    assert all(math.isclose(loss, other, rel_tol=1e-12) for loss, other in zip(losses, exact, strict=True))
    assert trainer.update.steps.taken == expected.update.steps.taken
    if not stream:
        assert trainer.explain() == "step by step: the gradients of 3 batches make one update"


@pytest.mark.parametrize("accumulate", [0, 1.5, "2"])
def test_bad_accumulate(accumulate):
    with pytest.raises(ValueError, match=r"accumulate is .*; it must be a whole number of at least 1"):
        Trainer(make_model(), accumulate=accumulate)


def test_bf16_is_autocast():
    own, users = make_model(), make_model()
    trainer = Trainer(own, seed=0, precision="bf16")
    history = trainer.fit(make_x(), epochs=3, validation_data=make_x(9), verbose=False).history
    expected = Trainer(users, seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        same = expected.fit(make_x(), epochs=3, validation_data=make_x(9), verbose=False).history
        measured = expected.evaluate(make_x())
    assert_same_weights(own, users)
    assert history == same
    assert trainer.explain() == expected.explain()
    assert trainer.evaluate(make_x()) == measured
    assert all(parameter.dtype == torch.float32 for parameter in own.parameters())
    assert trainer.predict(make_x()).dtype == torch.float32
    plain = Trainer(make_model(), seed=0)
    plain.fit(make_x(), epochs=3, verbose=False)
    assert not torch.equal(weights(plain.model)[0], weights(own)[0])


def test_precisions_that_do_not_go():
    with pytest.raises(ValueError, match="precision is 'int8'; give one of fp32, bf16, fp16"):
        Trainer(make_model(), precision="int8")
    with pytest.raises(ValueError, match="precision='fp16' needs a GPU, and the model is on cpu; use precision='bf16'"):
        Trainer(make_model(), precision="fp16")


def test_a_scaler_scales_the_loss_and_leaves_out_steps_that_overflow():
    """What fp16 does on a GPU; PyTorch's scaler works on a CPU too, and powers of 2 change no bit."""
    scaled, plain = make_model(), make_model()
    scaler = GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
    trainer, expected = (Trainer(model, "sgd", 0.1, clip_norm=0.05, seed=0) for model in (scaled, plain))
    trainer.update = Update(trainer.optimizer, clip_norm=0.05, scaler=scaler)
    trainer.fit(make_x(), epochs=2, batch_size=10, verbose=False)
    with torch.random.fork_rng():
        expected.optimizer.register_step_post_hook(lambda *args: None)  # one operation after another
        expected.fit(make_x(), epochs=2, batch_size=10, verbose=False)
    assert trainer.explain() == "step by step: the loss is scaled for gradients in float16"
    assert_same_weights(scaled, plain)
    before = weights(scaled)
    scaler.update(2.0**127)
    trainer.fit(make_x() * 1e3, batch_size=50, verbose=False)
    assert all(map(torch.equal, weights(scaled), before))
    assert scaler.get_scale() == 2.0**126


def test_partial_fit_is_fit_batch_by_batch():
    x = make_x(50)
    streamed, whole = make_model(dropout=0.2), make_model(dropout=0.2)
    trainer = Trainer(streamed, lr=lambda step: 0.01 / (1 + step), seed=0)
    losses = [trainer.partial_fit(batch) for batch in x.split(10)]
    expected = Trainer(whole, lr=lambda step: 0.01 / (1 + step), seed=0)
    with torch.random.fork_rng():
        for batch, loss in zip(x.split(10), losses, strict=True):
            history = expected.fit(batch, batch_size=10, shuffle=False, verbose=False)
            assert history.history["loss"] == [loss]
    assert_same_weights(streamed, whole)
    assert trainer.update.steps.taken == 5
    assert "C++ engine" in trainer.explain()
    assert trainer.history.epoch == []


def test_partial_fit_of_several_steps_labels_and_streams():
    x, y = make_x(50), torch.arange(50) % 3
    trainer = Trainer(make_classifier(), loss="cross_entropy")
    first = trainer.partial_fit(x.numpy(), y.numpy(), batch_size=8)
    assert trainer.update.steps.taken == 7
    for _ in range(100):
        last = trainer.partial_fit(x, y, batch_size=8)
    assert last < first
    assert trainer.partial_fit(DataLoader([*zip(x, y, strict=True)], 25)) > 0
    assert trainer.update.steps.taken == 101 * 7 + 2


def test_partial_fit_refuses_what_fit_does():
    trainer = Trainer(make_model())
    before = weights(trainer.model)
    with pytest.raises(DataError, match="NaN"):
        trainer.partial_fit(torch.full((3, 6), math.nan))
    with pytest.raises(ValueError, match="batch_size is 0"):
        trainer.partial_fit(make_x(), batch_size=0)
    with pytest.raises(ValueError, match="partial_fit has no end, and schedule needs one; make lr a function"):
        Trainer(make_model(), schedule="cosine").partial_fit(make_x())
    with pytest.raises(FloatingPointError, match="the loss became inf in epoch 1, step 1"):
        Trainer(trainer.model, loss=lambda p, y: F.mse_loss(p, y) / 0.0).partial_fit(make_x())
    assert all(map(torch.equal, weights(trainer.model), before))


def test_batch_norm_learns_from_partial_fit():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 6)).eval()
    Trainer(model).partial_fit(make_x())
    assert int(model[1].num_batches_tracked) == 1
    assert not model.training  # as it was


def test_a_trainer_does_not_keep_the_data_of_its_fit():
    data = make_x().clone()
    kept = weakref.ref(data)
    trainer = Trainer(make_model())
    trainer.fit(data, validation_data=data, verbose=False)
    del data
    gc.collect()
    assert kept() is None


def test_no_tensor_of_a_step_outlives_it_on_the_cpu():
    """A small one kept of each would lie between the large ones of the next, and memory would grow with every step."""
    kept = []

    def after_step(step, value):
        assert all(storage.expired() for storage in kept)
        kept.append(StorageWeakRef(value.untyped_storage()))
        return False

    model, x = nn.Linear(4, 4), torch.rand(12, 4)
    update = Update(torch.optim.SGD(model.parameters(), lr=0.1))
    losses, counts = train_rows(model, F.mse_loss, update, Rows(x, x), None, 4, after_step)
    assert len(kept) == 3
    assert (losses.dtype, losses.shape, counts.tolist()) == (torch.float32, (3,), [4, 4, 4])
