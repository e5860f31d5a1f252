"""Fits that go on from a checkpoint: bit for bit those that were not interrupted."""

import random

import numpy as np
import pytest
import torch
from interrupted_fits import CASES, Interrupt, StopError, assert_same, dropping_model, run
from small_models import assert_same_weights, make_model, make_x
from torch.utils.data import TensorDataset

from fastenc import load_preprocessing, load_pretrained, use_backend
from fastenc.training import Callback, CheckpointError, EarlyStopping, ModelCheckpoint, Trainer
from fastenc.training.checkpoint import Checkpoint, checkpoints

BACKENDS = [(case, "auto") for case in CASES]
BACKENDS += [(case, "reference") for case in ("engine with dropout", "cosine", "a rate for each step")]


@pytest.mark.parametrize(("case", "backend"), BACKENDS)
def test_resumed_is_bit_for_bit_uninterrupted(tmp_path, case, backend):
    with use_backend(backend):
        whole, stopping = run(case)
        run(case, tmp_path, Interrupt(2))
        resumed, same = run(case, tmp_path, resume=tmp_path)
    assert_same(resumed, whole)
    assert (same.best, same.best_epoch, same.stopped_epoch) == (
        stopping.best,
        stopping.best_epoch,
        stopping.stopped_epoch,
    )


@pytest.mark.parametrize(("case", "backend"), BACKENDS)
def test_resumed_inside_an_epoch_too(tmp_path, case, backend):
    with use_backend(backend):
        whole, _ = run(case)
        every = 3 if case == "accumulated" else 2
        run(case, tmp_path, Interrupt(1, 5), every_steps=every)
        assert checkpoints(tmp_path)[-1].name == f"epoch-0001-step-00000{5 - 5 % every}"
        resumed, _ = run(case, tmp_path, resume=tmp_path, every_steps=every)
    assert_same(resumed, whole)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_resumed_after_the_last_step_of_an_epoch(tmp_path, backend):
    class BeforeValidation(Interrupt):
        def on_test_begin(self):
            if self.now == 1:
                raise StopError

    with use_backend(backend):
        whole, _ = run("engine with dropout")
        run("engine with dropout", tmp_path, BeforeValidation(None), every_steps=7)
        assert checkpoints(tmp_path)[-1].name == "epoch-0001-step-000007"
        resumed, _ = run("engine with dropout", tmp_path, resume=tmp_path, every_steps=7)
    assert_same(resumed, whole)


def test_the_engine_takes_the_steps_where_it_can():
    assert "by the C++ engine" in run("engine with dropout")[0].explain()
    assert "by the C++ engine" in run("cosine")[0].explain()
    assert run("accumulated")[0].explain() == "step by step: the gradients of 3 batches make one update"


def test_numpys_and_pythons_random_numbers_go_on_too(tmp_path):
    class Draw(Callback):
        def __init__(self):
            self.drawn = []

        def on_epoch_begin(self, epoch):
            self.drawn.append((random.random(), np.random.rand()))

    def fit(epochs, draw, **options):
        random.seed(1)
        np.random.seed(1)
        Trainer(make_model(), seed=0).fit(
            make_x(), epochs=epochs, callbacks=[draw, *options.pop("more", ())], **options
        )

    whole, first, rest = Draw(), Draw(), Draw()
    fit(4, whole, verbose=False)
    fit(2, first, verbose=False, more=[ModelCheckpoint(tmp_path, None)])
    fit(4, rest, verbose=False, resume=tmp_path)
    assert first.drawn + rest.drawn == whole.drawn


def test_a_fit_that_a_callback_stopped_stays_stopped(tmp_path):
    class Worse(Callback):
        def on_epoch_end(self, epoch, logs):
            logs["val_loss"] = float(epoch)

    def fit(epochs, **options):
        callbacks = [Worse(), EarlyStopping(patience=2), ModelCheckpoint(tmp_path)]
        return Trainer(make_model(), seed=0).fit(make_x(), epochs=epochs, callbacks=callbacks, verbose=False, **options)

    assert fit(9).epoch == [0, 1, 2]
    assert fit(9, resume=tmp_path).epoch == [0, 1, 2]


def test_a_finished_fit_goes_on_to_more_epochs(tmp_path):
    whole, _ = run("engine with dropout", epochs=5)
    run("engine with dropout", tmp_path, epochs=3, stopping=EarlyStopping(patience=2, restore_best_weights=False))
    resumed, _ = run("engine with dropout", tmp_path, epochs=5, resume=tmp_path)
    assert_same(resumed, whole)


def test_by_hand_between_calls_of_partial_fit(tmp_path):
    batches = make_x(40).split(8)
    whole, first = (Trainer(dropping_model(), lr=0.01, seed=1) for _ in range(2))
    losses = [whole.partial_fit(batch) for batch in batches]
    assert [first.partial_fit(batch) for batch in batches[:2]] == losses[:2]
    first.save_checkpoint(tmp_path, preprocessing={"scale": 2})
    second = Trainer(dropping_model(), seed=8, lr=0.5)
    second.load_checkpoint(tmp_path)
    assert [second.partial_fit(batch) for batch in batches[2:]] == losses[2:]
    assert_same_weights(second.model, whole.model)
    assert load_preprocessing(tmp_path) == {"scale": 2} == Checkpoint.read(tmp_path).preprocessing
    assert_same_weights(load_pretrained(tmp_path), first.model)


def test_a_data_set_is_saved_after_epochs_and_not_inside_one(tmp_path):
    data = TensorDataset(make_x(20))

    def fit(epochs, folder=None, **options):
        trainer = Trainer(dropping_model(), seed=0)
        callbacks = [] if folder is None else [ModelCheckpoint(folder, None)]
        trainer.fit(data, epochs=epochs, batch_size=8, callbacks=callbacks, verbose=False, **options)
        return trainer

    whole = fit(4)
    fit(2, tmp_path / "a")
    assert_same_weights(fit(4, resume=tmp_path / "a").model, whole.model)
    with pytest.raises(CheckpointError, match="every_steps needs arrays"):
        Trainer(make_model()).fit(data, callbacks=[ModelCheckpoint(tmp_path / "b", None, every_steps=1)], verbose=False)

    class Save(Callback):
        def on_train_batch_end(self, batch, logs):
            self.trainer.save_checkpoint(tmp_path / "c")

    with pytest.raises(CheckpointError, match="a checkpoint inside an epoch needs arrays"):
        Trainer(make_model()).fit(data, callbacks=[Save()], verbose=False)


S = torch.optim.lr_scheduler
TORCH_SCHEDULES = {
    "StepLR": lambda o: S.StepLR(o, 2),
    "LambdaLR": lambda o: S.LambdaLR(o, lambda epoch: 0.9**epoch),
    "OneCycleLR": lambda o: S.OneCycleLR(o, 0.1, 100),
    "CyclicLR": lambda o: S.CyclicLR(o, 0.01, 0.1, mode="triangular2"),
    "CosineAnnealingWarmRestarts": lambda o: S.CosineAnnealingWarmRestarts(o, 2),
    "ReduceLROnPlateau": lambda o: S.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: S.SequentialLR(o, [S.ConstantLR(o, 0.1, 2), S.ExponentialLR(o, 0.9)], [2]),
}


@pytest.mark.parametrize("name", TORCH_SCHEDULES)
def test_torch_schedulers_go_on(tmp_path, name):
    def fit(epochs, folder=None, **options):
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        trainer = Trainer(model, optimizer, schedule=TORCH_SCHEDULES[name](optimizer), seed=0)
        callbacks = [] if folder is None else [ModelCheckpoint(folder, None)]
        trainer.fit(make_x(), epochs=epochs, callbacks=callbacks, verbose=False, **options)
        return trainer

    whole = fit(6)
    fit(3, tmp_path)
    assert_same(fit(6, resume=tmp_path), whole)
