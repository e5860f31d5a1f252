import errno
import json
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from small_models import assert_same_weights, make_classifier, make_model, make_x
from torch import nn
from torch.utils.data import TensorDataset

from fastenc import AutoEncoder, Encoder, load_preprocessing, load_pretrained, use_backend
from fastenc.files import canonical, text_digest
from fastenc.training import Callback, CheckpointError, EarlyStopping, History, ModelCheckpoint, Trainer
from fastenc.training.checkpoint import CHECKPOINT_FILE, Checkpoint, checkpoints


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


def saved(folder, model=None, **options):
    trainer = Trainer(model or make_model(), **options)
    trainer.fit(make_x(), verbose=False)
    trainer.save_checkpoint(folder)
    return trainer


def refused(trainer, folder, match, **options):
    """`fit` must refuse, and leave all as it was."""
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    history, steps = trainer.history, trainer.update.steps.taken
    with pytest.raises(CheckpointError, match=match):
        trainer.fit(make_x(), resume=folder, verbose=False, **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
    assert trainer.history is history
    assert trainer.update.steps.taken == steps
    assert not trainer.optimizer.state


def test_another_architecture_names_every_difference_and_loads_nothing(tmp_path):
    saved(tmp_path)
    other = AutoEncoder(Encoder(6, (5, 4, 3), activation="tanh"))
    with pytest.raises(CheckpointError) as error:
        Trainer(other).fit(make_x(), resume=tmp_path, verbose=False)
    mine, theirs = other.state_dict(), make_model().state_dict()
    for name in mine.keys() | theirs.keys():
        if name not in theirs:
            assert f"{name} is missing in it" in str(error.value)
        elif name not in mine:
            assert f"{name} is not part of the model" in str(error.value)
        elif mine[name].shape != theirs[name].shape:
            there, here = list(theirs[name].shape), list(mine[name].shape)
            assert f"{name} is {there} in it and {here} in the model" in str(error.value)
        else:
            assert f"{name} is" not in str(error.value)
    refused(Trainer(other), tmp_path, "nothing was loaded: .*; make the Trainer as the one that saved it")
    refused(Trainer(make_classifier(), loss=lambda p, y: p.sum()), tmp_path, "decoder.* is not part of the model")
    refused(Trainer(make_model(dtype=torch.float64)), tmp_path, r"torch.float32 in it and torch.float64 in the model")


def test_another_optimiser_or_other_callbacks(tmp_path):
    saved(tmp_path)
    refused(Trainer(make_model(), "sgd"), tmp_path, "its optimiser is Adam and the Trainer's is SGD")
    model = make_model()
    groups = [{"params": [parameter]} for parameter in model.parameters()]
    refused(
        Trainer(model, torch.optim.Adam(groups)), tmp_path, r"groups of \[8\] parameters and the Trainer's of \[1, 1"
    )
    saved(tmp_path / "stopping")
    trainer = Trainer(make_model())
    trainer.fit(make_x(), callbacks=[EarlyStopping("loss")], verbose=False)
    trainer.save_checkpoint(tmp_path / "stopping")
    refused(Trainer(make_model()), tmp_path / "stopping", "it has the state of EarlyStopping, and fit is given none")


def test_other_rows_inside_an_epoch(tmp_path):
    run("engine", tmp_path, Interrupt(1, 5), every_steps=2)
    match = "inside an epoch of 50 rows in batches of 8, and fit is given 50 in batches of 32; make"
    refused(Trainer(make_model()), tmp_path, match, callbacks=[EarlyStopping("loss")])


def rewrite(file: Path, **changes):
    """Change the record of a checkpoint and put the checksum right."""
    with safe_open(file, "pt") as opened:
        record = json.loads(opened.metadata()["fastenc"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    record.pop("sha256")
    record |= changes
    record["sha256"] = text_digest(canonical(record))
    save_file(tensors, file, {"fastenc": canonical(record)})


def test_files_that_are_no_checkpoints_of_this_format(tmp_path):
    trainer = saved(tmp_path)
    file = tmp_path / CHECKPOINT_FILE
    whole = file.read_bytes()
    for version, cure in ((2, "upgrade fastenc"), (0, "load it with the fastenc that saved it")):
        rewrite(file, format_version=version)
        with pytest.raises(CheckpointError, match=f"has format version {version} and this fastenc reads 1; {cure}"):
            trainer.load_checkpoint(tmp_path)
    for content in (b"", whole[:-7], whole[:100], pickle.dumps({"a": 1}), whole[:-1] + bytes([whole[-1] ^ 1])):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="is truncated or damaged"):
            trainer.load_checkpoint(tmp_path)
    save_file({"a": torch.ones(1)}, file)
    with pytest.raises(CheckpointError, match="was not written by fastenc"):
        trainer.load_checkpoint(tmp_path)
    for nothing in (tmp_path / "none", tmp_path.parent):
        with pytest.raises(CheckpointError, match="there is no checkpoint in"):
            trainer.load_checkpoint(nothing)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    saved(tmp_path, seed=0)
    before = (tmp_path / CHECKPOINT_FILE).read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(os, step, full)
            with pytest.raises(OSError, match="No space left on device; the file there is as it was"):
                saved(tmp_path, seed=1)
        assert (tmp_path / CHECKPOINT_FILE).read_bytes() == before
    assert not list(tmp_path.glob(".*.tmp"))


def test_folders_that_cannot_be_written_to(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is, or lies under, a file; give a folder"):
        saved(tmp_path / "file" / "under")

    def read_only(self, *args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    trainer = Trainer(make_model())
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    for name, match in (("mkdir", "cannot be made: Read-only"), ("open", "cannot be written to: Read-only")):
        with monkeypatch.context() as patched:
            patched.setattr(Path, name, read_only)
            with pytest.raises(CheckpointError, match=f"{match} file system; give "):
                trainer.fit(make_x(), callbacks=[ModelCheckpoint(tmp_path / name, None)], verbose=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())


def test_what_a_checkpoint_can_hold(tmp_path):
    class Remembers(Callback):
        def __init__(self, state=None):
            self.state = state

        def state_dict(self):
            return self.state

        def load_state_dict(self, state):
            self.state = state

    tensor = torch.arange(6.0).view(2, 3).T
    state = {
        "a": [1, 2.5, None, True, "x", ()],
        3: (float("inf"), -0.0),
        "$tensor": {"t": tensor},
        "half": torch.ones(2).bfloat16(),
    }
    Trainer(make_model()).fit(make_x(), callbacks=[Remembers(state), ModelCheckpoint(tmp_path, None)], verbose=False)
    loaded = Remembers({})
    Trainer(make_model()).fit(make_x(), callbacks=[loaded], resume=tmp_path, verbose=False)
    assert torch.equal(loaded.state["$tensor"].pop("t"), state["$tensor"].pop("t"))
    assert torch.equal(loaded.state.pop("half"), state.pop("half"))
    assert repr(loaded.state) == repr(state)
    callbacks = [Remembers({"what": object()}), ModelCheckpoint(tmp_path / "b", None)]
    with pytest.raises(CheckpointError, match=r"callbacks\.0\.1\.what is a object, which a checkpoint cannot hold"):
        Trainer(make_model()).fit(make_x(), callbacks=callbacks, verbose=False)


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


def test_tied_weights_stay_tied(tmp_path):
    def tied():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        model[1].weight = model[0].weight
        return model

    trainer = saved(tmp_path, tied())
    other = Trainer(tied())
    other.load_checkpoint(tmp_path)
    assert other.model[1].weight is other.model[0].weight
    assert_same_weights(other.model, trainer.model)


def test_history_holds_nan(tmp_path):
    trainer = Trainer(make_model())
    trainer.history = History()
    trainer.history.add(0, {"loss": float("nan")})
    trainer.save_checkpoint(tmp_path)
    other = Trainer(make_model())
    other.load_checkpoint(tmp_path)
    assert repr(other.history.history) == "{'loss': [nan]}"


def test_a_checkpoint_between_the_batches_of_an_update_is_refused(tmp_path):
    class Save(Callback):
        def on_train_batch_end(self, batch, logs):
            self.trainer.save_checkpoint(tmp_path)

    def fit(callback):
        Trainer(make_model(), accumulate=2).fit(make_x(), callbacks=[callback], verbose=False)

    with pytest.raises(CheckpointError, match="1 batches were taken and 2 make one update"):
        fit(Save())
    with pytest.raises(CheckpointError, match="every_steps is 3 and 2 batches make one update; make it a multiple"):
        fit(ModelCheckpoint(tmp_path, None, every_steps=3))
