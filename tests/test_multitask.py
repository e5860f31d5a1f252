"""Several tasks: the sum of their losses, how targets are put together, and that the shared encoder learns from all."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_models import assert_near, assert_same_weights, make_x
from torch.nn import functional as F

from fastenc import Encoder, ModelFileError, MultiTask, Task, Trainer, load_pretrained
from fastenc.data import DataError

X = make_x()
LABELS = torch.arange(50) % 3
SIZE = X[:, :2] * 2
BITS = LABELS == 0


def make_tasks(dtype=torch.float32, **weights):
    torch.manual_seed(0)
    tasks = {
        "kind": Task(3, "cross_entropy", weights.get("kind", 1.0)),
        "size": Task(2, "mse", weights.get("size", 0.5)),
        "first": Task(1, "bce_with_logits", weights.get("first", 2.0)),
    }
    return MultiTask(Encoder(6, (8, 4), "tanh", dtype=dtype), tasks)


def make_targets(model):
    return model.targets(kind=LABELS, size=SIZE, first=BITS)


def test_the_loss_is_the_weighted_sum():
    model = make_tasks(torch.float64)
    outputs, targets = model(X.double()), make_targets(model)
    assert outputs.shape == (50, 6)
    assert targets.shape == (50, 4)
    assert targets.dtype == torch.float32
    code = model.encoder(X.double())
    kind, size, first = (head(code) for head in model.heads.values())
    parts = [
        F.cross_entropy(kind, LABELS),
        F.mse_loss(size, SIZE.double()),
        F.binary_cross_entropy_with_logits(first[:, 0], BITS.double()),
    ]
    assert_near(list(model.losses(outputs, targets).values()), parts)
    assert_near([model.loss(outputs, targets)], [parts[0] + 0.5 * parts[1] + 2.0 * parts[2]])


def test_all_tasks_are_learned_and_share_the_encoder():
    model = make_tasks()
    targets = make_targets(model)
    before = {name: value.item() for name, value in model.losses(model(X), targets).items()}
    trainer = Trainer(model, lr=0.02, loss=model.loss, seed=0)
    trainer.fit(X, targets, epochs=150, validation_data=(X, targets), verbose=False)
    outputs = trainer.predict(X.numpy())
    after = model.losses(torch.from_numpy(outputs), targets)
    assert all(after[name] < 0.9 * before[name] for name in before)
    assert trainer.evaluate(X, targets)["loss"] == pytest.approx(trainer.history.history["val_loss"][-1], rel=1e-5)
    parts = model.split(outputs)
    assert {name: part.shape for name, part in parts.items()} == {"kind": (50, 3), "size": (50, 2), "first": (50, 1)}
    assert np.concatenate(list(parts.values()), 1).tolist() == outputs.tolist()
    assert trainer.encode(X).shape == (50, 4)
    assert trainer.explain().startswith("step by step: the model is not a plain")


def test_a_task_of_weight_0_leaves_the_encoder_alone():
    with_it, without = make_tasks(size=0.0), make_tasks(size=0.0)
    for model, size in ((with_it, SIZE), (without, SIZE * 100)):
        Trainer(model, loss=model.loss, seed=0).fit(X, model.targets(kind=LABELS, size=size, first=BITS), verbose=False)
    assert_same_weights(with_it.encoder, without.encoder)
    assert not torch.equal(with_it.encoder.layers[0].weight, make_tasks().encoder.layers[0].weight)


def test_it_is_saved_and_loaded(tmp_path):
    model = make_tasks()
    model.save_pretrained(tmp_path)
    loaded = MultiTask.from_pretrained(tmp_path)
    assert loaded.tasks == model.tasks
    assert torch.equal(loaded(X), model(X))
    found = load_pretrained(tmp_path)
    assert isinstance(found, MultiTask)
    assert torch.equal(found(X), model(X))
    with pytest.raises(ModelFileError, match=r"holds a model of class MultiTask; load it with MultiTask.from_pretr"):
        Encoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("names", [("kind", "size"), ("type", "a.b"), ("training", ""), ("keys", "é à")])
def test_a_task_may_have_any_name(tmp_path, names):
    model = MultiTask(Encoder(6, (4,)), {name: Task(2) for name in names})
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path)
    assert tuple(loaded.tasks) == names
    assert torch.equal(loaded.split(loaded(X))[names[1]], loaded.head(names[1])(loaded.encode(X)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": None}, "there is no target for kind; give one for each task"),
        ({"other": LABELS}, "there is no task other; the tasks are kind, size, first"),
        ({"kind": LABELS + 1}, "kind holds labels 1 to 3 and the model knows 0 to 2"),
        ({"kind": torch.eye(3)[LABELS]}, "kind has probabilities of classes, and a task takes one label"),
        ({"size": SIZE[1:]}, r"size has shape \[49, 2\] and x has 50 rows"),
        ({"size": SIZE[:, :1]}, r"the model gives \[2\] for a row and size has \[1\]"),
        ({"first": LABELS}, "first holds numbers from 0 to 2 and loss='bce_with_logits' needs 0 to 1"),
        ({"size": SIZE * float("nan")}, "size has NaN or Inf in 50 of 50 rows"),
    ],
)
def test_targets_that_do_not_fit(change, message):
    targets = {"kind": LABELS, "size": SIZE, "first": BITS} | change
    with pytest.raises(DataError, match=message):
        make_tasks().targets(**{name: target for name, target in targets.items() if target is not None})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Task(3, "triplet"), "a task's loss is 'triplet'; give one of mse"),
        (lambda: Task(0), "a task has 0 outputs"),
        (lambda: Task(1, weight=-1), "a task's weight is -1"),
        (lambda: MultiTask(Encoder(6), {}), "tasks is empty"),
    ],
)
def test_wrong_tasks(make, message):
    with pytest.raises(ValueError, match=message):
        make()
