"""What is learned with labels: classes of any kind numbered, numbers as they are, and a split with all classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastenc.data import DataError, as_target
from fastenc.data.arrays import row_list

TASKS = ("auto", "classification", "regression")


@dataclass(frozen=True)
class Targets:
    """y, as training takes it.

    values     int64 [rows], the classes' numbers; or float32 [rows, outputs]
    classes    the label of each number, sorted; None for regression
    """

    values: Tensor
    classes: np.ndarray | None

    @property
    def outputs(self) -> int:
        return self.values.shape[1] if self.classes is None else len(self.classes)


def read_targets(y: Any, rows: int, task: str = "auto", name: str = "y") -> Targets:
    """The targets of training rows.

    Args:
        y: [rows] labels (text, booleans, whole numbers, of any value) or [rows] or [rows, outputs] numbers.
        name: what to call y in errors.
        task: "auto" takes text, booleans and whole numbers in one dimension for classes, all else for numbers.

    Raises:
        DataError: as `as_target`; missing labels; a single class.
    """
    if task not in TASKS:
        raise ValueError(f"task is {task!r}; give one of {', '.join(TASKS)}")
    labels = _labels(y, rows, name)
    if task == "regression" or (task == "auto" and (labels is None or labels.dtype.kind == "f")):
        values = as_target(y, rows, name=name).to(torch.float32)
        return Targets(values[:, None] if values.ndim == 1 else values, None)
    if labels is None:
        raise DataError(f"{name} has two dimensions; classification needs one label for each row, as [{rows}]")
    classes, numbers = np.unique(labels, return_inverse=True)
    if len(classes) == 1:
        raise DataError(
            f"{name} holds only the class {classes[0]!s}; classification needs rows of at least two classes"
        )
    return Targets(torch.from_numpy(numbers.astype(np.int64)), classes)


def match_targets(y: Any, rows: int, training: Targets, name: str) -> Tensor:
    """Other rows' targets as those of training: `Targets.values`.

    Raises:
        DataError: a label that training has not seen, another number of outputs, or as `read_targets`.
    """
    if training.classes is None:
        values = as_target(y, rows, name=name).to(torch.float32)
        values = values[:, None] if values.ndim == 1 else values
        if values.shape[1] != training.outputs:
            raise DataError(f"{name} has {values.shape[1]} outputs and y has {training.outputs}; give as many")
        return values
    labels = _labels(y, rows, name)
    if labels is None:
        raise DataError(f"{name} has two dimensions; give one label for each row, as [{rows}]")
    known = {label: number for number, label in enumerate(training.classes.tolist())}
    unseen = sorted({str(label) for label in labels.tolist() if label not in known})
    if unseen:
        raise DataError(
            f"{name} holds labels that no training row has: {', '.join(unseen[:5])}{', ...' * (len(unseen) > 5)}; "
            "leave those rows out, or train on some of them"
        )
    return torch.tensor([known[label] for label in labels.tolist()], device="cpu")


def split_rows(targets: Targets, fraction: float, seed: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Random row numbers in two parts, (to train on, to validate on); of each class about `fraction` is held out.

    Raises:
        DataError: a part would have no rows, the second only one class, or the first would lack a class.
    """
    rows = len(targets.values)
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"validation_split is {fraction}; it must be at least 0 and less than 1")
    count = round(rows * fraction)
    if not 0 < count < rows:
        raise DataError(
            f"validation_split={fraction} of {rows} rows leaves {rows - count} to train on and {count} to validate on; "
            "change it so that both have rows, or give validation_data"
        )
    order = np.random.RandomState(seed).permutation(rows)
    if targets.classes is None:
        return order[count:], order[:count]
    numbers = targets.values.numpy()
    order = order[np.argsort(numbers[order], kind="stable")]  # class after class, in each at random: every so many-th
    chosen = np.zeros(rows, bool)
    chosen[((np.arange(count) + 0.5) * rows / count).astype(int)] = True
    train, held_out = np.sort(order[~chosen]), np.sort(order[chosen])
    absent = set(range(len(targets.classes))) - set(numbers[train].tolist())
    sizes = np.bincount(numbers)
    if alone := [str(targets.classes[number]) for number in np.flatnonzero(sizes < 2)]:
        raise DataError(
            f"y has a single row of the class {alone[0]}, and validation_split needs at least two of each; add rows, "
            "leave the class out, or give validation_data"
        )
    if absent:
        number = min(absent)
        raise DataError(
            f"validation_split={fraction} takes all {sizes[number]} rows of the class {targets.classes[number]}; lower "
            "it, or give validation_data"
        )
    if len(set(numbers[held_out].tolist())) < 2:
        raise DataError(
            f"validation_split={fraction} of {rows} rows leaves {count} of a single class to validate on; raise it, or "
            "give validation_data"
        )
    return train, held_out


def _labels(y: Any, rows: int, name: str) -> np.ndarray | None:
    """One-dimensional y as labels: text as str, numbers and booleans as they are. None if it has more dimensions."""
    array = np.asarray(y.detach().cpu() if isinstance(y, Tensor) else y)
    if array.ndim != 1:
        return None
    if array.dtype.kind == "U" and isinstance(y, (list, tuple)):
        array = np.asarray(y, dtype=object)  # numpy makes text of None and NaN beside text
    if len(array) != rows:
        raise DataError(f"{name} has {len(array)} labels and x has {rows} rows; give one for each row")
    if array.dtype.kind == "O":
        missing = [i for i, value in enumerate(array) if value is None or value != value]
        if missing:
            raise DataError(
                f"{name} has no label in {row_list(missing, rows)}; leave those rows out, or give them as unlabelled"
            )
        if any(isinstance(value, str) for value in array):
            array = np.array([str(value) for value in array])
        else:
            array = np.array(array.tolist())
    if array.dtype.kind == "f" and len(bad := np.flatnonzero(~np.isfinite(array))):
        raise DataError(
            f"{name} has NaN or Inf in {row_list(bad, rows)}; leave those rows out, or give them as unlabelled"
        )
    if array.dtype.kind not in "biufUS":
        raise DataError(f"{name} holds {array.dtype} values; give text or numbers")
    return array
