"""Checkpoints of a Trainer: all that training goes on from, in one file that is whole at any moment.

`training.safetensors` is the whole truth: every tensor and, in its metadata as JSON, everything else, each under a
checksum. `training.json` tells people where training was, and a model of this package is beside it as `save_pretrained`
writes it; both are written after it and never read back.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.optim import Optimizer

from ..files import OtherFormatError, remove_abandoned, seal, separate, tensors_digest, unseal, write_atomically
from ..pretrained import Pretrained
from .callbacks import Callback, History
from .fitting import Fit, Position

if TYPE_CHECKING:
    from .trainer import Trainer

CHECKPOINT_FILE = "training.safetensors"
CHECKPOINT_COPY = "training.json"
FORMAT_VERSION = 1
_METADATA_KEY = "fastenc"
_LONGEST_HEADER = 100_000_000  # bytes, as safetensors has it
_NAME = re.compile(r"epoch-(\d+)(?:-step-(\d+))?")


class CheckpointError(ValueError):
    """A checkpoint that cannot be saved, read or gone on from; the message says why and what to do."""


def save_checkpoint(
    trainer: Trainer,
    folder: str | os.PathLike[str],
    *,
    preprocessing: dict[str, Any] | None = None,
    measured: dict[str, float] | None = None,
) -> None:
    """The work of `Trainer.save_checkpoint`. `measured`: what the epoch gave, to choose among checkpoints by."""
    fit, history = trainer.fitting, trainer.history
    position = Position(start=trainer.update.steps.taken) if fit is None else fit.position
    if fit is not None and position.step > 0 and fit.rows is None:
        raise CheckpointError(
            "a checkpoint inside an epoch needs arrays, and x is a Dataset or DataLoader; save after an epoch"
        )
    if position.step % trainer.accumulate:
        raise CheckpointError(
            f"{position.step} batches were taken and {trainer.accumulate} make one update, so that gradients would be "
            f"lost; save after a multiple of {trainer.accumulate} batches"
        )
    callbacks = [] if fit is None else [[type(c).__name__, c.state_dict()] for c in fit.callbacks]
    state = {
        "model": dict(trainer.model.state_dict()),
        "optimizer": {"class": type(trainer.optimizer).__name__, **trainer.optimizer.state_dict()},
        "scaler": None if trainer.update.scaler is None else trainer.update.scaler.state_dict(),
        "steps": trainer.update.steps.taken,
        "random": trainer.random_numbers.state(next(trainer.model.parameters()).device),
        "position": {**vars(position), "stopped": trainer.stop_training},
        "history": {"epoch": history.epoch, "history": history.history},
        "callbacks": [entry for entry in callbacks if entry[1]],
        "batch_size": None if fit is None else fit.batch_size,
        "rows": None if fit is None else fit.rows,
    }
    tensors: dict[str, Tensor] = {}
    packed = {name: _pack(value, name, tensors) for name, value in state.items()}
    tensors = separate(tensors)
    about = {"epoch": position.epoch, "step": position.step, "measured": _pack(measured or {}, "measured", tensors)}
    record = {
        "format_version": FORMAT_VERSION,
        "about": about,
        "state": packed,
        "preprocessing": preprocessing,
        "tensors_sha256": tensors_digest(tensors),
    }
    try:
        metadata = {_METADATA_KEY: seal(record)}
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"preprocessing must be what JSON can hold: {error}") from error
    folder = Path(folder)
    make_folder(folder)
    write_atomically(folder / CHECKPOINT_FILE, save(tensors, metadata))
    write_atomically(
        folder / CHECKPOINT_COPY, (json.dumps({**about, "steps": state["steps"]}, indent=2) + "\n").encode()
    )
    if isinstance(trainer.model, Pretrained):
        trainer.model.save_pretrained(folder, preprocessing=preprocessing)
    remove_abandoned(folder, (CHECKPOINT_FILE, CHECKPOINT_COPY))


def make_folder(folder: Path) -> None:
    """Make a folder for checkpoints, unless it is there.

    Raises:
        CheckpointError: it is a file, or cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise CheckpointError(f"{folder} is, or lies under, a file; give a folder for checkpoints") from None
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be made: {error.strerror}; give a folder that can be written to"
        ) from None


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder of ModelCheckpoint's, in the order of training."""
    found = []
    for path in folder.glob("epoch-*"):
        match = _NAME.fullmatch(path.name)
        if match and (path / CHECKPOINT_FILE).is_file():
            found.append((int(match[1]), int(match[2] or 0), path))
    return [path for _, _, path in sorted(found)]


def latest_checkpoint(folder: str | os.PathLike[str]) -> Path:
    """The checkpoint that `folder` is, or the latest in it.

    Raises:
        CheckpointError: there is none.
    """
    folder = Path(folder)
    if (folder / CHECKPOINT_FILE).is_file():
        return folder
    if not (found := checkpoints(folder)):
        raise CheckpointError(f"there is no checkpoint in {folder}; give a folder that a checkpoint was saved to")
    return found[-1]


def about_checkpoint(folder: Path) -> dict[str, Any]:
    """epoch, step, and what was measured. The tensors are not read."""
    path = folder / CHECKPOINT_FILE
    with path.open("rb") as file:
        about = _read_record(path, file)["about"]
    return {**about, "measured": _unpack(about["measured"], {})}


class Checkpoint:
    """What was read from a folder.

    Attributes:
        state: as `save_checkpoint` puts it together.
        preprocessing: that given to it.
    """

    def __init__(self, path: Path, state: dict[str, Any], preprocessing: dict[str, Any] | None) -> None:
        self.path, self.state, self.preprocessing = path, state, preprocessing

    @classmethod
    def read(cls, folder: Path) -> Checkpoint:
        """Raises CheckpointError if the file is damaged, or of a format that is not known."""
        path = folder / CHECKPOINT_FILE
        content = path.read_bytes()  # once: another process may put a new file in its place
        record = _read_record(path, BytesIO(content))
        try:
            tensors = load(content)
        except SafetensorError as error:
            raise _damaged(path, error) from None
        if tensors_digest(tensors) != record["tensors_sha256"]:
            raise _damaged(path, "the tensors do not match their checksum")
        return cls(
            path, {key: _unpack(value, tensors) for key, value in record["state"].items()}, record["preprocessing"]
        )

    def check(self, trainer: Trainer, fit: Fit | None) -> None:
        """Whether a Trainer, and a fit that begins, can go on from here. None: without a fit.

        Raises:
            CheckpointError: the model, the optimiser or the callbacks are others, or the rows inside an epoch.
        """
        problems = _model_problems(trainer.model, self.state["model"])
        problems += _optimizer_problems(trainer.optimizer, self.state["optimizer"])
        if (trainer.update.scaler is None) != (self.state["scaler"] is None):
            problems.append("its precision is fp16 and the Trainer's is not, or the other way round")
        if fit is not None:
            problems += self._place_problems(fit)
            given = [type(callback).__name__ for callback in fit.callbacks]
            for name, _ in self.state["callbacks"]:
                if name in given:
                    given.remove(name)
                else:
                    problems.append(f"it has the state of {name}, and fit is given none or fewer")
        if problems:
            raise CheckpointError(
                f"{self.path} does not fit, and nothing was loaded: {'; '.join(problems)}; make the Trainer as the one "
                "that saved it"
            )

    def apply(self, trainer: Trainer, callbacks: Sequence[Callback] | None) -> Position:
        """Give a checked Trainer, and the callbacks, what was saved; where the fit was."""
        state = self.state
        left = [*(callbacks or ())]
        for name, saved in state["callbacks"] if callbacks is not None else ():
            callback = next(callback for callback in left if type(callback).__name__ == name)
            left.remove(callback)
            callback.load_state_dict(saved)
        optimizer = {key: value for key, value in state["optimizer"].items() if key != "class"}
        trainer.optimizer.load_state_dict(optimizer)
        trainer.model.load_state_dict(state["model"])
        if trainer.update.scaler is not None:
            trainer.update.scaler.load_state_dict(state["scaler"])
        trainer.update.steps.taken = state["steps"]
        trainer.history = History()
        trainer.history.epoch, trainer.history.history = state["history"]["epoch"], state["history"]["history"]
        trainer.random_numbers.load(state["random"], next(trainer.model.parameters()).device)
        return Position(**state["position"])

    def _place_problems(self, fit: Fit) -> list[str]:
        step, rows, batch_size = self.state["position"]["step"], self.state["rows"], self.state["batch_size"]
        if step == 0 or (fit.rows, fit.batch_size) == (rows, batch_size):
            return []
        return [
            f"it was saved inside an epoch of {rows} rows in batches of {batch_size}, and fit is given {fit.rows} in "
            f"batches of {fit.batch_size}"
        ]


def _model_problems(model: nn.Module, saved: dict[str, Any]) -> list[str]:
    expected = model.state_dict()
    problems = [f"{name} is missing in it" for name in expected if name not in saved]
    problems += [f"{name} is not part of the model" for name in saved if name not in expected]
    for name, tensor in expected.items():
        if not isinstance(tensor, Tensor) or not isinstance(saved.get(name), Tensor):
            continue
        there = saved[name]
        if there.shape != tensor.shape:
            problems.append(f"{name} is {list(there.shape)} in it and {list(tensor.shape)} in the model")
        elif there.dtype != tensor.dtype:
            problems.append(f"{name} is {there.dtype} in it and {tensor.dtype} in the model")
    return problems


def _optimizer_problems(optimizer: Optimizer, saved: dict[str, Any]) -> list[str]:
    if saved["class"] != type(optimizer).__name__:
        return [f"its optimiser is {saved['class']} and the Trainer's is {type(optimizer).__name__}"]
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    there = [len(group["params"]) for group in saved["param_groups"]]
    if sizes != there:
        return [f"its optimiser has groups of {there} parameters and the Trainer's of {sizes}"]
    return []


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON can hold it; its tensors go to `tensors`, under names that begin with `name`."""
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, (np.generic, float)):
        number = value.item() if isinstance(value, np.generic) else value
        return number if not isinstance(number, float) or math.isfinite(number) else {"$float": repr(number)}
    if isinstance(value, Tensor):
        tensors[name] = value.detach()
        return {"$tensor": name}
    if isinstance(value, dict):
        items = [[_pack(key, name, tensors), _pack(part, f"{name}.{key}", tensors)] for key, part in value.items()]
        return {"$dict": items}
    if isinstance(value, (list, tuple)):
        parts = [_pack(part, f"{name}.{i}", tensors) for i, part in enumerate(value)]
        return parts if isinstance(value, list) else {"$tuple": parts}
    raise CheckpointError(
        f"{name} is a {type(value).__name__}, which a checkpoint cannot hold; make it of dicts, lists, tuples, "
        "numbers, text, None and tensors"
    )


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """What `_pack` was given."""
    if isinstance(value, list):
        return [_unpack(part, tensors) for part in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "$tensor":
        return tensors[content]
    if kind == "$float":
        return float(content)
    if kind == "$tuple":
        return tuple(_unpack(part, tensors) for part in content)
    return {_unpack(key, tensors): _unpack(part, tensors) for key, part in content}


def _read_record(path: Path, file: BinaryIO) -> dict[str, Any]:
    """The checked metadata of a safetensors file, without its own checksum."""
    try:
        length = int.from_bytes(file.read(8), "little")  # of the header, which is JSON
        metadata = json.loads(file.read(length)).get("__metadata__", {}) if length < _LONGEST_HEADER else None
    except (ValueError, AttributeError) as error:
        raise _damaged(path, error) from None
    if metadata is None:
        raise _damaged(path, "it is no safetensors file")
    if _METADATA_KEY not in metadata:
        raise CheckpointError(f"{path} was not written by fastenc; give a folder that a checkpoint was saved to")
    try:
        return unseal(metadata[_METADATA_KEY], path, FORMAT_VERSION)
    except OtherFormatError as error:
        raise CheckpointError(str(error)) from None
    except ValueError as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, why: object) -> CheckpointError:
    return CheckpointError(f"{path} is truncated or damaged ({why}); go on from another checkpoint")
