"""Trainers that record their steps, and their twins that do not."""

from __future__ import annotations

import torch
from recording import CpuRecorder
from small_models import assert_same_weights, make_model, make_x

import fastenc
from fastenc.training import Callback, History, Trainer
from fastenc.training.graph import WARM_UP
from fastenc.training.recorder import CudaRecorder

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
LR = 2**-6  # a float32: on the CPU the rate in `param_groups` is a double, on the device a float32
ROWS, BATCH = 50, 8  # 6 full batches and one of 2 rows
ALL_REPLAYED = 4 * 6 - WARM_UP  # in the 4 epochs of `fit`


class NoRecorder(CudaRecorder):
    def why_not(self, device: torch.device) -> str | None:
        return "not in this test"


def make_trainer(model, optimizer="adam", recorder=None, device=DEVICE, **options) -> Trainer:
    trainer = Trainer(model.to(device), optimizer, **{"lr": LR, "seed": 3} | options)
    trainer.recorder = recorder or (CudaRecorder() if device == "cuda" else CpuRecorder())
    return trainer


def fit(trainer: Trainer, x=None, y=None, **options) -> History:
    """4 epochs. On the CPU by ATen: kernels of ours are not taken while a recorder looks on, and sums differ."""
    x = make_x(ROWS) if x is None else x
    gpu = next(trainer.model.parameters()).is_cuda
    with fastenc.use_backend("auto" if gpu else "reference"):
        return trainer.fit(x, y, **{"epochs": 4, "batch_size": BATCH, "verbose": False} | options)


def twins(make=make_model, optimizer="adam", *, callbacks=lambda: (), x=None, y=None, epochs=4, **options):
    """A trainer that records and one that does not, after the same fit; the models must be the same to the bit."""
    whole = make_trainer(make(), optimizer, **options)
    ordinary = make_trainer(make(), optimizer, NoRecorder(), **options)
    histories = [fit(t, x, y, epochs=epochs, callbacks=callbacks()).history for t in (whole, ordinary)]
    assert histories[0] == histories[1]
    assert_same_weights(whole.model, ordinary.model)
    assert ordinary.explain().startswith("step by step: ")
    return whole, ordinary


def assert_replayed(trainer: Trainer, replayed: int, taken: int = 4 * 7) -> None:
    assert trainer.explain() == f"{replayed} of {taken} steps were replayed from a CUDA graph"


class At(Callback):
    """Does something to the trainer once, after a step."""

    def __init__(self, step, change):
        self.left, self.change = step, change

    def on_train_batch_end(self, batch, logs):
        self.left -= 1
        if self.left == 0:
            self.change(self.trainer)
