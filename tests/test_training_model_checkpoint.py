import math
import subprocess
import sys

import pytest
from small_models import assert_same_weights, make_model, make_x

from fastenc import load_pretrained
from fastenc.training import Callback, CheckpointError, ModelCheckpoint, Trainer
from fastenc.training.checkpoint import checkpoints


class Scripted(Callback):
    """Puts a number of its own into what is measured."""

    def __init__(self, values, name="val_loss"):
        self.values, self.name = values, name

    def on_epoch_end(self, epoch, logs):
        logs[self.name] = self.values[epoch]


def fit(checkpoint, values, name="val_loss", **options):
    trainer = Trainer(make_model(), seed=0)
    callbacks = [checkpoint, Scripted(values, name)]  # what comes after it is saved as well
    trainer.fit(make_x(), epochs=len(values), callbacks=callbacks, verbose=False, **options)
    return trainer


def names(folder):
    assert {path.name for path in folder.iterdir()} == {".lock", *(path.name for path in checkpoints(folder))}
    return [path.name for path in checkpoints(folder)]


@pytest.mark.parametrize(
    ("values", "options", "kept", "best"),
    [
        ([3, 1, 2], {}, [2, 3], 2),
        ([3, 1, 2], {"keep_best": 0}, [3], None),
        ([3, 1, 2, 4, 5], {"keep_best": 2}, [2, 3, 5], 2),
        ([3, 1, 2, 4, 5], {"keep_last": 3}, [2, 3, 4, 5], 2),
        ([3, 1, 2, 4, 5], {"mode": "max"}, [5], 5),
        ([3, 1, 1], {}, [2, 3], 2),  # of equals the first
        ([math.nan, 1, math.nan, 2], {"keep_best": 2}, [2, 4], 2),
        ([3, 1, 2, 4, 5], {"every": 2}, [2, 5], 2),  # and the last
        ([1, 3, 2, 4], {"every": 2}, [2, 4], 2),
    ],
)
def test_the_best_and_the_last_are_kept(tmp_path, values, options, kept, best):
    checkpoint = ModelCheckpoint(tmp_path, **options)
    fit(checkpoint, values)
    assert names(tmp_path) == [f"epoch-{number:04}" for number in kept]
    assert checkpoint.latest == tmp_path / f"epoch-{kept[-1]:04}"
    if options.get("keep_best") != 0:
        assert checkpoint.best == tmp_path / f"epoch-{best:04}"


def test_without_a_monitor_the_last_alone_is_kept(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, None)
    assert checkpoint.latest is checkpoint.best is None
    trainer = fit(checkpoint, [1, 2, 3])
    assert names(tmp_path) == ["epoch-0003"]
    assert checkpoint.best is None
    assert_same_weights(load_pretrained(checkpoint.latest), trainer.model)


def test_every_few_steps(tmp_path):
    class Look(Callback):
        seen = ()

        def on_train_batch_begin(self, batch):
            self.seen += (names(tmp_path)[-1:],)

    look = Look()
    callbacks = [ModelCheckpoint(tmp_path, None, every_steps=2), look]
    trainer = Trainer(make_model())
    trainer.fit(make_x(), epochs=2, batch_size=10, callbacks=callbacks, verbose=False)
    steps = [[f"epoch-{epoch:04}-step-{step:06}"] for epoch in (0, 1) for step in (2, 2, 4)]
    assert look.seen == ([], [], *steps[:3], ["epoch-0001"], ["epoch-0001"], *steps[3:])
    assert names(tmp_path) == ["epoch-0002"]
    assert "one a call for callbacks inside the epoch" in trainer.explain()


def test_a_folder_with_checkpoints_is_gone_on_from_or_refused(tmp_path):
    fit(ModelCheckpoint(tmp_path), [3, 1])
    with pytest.raises(CheckpointError, match=r"has 1 checkpoints of another fit; go on from them by fit\(resume"):
        fit(ModelCheckpoint(tmp_path), [3])
    fit(ModelCheckpoint(tmp_path), [3, 1, 2, 0], resume=tmp_path)
    assert names(tmp_path) == ["epoch-0004"]
    fit(ModelCheckpoint(tmp_path / "other"), [3, 1, 2, 0, 5], resume=tmp_path)
    assert names(tmp_path / "other") == ["epoch-0005"]


def test_two_fits_at_once_need_two_folders(tmp_path):
    with pytest.raises(CheckpointError, match=r"another fit is saving checkpoints to .*; give each a"):
        Trainer(make_model()).fit(
            make_x(),
            callbacks=[ModelCheckpoint(tmp_path, None), ModelCheckpoint(tmp_path, None)],
            verbose=False,
        )
    fit(ModelCheckpoint(tmp_path), [1])  # the lock went with the fit


def test_a_monitor_that_is_not_measured(tmp_path):
    with pytest.raises(ValueError, match="ModelCheckpoint monitors 'val_loss' and only loss was measured"):
        Trainer(make_model()).fit(make_x(), callbacks=[ModelCheckpoint(tmp_path)], verbose=False)


@pytest.mark.parametrize("name", ["keep_last", "every", "every_steps"])
def test_bad_counts(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
        ModelCheckpoint(tmp_path, **{name: 0})
    with pytest.raises(ValueError, match="keep_best is -1"):
        ModelCheckpoint(tmp_path, keep_best=-1)


# Run in a fresh process, because it forks: children train and save until they are killed; then two save to one folder.
FORKED = """
import os, random, signal, sys, time
import torch
from pathlib import Path
from fastenc import AutoEncoder, Encoder
from fastenc.training import ModelCheckpoint, Trainer
from fastenc.training.checkpoint import CHECKPOINT_FILE, Checkpoint, checkpoints, latest_checkpoint

torch.set_num_threads(1)
folder, x = Path(sys.argv[1]), torch.rand(64, 16, generator=torch.Generator().manual_seed(0))

def trainer():
    torch.manual_seed(1)
    return Trainer(AutoEncoder(Encoder(16, (8, 4), dropout=0.1)), seed=3)

def fit(epochs, folder):
    made = trainer()
    callbacks = [ModelCheckpoint(folder, "loss", keep_best=2, every_steps=1)]
    resume = folder if checkpoints(folder) else None
    made.fit(x, epochs=epochs, callbacks=callbacks, resume=resume, verbose=False)
    return made

def forked(work, *args):
    child = os.fork()
    if child == 0:
        work(*args)
        os._exit(0)
    return child

fit(1, folder)
random.seed(4)
before = (1, 0)
progress = 0
for kill in range(50):
    begun = latest_checkpoint(folder)
    child = forked(fit, 10**6, folder)
    while kill % 2 and latest_checkpoint(folder) == begun:  # the others may be killed before their first save
        time.sleep(0.001)
    time.sleep(random.uniform(0.0, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    position = Checkpoint.read(latest_checkpoint(folder)).state["position"]
    now = (position["epoch"], position["step"])
    assert now >= before, (kill, before, now)
    progress += now > before
    before = now
assert progress >= 25, progress
last, whole = fit(before[0] + 1, folder), trainer()
whole.fit(x, epochs=before[0] + 1, verbose=False)
assert last.history.history == whole.history.history
for name, tensor in last.model.state_dict().items():
    assert torch.equal(tensor, whole.model.state_dict()[name]), name
print("survived")

def filled(value):
    made = trainer()
    for parameter in made.model.parameters():
        torch.nn.init.constant_(parameter, value)
    return made

def save(value):
    made = filled(value)
    for _ in range(40):
        made.save_checkpoint(folder / "raced")

children, seen, reader = [forked(save, 1.0), forked(save, 2.0)], set(), trainer()
while children:
    child, status = os.waitpid(-1, os.WNOHANG)
    if child:
        assert status == 0
        children.remove(child)
    if (folder / "raced" / CHECKPOINT_FILE).exists():
        reader.load_checkpoint(folder / "raced")
        (value,) = {value for parameter in reader.model.parameters() for value in parameter.unique().tolist()}
        seen.add(value)
assert seen == {1.0, 2.0}, seen
assert not [name for name in os.listdir(folder / "raced") if name.endswith(".tmp")]
print("raced")
"""


@pytest.fixture(scope="module")
def forked(tmp_path_factory):
    command = [sys.executable, "-c", FORKED, tmp_path_factory.mktemp("forked")]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_killed_fifty_times_it_loses_nothing_but_the_work_since_the_last_save(forked):
    assert "survived" in forked.stdout, forked.stderr


def test_two_processes_that_save_to_one_folder_leave_a_whole_checkpoint(forked):
    assert forked.stdout == "survived\nraced\n", forked.stderr
