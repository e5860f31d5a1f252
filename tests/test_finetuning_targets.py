"""Labels of any kind, numbered, and the split that keeps all classes."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from fastenc.data import DataError
from fastenc.finetuning.targets import match_targets, read_targets, split_rows

FORMS = {
    "text": ["b", "a", "b", "c"],
    "objects": np.array(["b", "a", "b", "c"], object),
    "series": pd.Series(["b", "a", "b", "c"]),
    "categories": pd.Series(["b", "a", "b", "c"], dtype="category"),
    "numbers": [7, -1, 7, 9],
    "tensor": torch.tensor([7, -1, 7, 9]),
    "nullable": pd.Series([7, -1, 7, 9], dtype="Int64"),
}


@pytest.mark.parametrize("form", FORMS)
def test_labels_of_any_kind_are_numbered(form):
    targets = read_targets(FORMS[form], 4)
    assert targets.values.tolist() == [1, 0, 1, 2]
    assert targets.values.dtype == torch.int64
    assert targets.outputs == 3
    assert match_targets(list(FORMS[form])[::-1], 4, targets, "other").tolist() == [2, 1, 0, 1]


def test_booleans_are_two_classes():
    assert read_targets([True, False], 2).classes.tolist() == [False, True]


@pytest.mark.parametrize("y", [[0.5, 2.0], [[0.5], [2.0]], np.array([[1, 2], [3, 4]])])
def test_other_numbers_are_regression(y):
    targets = read_targets(y, 2)
    assert targets.classes is None
    assert targets.values.shape == (2, np.atleast_2d(np.array(y).T).shape[0])
    assert targets.values.dtype == torch.float32


def test_the_task_can_be_said():
    assert read_targets([1, 5], 2, "regression").values.tolist() == [[1.0], [5.0]]
    assert read_targets([0.5, 1.5], 2, "classification").classes.tolist() == [0.5, 1.5]


@pytest.mark.parametrize(
    ("y", "task", "message"),
    [
        (
            ["a", None, "b"],
            "auto",
            r"y has no label in 1 of 3 rows \(row 1, counted from 0\); leave those rows out, or",
        ),
        (["a", float("nan"), "b"], "auto", "y has no label in 1 of 3 rows"),
        ([0.0, float("nan"), 1.0], "classification", "y has NaN or Inf in 1 of 3 rows"),
        ([0.0, float("nan"), 1.0], "auto", "y has NaN or Inf in 1 of 3 rows"),
        (["a", "b"], "auto", "y has 2 labels and x has 3 rows"),
        (["a", "a", "a"], "auto", "y holds only the class a; classification needs rows of at least two classes"),
        ([[1], [2], [3]], "classification", "y has two dimensions; classification needs one label"),
        (np.array(["2020-01-01"] * 3, "datetime64[D]"), "auto", r"y holds datetime64\[D\] values"),
        (["a", "b", "c"], "regression", "y holds text such as 'a', not numbers"),
    ],
)
def test_wrong_labels(y, task, message):
    with pytest.raises(DataError, match=message):
        read_targets(y, 3, task)


def test_unknown_task():
    with pytest.raises(ValueError, match="task is 'ranking'; give one of auto, classification, regression"):
        read_targets([1, 2], 2, "ranking")


def test_labels_that_training_has_not_seen():
    targets = read_targets(["a", "b"], 2)
    with pytest.raises(DataError, match="validation y holds labels that no training row has: c, d; leave those rows"):
        match_targets(["a", "d", "c"], 3, targets, "validation y")
    with pytest.raises(DataError, match="validation y has 2 outputs and y has 1"):
        match_targets([[1.0, 2.0]], 1, read_targets([0.5, 1.5], 2), "validation y")


def test_a_split_takes_its_share_of_each_class():
    labels = np.repeat([0, 1, 2], [100, 40, 10])
    targets = read_targets(labels, 150)
    train, held_out = split_rows(targets, 0.2, 3)
    assert sorted([*train, *held_out]) == list(range(150))
    assert np.bincount(labels[held_out]).tolist() == [20, 8, 2]
    again = split_rows(targets, 0.2, 3)[1]
    assert again.tolist() == held_out.tolist()
    assert split_rows(targets, 0.2, 4)[1].tolist() != held_out.tolist()


def test_a_split_for_regression():
    train, held_out = split_rows(read_targets(np.arange(10.0), 10), 0.25, 0)
    assert (len(train), len(held_out)) == (8, 2)
    assert sorted([*train, *held_out]) == list(range(10))


@pytest.mark.parametrize(
    ("labels", "fraction", "message"),
    [
        ([0, 0, 1, 1], 0.1, "leaves 4 to train on and 0 to validate on"),
        ([0, 0, 1, 1], 0.9, "leaves 0 to train on and 4 to validate on"),
        ([0, 0, 1], 0.5, "y has a single row of the class 1, and validation_split needs at least two of each"),
        ([0] * 8 + [1] * 2, 0.1, "leaves 1 of a single class to validate on; raise it"),
        ([0, 0, 1, 1], 0.8, "takes all 2 rows of the class [01]; lower it"),
    ],
)
def test_splits_that_leave_too_little(labels, fraction, message):
    with pytest.raises(DataError, match=message):
        split_rows(read_targets(labels, len(labels)), fraction, 0)
