"""What a checkpoint holds, and those that are refused: of other models, damaged, or where nothing can be written."""

import errno
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from interrupted_fits import Interrupt, run
from safetensors import safe_open
from safetensors.torch import save_file
from small_models import assert_same_weights, make_classifier, make_model, make_x
from torch import nn

from fastenc import AutoEncoder, Encoder
from fastenc.files import canonical, text_digest
from fastenc.training import Callback, CheckpointError, EarlyStopping, History, ModelCheckpoint, Trainer
from fastenc.training.checkpoint import CHECKPOINT_FILE


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
