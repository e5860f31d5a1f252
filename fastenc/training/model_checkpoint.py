"""ModelCheckpoint: saves while training goes on, and keeps the best and the latest."""

from __future__ import annotations

import importlib
import math
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from .callbacks import Callback, larger_is_better, monitored
from .checkpoint import (
    CHECKPOINT_FILE,
    CheckpointError,
    about_checkpoint,
    checkpoints,
    make_folder,
    save_checkpoint,
)

LOCK_FILE = ".lock"


class ModelCheckpoint(Callback):
    """Save a checkpoint after epochs, each in a folder of its own, epoch-0001 for the first.

    Args:
        folder: where they go. One fit at a time may save to it; a fit that does not resume needs one without
            checkpoints.
        monitor: a name in `History.history` by which checkpoints are better or worse; None to keep the latest alone.
        mode: as of EarlyStopping.
        keep_best: how many of the best are kept. A number that is NaN is the worst.
        keep_last: how many of the latest are kept, at least 1: `fit(resume=folder)` takes the latest.
        every: save after every so many epochs, and after one that ends training.
        every_steps: save after every so many steps of an epoch, too: epoch-0001-step-000500. Each step is then a call.
        preprocessing: what the model's inputs need, saved with it.

    It is called after all other callbacks of a fit, and saves what they know.

    Raises:
        ValueError: a count is too small, or mode is unknown; after the first epoch, if nothing of the name `monitor`
            was measured.
        CheckpointError: when a fit begins: another process saves to the folder, it holds checkpoints of another fit,
            or cannot be written to.
        OSError: a save failed; the checkpoints there are as they were.
    """

    writes = True

    def __init__(
        self,
        folder: str | os.PathLike[str],
        monitor: str | None = "val_loss",
        *,
        mode: str = "auto",
        keep_best: int = 1,
        keep_last: int = 1,
        every: int = 1,
        every_steps: int | None = None,
        preprocessing: dict[str, Any] | None = None,
    ) -> None:
        counts = {"keep_best": (keep_best, 0), "keep_last": (keep_last, 1), "every": (every, 1)}
        if every_steps is not None:
            counts["every_steps"] = (every_steps, 1)
        for name, (count, least) in counts.items():
            if count < least:
                raise ValueError(f"{name} is {count!r}; it must be at least {least}")
        self.folder = Path(folder)
        self.monitor = monitor
        self.sign = -1.0 if larger_is_better(mode, monitor or "") else 1.0
        self.keep_best, self.keep_last = keep_best, keep_last
        self.every, self.every_steps = every, every_steps
        self.preprocessing = preprocessing
        self._lock: BinaryIO | None = None
        self._values: dict[Path, float] = {}  # what is known of the checkpoints in the folder

    @property
    def inside_steps(self) -> bool:
        return self.every_steps is not None

    @property
    def latest(self) -> Path | None:
        """The latest checkpoint in the folder; None before the first."""
        found = checkpoints(self.folder)
        return found[-1] if found else None

    @property
    def best(self) -> Path | None:
        """The best one; None before the first, and without `monitor`."""
        ranked = self._ranked(checkpoints(self.folder))
        return ranked[0] if ranked else None

    def on_train_begin(self) -> None:
        fit = self.trainer.fitting
        make_folder(self.folder)
        if self.every_steps is not None and fit is not None and fit.rows is None:
            raise CheckpointError("every_steps needs arrays, and x is a Dataset or DataLoader; leave every_steps out")
        if self.every_steps is not None and self.every_steps % self.trainer.accumulate:
            raise CheckpointError(
                f"every_steps is {self.every_steps} and {self.trainer.accumulate} batches make one update; make it a "
                "multiple of that"
            )
        self._lock = _lock(self.folder)
        if (fit is None or fit.resumed is None) and (found := checkpoints(self.folder)):
            raise CheckpointError(
                f"{self.folder} has {len(found)} checkpoints of another fit; go on from them by fit(resume=...), or "
                "give an empty folder"
            )

    def on_train_batch_end(self, batch: int, logs: dict[str, float]) -> None:
        assert self.every_steps is not None
        assert self.trainer.fitting is not None
        if (batch + 1) % self.every_steps == 0:
            epoch = self.trainer.fitting.position.epoch
            self._save(f"epoch-{epoch:04}-step-{batch + 1:06}", {})

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        if self.monitor is not None:
            monitored(self, self.monitor, logs)
        fit = self.trainer.fitting
        last = self.trainer.stop_training or (fit is not None and epoch + 1 == fit.epochs)
        if last or (epoch + 1) % self.every == 0:
            self._save(f"epoch-{epoch + 1:04}", logs)

    def on_train_end(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _save(self, name: str, measured: dict[str, float]) -> None:
        path = self.folder / name
        save_checkpoint(self.trainer, path, preprocessing=self.preprocessing, measured=measured)
        self._values.pop(path, None)
        found = checkpoints(self.folder)
        kept = {*found[-self.keep_last :], *self._ranked(found)[: self.keep_best], path}
        for old in found:
            if old not in kept:
                with suppress(FileNotFoundError):
                    (old / CHECKPOINT_FILE).unlink()  # first: what is half removed is no checkpoint
                shutil.rmtree(old, ignore_errors=True)

    def _ranked(self, found: list[Path]) -> list[Path]:
        """Those with a number to go by, the best first, of equals the earliest."""
        if self.monitor is None:
            return []
        for path in found:
            if path not in self._values:
                value = self.sign * about_checkpoint(path)["measured"].get(self.monitor, math.inf)
                self._values[path] = math.inf if math.isnan(value) else value
        return sorted((path for path in found if "-step-" not in path.name), key=self._values.__getitem__)


def _lock(folder: Path) -> BinaryIO | None:
    """A file that is locked until it is closed, or its process ends in whatever way. None where there are no locks.

    Raises:
        CheckpointError: it is locked, or the folder cannot be written to.
    """
    try:
        file = (folder / LOCK_FILE).open("ab")
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written to: {error.strerror}; give a folder that can be") from None
    try:
        fcntl = importlib.import_module("fcntl")
    except ModuleNotFoundError:  # Windows
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise CheckpointError(f"another fit is saving checkpoints to {folder}; give each a folder of its own") from None
    except OSError:  # some network file systems have none
        pass
    return file
