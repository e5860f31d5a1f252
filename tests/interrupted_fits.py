"""Fits that end as by an error, and what may differ once they went on: nothing. For the tests of checkpoints."""

import random

import pytest
import torch
from small_models import assert_same_weights, make_model, make_x
from torch import nn

from fastenc.training import Callback, EarlyStopping, ModelCheckpoint, Trainer


class StopError(Exception):
    pass


class Interrupt(Callback):
    """Ends a fit as an error would, after its checkpoint was saved: at the begin of an epoch, or of a step."""

    def __init__(self, epoch, step=None):
        self.epoch, self.step = epoch, step

    @property
    def inside_steps(self):
        return self.step is not None

    def on_epoch_begin(self, epoch):
        self.now = epoch
        if self.step is None and epoch == self.epoch:
            raise StopError

    def on_train_batch_begin(self, batch):
        if (self.now, batch) == (self.epoch, self.step):
            raise StopError


def dropping_model():
    return make_model(dropout=0.3)


def torch_model():
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 6))


CASES = {
    "engine": (make_model, {}, {}),
    "engine with dropout": (dropping_model, {"optimizer": "adamw", "weight_decay": 0.1}, {}),
    "engine with momentum": (make_model, {"optimizer": "sgd", "momentum": 0.9, "nesterov": True}, {}),
    "in order": (dropping_model, {}, {"shuffle": False}),
    "batch norm and dropout": (torch_model, {}, {}),
    "cosine": (dropping_model, {"schedule": "cosine"}, {}),
    "one cycle": (make_model, {"schedule": "one_cycle"}, {}),
    "step": (make_model, {"schedule": "step"}, {}),
    "warm up": (make_model, {"schedule": "warm_up"}, {}),
    "plateau": (make_model, {"schedule": "plateau"}, {}),
    "torch schedule": (make_model, {"schedule": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.7)}, {}),
    "a rate for each step": (make_model, {"lr": lambda step: 0.01 / (1 + step)}, {}),
    "accumulated": (dropping_model, {"accumulate": 3}, {}),
    "bf16": (dropping_model, {"precision": "bf16"}, {}),
    "clipped": (make_model, {"clip_norm": 0.1, "l1": 1e-3}, {}),
    "global random numbers": (dropping_model, {"seed": None}, {}),
}


def run(case, folder=None, interrupt=None, resume=None, epochs=5, stopping=None, **checkpoint):
    make, options, arguments = CASES[case]
    torch.manual_seed(5)
    random.seed(5)
    model = make()
    trainer = Trainer(model, **({"seed": 3, "lr": 0.01} | options))
    stopping = stopping or EarlyStopping(patience=2)
    callbacks = [stopping]
    if folder is not None:
        callbacks.insert(0, ModelCheckpoint(folder, **checkpoint))
    if interrupt is not None:
        callbacks.append(interrupt)
    arguments = {"batch_size": 8, "validation_data": make_x(20), "verbose": False, **arguments}
    if resume is not None:
        torch.manual_seed(99)  # another process's
    if interrupt is not None:
        with pytest.raises(StopError):
            trainer.fit(make_x(50), epochs=epochs, callbacks=callbacks, resume=resume, **arguments)
    else:
        trainer.fit(make_x(50), epochs=epochs, callbacks=callbacks, resume=resume, **arguments)
    return trainer, stopping


def assert_same(trainer, other):
    assert_same_weights(trainer.model, other.model)
    assert trainer.history.history == other.history.history
    assert trainer.history.epoch == other.history.epoch
    state, expected = trainer.optimizer.state_dict(), other.optimizer.state_dict()
    assert state["param_groups"] == expected["param_groups"]
    assert state["state"].keys() == expected["state"].keys()
    for index, values in state["state"].items():
        for name, value in values.items():
            assert torch.equal(value, expected["state"][index][name]), name
    assert trainer.update.steps.taken == other.update.steps.taken
