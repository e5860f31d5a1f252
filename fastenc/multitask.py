"""Several tasks at once: one encoder, a head for each task, and the weighted sum of their losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from fastenc.data import DataError, as_target

from .encoder import encoder_from_config
from .modules import FusedDense
from .pretrained import Pretrained
from .training.losses import LOSSES, fit_target, get_loss

ONE_ROW_LOSSES = tuple(name for name in LOSSES if name not in ("info_nce", "triplet"))


@dataclass(frozen=True)
class Task:
    """One task of a MultiTask.

    Attributes:
        outputs: how many numbers its head gives: the number of classes for "cross_entropy".
        loss: a name that Trainer knows, of rows each for itself.
        weight: what its loss counts in the sum.
    """

    outputs: int
    loss: str = "mse"
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.loss not in ONE_ROW_LOSSES:
            raise ValueError(f"a task's loss is {self.loss!r}; give one of {', '.join(ONE_ROW_LOSSES)}")
        if not isinstance(self.outputs, int) or self.outputs < 1:
            raise ValueError(f"a task has {self.outputs!r} outputs; give a whole number of at least 1")
        if not 0.0 <= self.weight < float("inf"):
            raise ValueError(f"a task's weight is {self.weight!r}; give a finite number of at least 0")

    @property
    def columns(self) -> int:
        """How many columns its targets take: one for labels."""
        return 1 if self.loss == "cross_entropy" else self.outputs


class MultiTask(Pretrained, nn.Module):
    """One encoder and a linear head for each task: `[rows, in_features]` to the outputs of all tasks side by side.

    It is trained by Trainer with its own loss:

        model = MultiTask(Encoder(64), {"digit": Task(10, "cross_entropy"), "ink": Task(1, weight=0.5)})
        trainer = Trainer(model, loss=model.loss)
        trainer.fit(x, model.targets(digit=labels, ink=ink))
        model.split(trainer.predict(x))["digit"].argmax(1)

    Args:
        encoder: what the tasks share: an Encoder or a FrontEncoder.
        tasks: by name; at least one.
    """

    def __init__(self, encoder: Any, tasks: Mapping[str, Task]) -> None:
        super().__init__()
        if not tasks:
            raise ValueError("tasks is empty; give at least one, for example {'digit': Task(10, 'cross_entropy')}")
        weight = cast(FusedDense, encoder.layers[0]).weight
        self.encoder = encoder
        self.tasks = dict(tasks)
        # Whatever a task is called, as a column may be: a ModuleDict takes no dots and no names of its methods.
        plain = all(name and "." not in name and not hasattr(nn.ModuleDict(), name) for name in tasks)
        self._keys = {name: name if plain else f"task_{index}" for index, name in enumerate(tasks)}
        self.heads = nn.ModuleDict(
            {
                self._keys[name]: FusedDense(
                    encoder.out_features, task.outputs, activation="identity", device=weight.device, dtype=weight.dtype
                )
                for name, task in tasks.items()
            }
        )

    def get_config(self) -> dict[str, Any]:
        return {
            "encoder": self.encoder.get_config(),
            "tasks": [[name, asdict(task)] for name, task in self.tasks.items()],
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MultiTask:
        return cls(encoder_from_config(config["encoder"]), {name: Task(**task) for name, task in config["tasks"]})

    def head(self, task: str) -> FusedDense:
        """The linear layer of a task."""
        return cast(FusedDense, self.heads[self._keys[task]])

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def forward(self, x: Tensor) -> Tensor:
        code = self.encoder(x)
        return torch.cat([head(code) for head in self.heads.values()], dim=-1)

    def split(self, outputs: Any) -> dict[str, Any]:
        """The outputs of each task, of what the model or `Trainer.predict` gives [rows, all outputs]."""
        ends = np.cumsum([task.outputs for task in self.tasks.values()]).tolist()
        return {
            name: outputs[..., end - task.outputs : end]
            for end, (name, task) in zip(ends, self.tasks.items(), strict=True)
        }

    def targets(self, **targets: Any) -> Tensor:
        """The targets of all tasks as one array for `Trainer.fit`: float32 [rows, columns], labels as whole numbers.

        Raises:
            DataError: a task is missing or unknown, or a target does not fit its task.
        """
        if missing := [name for name in self.tasks if name not in targets]:
            raise DataError(f"there is no target for {', '.join(missing)}; give one for each task")
        if unknown := [name for name in targets if name not in self.tasks]:
            raise DataError(f"there is no task {', '.join(unknown)}; the tasks are {', '.join(self.tasks)}")
        columns: list[Tensor] = []
        for name, task in self.tasks.items():
            rows = len(columns[0]) if columns else len(targets[name])
            target = as_target(targets[name], rows, name=name)
            target = fit_target(target, torch.empty(1, task.outputs), _checked_by(task.loss), name)
            columns.append(target.to(torch.float32).reshape(rows, -1))
            if columns[-1].shape[1] != task.columns:
                raise DataError(f"{name} has probabilities of classes, and a task takes one label for each row")
        return torch.cat(columns, dim=1)

    def losses(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Each task's own loss, not weighted, of outputs [rows, all outputs] and of what `targets` gave."""
        found, start = {}, 0
        for (name, task), output in zip(self.tasks.items(), self.split(outputs).values(), strict=True):
            target = targets[:, start : start + task.columns]
            target = target[:, 0].long() if task.loss == "cross_entropy" else target.to(output.dtype)
            found[name] = get_loss(task.loss)(output, target)
            start += task.columns
        return found

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The sum of the tasks' losses, each times its weight: what Trainer takes as `loss`."""
        losses = self.losses(outputs, targets)
        return torch.stack([task.weight * losses[name] for name, task in self.tasks.items()]).sum()


def _checked_by(loss: str) -> str:
    """The loss whose check of targets holds: that of bce's predictions is for those of the model."""
    return "bce_with_logits" if loss == "bce" else loss
