"""What fine-tuning works towards: targets, one or several, the heads that give them, their losses and their scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastenc.data import DataError

from ..encoder import Classifier, Encoder, Regressor
from ..multitask import MultiTask, Task
from ..training.losses import LossFunction
from .targets import Targets, match_targets, read_targets, split_rows

SCALED_LOSSES = ("mse", "mae", "huber")


class Goal:
    """One target of each row.

    Attributes:
        targets: as read.
        loss: a name that Trainer knows, or a function.
        classes: the label of each of the head's outputs; None for numbers.
    """

    def __init__(self, targets: Targets, loss: str | LossFunction | None, scale: bool) -> None:
        self.targets, self.classes = targets, targets.classes
        self.loss = loss or ("mse" if targets.classes is None else "cross_entropy")
        self.scaled = scale and targets.classes is None and self.loss in SCALED_LOSSES
        self._mean = self._deviation = torch.empty(0)

    @property
    def values(self) -> Tensor:
        """Of all rows: int64 [rows] or float32 [rows, outputs]."""
        return self.targets.values

    def match(self, y: Any, rows: int, name: str) -> Tensor:
        """The values of other rows."""
        return match_targets(y, rows, self.targets, name)

    def split(self, fraction: float, seed: int | None) -> tuple[np.ndarray, np.ndarray]:
        return split_rows(self.targets, fraction, seed)

    def model(self, encoder: Encoder) -> Any:
        """The encoder with a head; for "triplet" the encoder."""
        if self.loss == "triplet":
            return encoder
        return (Regressor if self.classes is None else Classifier)(encoder, self.targets.outputs)

    def loss_of(self, model: Any) -> str | LossFunction:
        return self.loss

    def learn_scale(self, values: Tensor) -> None:
        """Take mean 0 and standard deviation 1 of the training rows' values as the units, if they are scaled."""
        if self.scaled:
            self._mean, deviation = values.mean(0), values.std(0, unbiased=False)
            self._deviation = torch.where(deviation > 0.0, deviation, 1.0)

    def to_units(self, values: Tensor) -> Tensor:
        return (values - self._mean) / self._deviation if self.scaled else values

    def put_scale_into(self, model: Any) -> None:
        """Make the model's outputs ones in the units of y: in a head without activation that is another head."""
        self.scale_head(getattr(model, "head", None))

    @torch.no_grad()
    def scale_head(self, head: nn.Module | None) -> None:
        if not self.scaled:
            return
        assert head is not None
        mean, deviation = self._mean.to(head.weight), self._deviation.to(head.weight)  # type: ignore[arg-type]
        head.weight.mul_(deviation[:, None])  # type: ignore[operator]
        head.bias.mul_(deviation).add_(mean)  # type: ignore[operator]


class Goals:
    """Several targets of each row, with a head for each on one encoder: the same for a MultiTask.

    Attributes:
        goals: by name.
        tasks: of the MultiTask.

    Raises:
        ValueError: a loss that is not for the target, or no weight.
    """

    def __init__(self, goals: dict[str, Goal], weights: dict[str, float]) -> None:
        self.goals = goals
        self.tasks = {}
        for name, goal in goals.items():
            if not isinstance(goal.loss, str) or (goal.loss == "cross_entropy") != (goal.classes is not None):
                what = "numbers" if goal.classes is None else "classes"
                raise ValueError(f"the target {name} holds {what} and its loss is {goal.loss!r}; leave that loss out")
            self.tasks[name] = Task(goal.targets.outputs, goal.loss, weights[name])

    @property
    def classes(self) -> dict[str, np.ndarray | None]:
        return {name: goal.classes for name, goal in self.goals.items()}

    @property
    def values(self) -> Tensor:
        """float32 [rows, columns]: one column for labels, one for each number."""
        return self._side_by_side({name: goal.values for name, goal in self.goals.items()})

    def match(self, y: Any, rows: int, name: str) -> Tensor:
        if not isinstance(y, Mapping) or set(y) != set(self.goals):
            raise DataError(f"{name} must hold the targets {', '.join(self.goals)}, as y does")
        return self._side_by_side(
            {each: goal.match(y[each], rows, f"{name}[{each!r}]") for each, goal in self.goals.items()}
        )

    def split(self, fraction: float, seed: int | None) -> tuple[np.ndarray, np.ndarray]:
        """As of the first target with classes, whose classes are split alike; no other may lose a class by it."""
        leading = next((goal for goal in self.goals.values() if goal.classes is not None), None)
        leading = leading or next(iter(self.goals.values()))
        training, held_out = leading.split(fraction, seed)
        for name, goal in self.goals.items():
            if goal.classes is not None:
                absent = np.setdiff1d(np.arange(len(goal.classes)), goal.values.numpy()[training])
                if len(absent):
                    raise DataError(
                        f"validation_split={fraction} takes all rows with {goal.classes[absent[0]]} in {name}; lower "
                        "it, change seed, or give validation_data"
                    )
        return training, held_out

    def model(self, encoder: Encoder) -> MultiTask:
        return MultiTask(encoder, self.tasks)

    def loss_of(self, model: MultiTask) -> LossFunction:
        return model.loss

    def learn_scale(self, values: Tensor) -> None:
        for goal, part in zip(self.goals.values(), self._parts(values), strict=True):
            goal.learn_scale(part)

    def to_units(self, values: Tensor) -> Tensor:
        parts = zip(self.goals.values(), self._parts(values), strict=True)
        return torch.cat([goal.to_units(part) for goal, part in parts], 1)

    def put_scale_into(self, model: MultiTask) -> None:
        for name, goal in self.goals.items():
            goal.scale_head(model.head(name))

    def _parts(self, values: Tensor) -> tuple[Tensor, ...]:
        return values.split(
            [1 if goal.classes is not None else goal.targets.outputs for goal in self.goals.values()], 1
        )

    def _side_by_side(self, values: dict[str, Tensor]) -> Tensor:
        return torch.cat([each.to(torch.float32).reshape(len(each), -1) for each in values.values()], 1)


def read_goals(y: Any, rows: int, task: Any, loss: Any, weights: Mapping[str, float] | None, scale: bool) -> Any:
    """A Goal of y, or Goals if y is a mapping from names to the targets.

    Raises:
        ValueError: options that do not go with the targets.
        DataError: as `read_targets`.
    """
    if not isinstance(y, Mapping):
        if weights is not None or isinstance(task, Mapping) or isinstance(loss, Mapping):
            raise ValueError(
                "there is one target, and task, loss or weights are given by name; give them without names"
            )
        return Goal(read_targets(y, rows, task), loss, scale)
    if not y:
        raise ValueError("y is an empty mapping; give at least one target")
    if loss is not None and not isinstance(loss, Mapping):
        raise ValueError(f"loss is {loss!r} and there are several targets; give losses by name, or leave loss out")
    for what, given in (("task", task), ("loss", loss), ("weights", weights)):
        if isinstance(given, Mapping) and (unknown := [str(name) for name in given if name not in y]):
            raise ValueError(
                f"{what} names {', '.join(unknown)}, which is no target; the targets are {', '.join(map(str, y))}"
            )
    goals = {}
    for name, values in y.items():
        kind = task.get(name, "auto") if isinstance(task, Mapping) else task
        goals[name] = Goal(read_targets(values, rows, kind, str(name)), (loss or {}).get(name), scale)
    return Goals(goals, {name: (weights or {}).get(name, 1.0) for name in y})
