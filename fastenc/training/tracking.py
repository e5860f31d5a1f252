"""Callbacks that write down what is measured: a CSV file, TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

import csv
import os
import sys
from pathlib import Path
from typing import Any

from fastenc.data.extras import require

from .callbacks import Callback


class CSVLogger(Callback):
    """A line for each epoch: its number and what History gets. The file is whole after every line.

    Args:
        path: the file; its folder is made if absent.
        append: go on in a file that is there, as after `fit(resume=...)`: lines of epochs that are trained again are
            replaced. Otherwise it is written anew.

    Raises:
        ValueError: a file to go on in has other columns.
    """

    writes = True

    def __init__(self, path: str | os.PathLike[str], append: bool = False) -> None:
        self.path = Path(path)
        self.append = append
        self._rows: list[dict[str, Any]] = []

    def on_train_begin(self) -> None:
        self._rows = []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.append and self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as file:
                self._rows = [dict(row) for row in csv.DictReader(file)]

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        rows = [row for row in self._rows if int(row["epoch"]) < epoch]
        if rows and [*rows[-1]] != ["epoch", *logs]:
            raise ValueError(
                f"{self.path} has the columns {', '.join(rows[-1])} and {', '.join(['epoch', *logs])} were measured; "
                "give another file"
            )
        self._rows = [*rows, {"epoch": epoch, **logs}]
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["epoch", *logs])
            writer.writeheader()
            writer.writerows(self._rows)
        os.replace(temporary, self.path)


class TensorBoard(Callback):
    """Scalars for TensorBoard, one of each name for each epoch, in a new event file in `folder`."""

    writes = True

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = os.fspath(folder)
        self._writer: Any = None

    def on_train_begin(self) -> None:
        require("tensorboard", "TensorBoard", extra="track")
        self._writer = require("torch.utils.tensorboard", "TensorBoard", extra="track").SummaryWriter(self.folder)

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        for name, value in logs.items():
            self._writer.add_scalar(name, value, epoch)
        self._writer.flush()

    def on_train_end(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WandB(Callback):
    """A run of Weights & Biases for each fit, with what is measured in each epoch.

    Args:
        options: of `wandb.init`: project, name, mode="offline", dir, config and others. A run that is open already is
            logged to, and left open.
    """

    writes = True

    def __init__(self, **options: Any) -> None:
        self.options = options
        self._run: Any = None
        self._ours = False
        self._error: BaseException | None = None

    def on_train_begin(self) -> None:
        self._error = sys.exc_info()[1]
        wandb = require("wandb", "WandB", extra="track")
        self._ours = wandb.run is None
        self._run = wandb.init(**self.options) if self._ours else wandb.run

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        self._run.log({"epoch": epoch, **logs})

    def on_train_end(self) -> None:
        if self._run is not None and self._ours:
            self._run.finish(exit_code=int(_failed(self._error)))
        self._run = None


class MLflow(Callback):
    """A run of MLflow for each fit, with what is measured in each epoch; FAILED where an error ended the fit.

    Args:
        experiment: its name; it is made if absent.
        tracking_uri: where it goes: a folder as file:///..., a server. None: where MLflow is set to.
        parameters: written down once, as the run's parameters.
        run_name: None lets MLflow choose.

    Attributes:
        run_id: of the latest run.
    """

    writes = True

    def __init__(
        self,
        experiment: str = "fastenc",
        *,
        tracking_uri: str | None = None,
        parameters: dict[str, Any] | None = None,
        run_name: str | None = None,
    ) -> None:
        self.experiment, self.tracking_uri = experiment, tracking_uri
        self.parameters, self.run_name = parameters or {}, run_name
        self.run_id: str | None = None
        self._client: Any = None
        self._error: BaseException | None = None

    def on_train_begin(self) -> None:
        self._error = sys.exc_info()[1]
        client = require("mlflow", "MLflow", extra="track").MlflowClient(tracking_uri=self.tracking_uri)
        experiment = client.get_experiment_by_name(self.experiment)
        number = client.create_experiment(self.experiment) if experiment is None else experiment.experiment_id
        self.run_id = client.create_run(number, run_name=self.run_name).info.run_id
        self._client = client
        for name, value in self.parameters.items():
            client.log_param(self.run_id, name, value)

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        for name, value in logs.items():
            self._client.log_metric(self.run_id, name, value, step=epoch)

    def on_train_end(self) -> None:
        if self._client is not None:
            self._client.set_terminated(self.run_id, "FAILED" if _failed(self._error) else "FINISHED")
            self._client = None


def _failed(before: BaseException | None) -> bool:
    """Whether a fit that ends is being left by an error, other than one handled around it, seen as it began."""
    return sys.exc_info()[1] is not before
