"""finetune with several targets: each is learned, in its own units, and what does not go together is one sentence."""

from __future__ import annotations

import numpy as np
import pytest

from fastenc import MultiTask, finetune
from fastenc.data import DataError
from fastenc.data.augmentation import Mixup

X = np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32)
Y = {"kind": np.where(X[:, 0] > 0, "a", "b"), "size": 1000 + 50 * X[:, 1], "both": X[:, :2] * 3}
SMALL = {"widths": (16, 8), "seed": 0, "verbose": False}


@pytest.mark.parametrize(
    "options",
    [{}, {"strategy": "pretrain", "pretraining_options": {"epochs": 2}}, {"layer_decay": 0.5, "unfreeze_every": 5}],
    ids=["scratch", "pretrained", "thawed"],
)
def test_every_target_is_learned_in_its_units(options):
    result = finetune(X, Y, epochs=60, lr=0.01, validation_split=0.2, **SMALL, **options)
    assert isinstance(result.model, MultiTask)
    assert {name: None if each is None else each.tolist() for name, each in result.classes.items()} == {
        "kind": ["a", "b"],
        "size": None,
        "both": None,
    }
    found = result.predict(X)
    assert (found["kind"] == Y["kind"]).mean() > 0.9  # one in two by chance
    assert np.abs(found["size"] - Y["size"]).mean() < 20  # 40 by their mean
    assert found["both"].shape == (200, 2)
    history = result.history.history
    assert history["val_loss"][-1] < 0.5 * history["val_loss"][0]


def test_one_named_target_is_one_task():
    result = finetune(X, {"kind": Y["kind"]}, epochs=1, **SMALL)
    assert list(result.model.tasks) == ["kind"]


def test_tasks_losses_and_weights_by_name():
    y = {"n": np.arange(200) % 3, "size": Y["size"]}
    options = {"task": {"n": "regression"}, "loss": {"size": "huber"}, "weights": {"n": 0.25}}
    model = finetune(X, y, epochs=1, **SMALL, **options).model
    assert [(task.outputs, task.loss, task.weight) for task in model.tasks.values()] == [
        (1, "mse", 0.25),
        (1, "huber", 1.0),
    ]


def test_a_class_lost_to_validation_is_refused():
    y = {"kind": Y["kind"], "rare": np.array(["common"] * 199 + ["rare"])}

    def fit_until_it_is_held_out():
        for seed in range(50):
            finetune(X, y, epochs=1, validation_split=0.5, **{**SMALL, "seed": seed})

    with pytest.raises(DataError, match="takes all rows with rare in rare; lower it, change seed, or give"):
        fit_until_it_is_held_out()


@pytest.mark.parametrize(
    ("y", "options", "message"),
    [
        (Y, {"loss": "mse"}, "loss is 'mse' and there are several targets; give losses by name"),
        (Y, {"loss": {"size": "cross_entropy"}}, "the target size holds numbers and its loss is 'cross_entropy'"),
        (Y, {"weights": {"age": 1.0}}, "weights names age, which is no target; the targets are kind, size, both"),
        (Y, {"weights": {"kind": -1.0}}, "a task's weight is -1.0"),
        (Y, {"augment": Mixup()}, "Mixup cannot mix the labels of several targets"),
        (Y["kind"], {"weights": {"kind": 1.0}}, "there is one target, and task, loss or weights are given by name"),
        ({}, {}, "y is an empty mapping"),
        ({"kind": ["a"] * 200}, {}, "kind holds only the class a"),
        ({"size": Y["size"] * np.nan}, {}, "size has NaN or Inf in 200 of 200 rows"),
        (Y, {"validation_data": (X, {"kind": Y["kind"]})}, "validation y must hold the targets kind, size, both"),
        (
            Y,
            {"validation_data": (X, {**Y, "kind": ["c"] * 200})},
            r"\['kind'\] holds labels that no training row has: c",
        ),
    ],
)
def test_what_does_not_fit_is_one_sentence(y, options, message):
    with pytest.raises(ValueError, match=message):
        finetune(X, y, epochs=1, **SMALL, **options)
