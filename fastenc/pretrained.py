"""Saving a model to a folder and loading it back.

`model.safetensors` is the whole truth: the tensors and, in its metadata, the class, the config and the preprocessing,
each under a checksum. One file means that one rename makes a save atomic. `config.json` and `preprocessing.json` are
copies for people to read; they are written after it and never read back.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from .files import OtherFormatError, remove_abandoned, seal, separate, tensors_digest, unseal, write_atomically

MODEL_FILE = "model.safetensors"
CONFIG_COPY = "config.json"
PREPROCESSING_COPY = "preprocessing.json"
FORMAT_VERSION = 1
_METADATA_KEY = "fastenc"


class ModelFileError(ValueError):
    """A model folder that cannot be saved to or loaded from; the message says why and what to do."""


class Pretrained:
    """Mixin for `nn.Module`s with `get_config()` (JSON) and `from_config`, which saves them to a folder and loads them.

    All state must be in parameters and persistent buffers, because a loaded model is built without memory and then
    given the saved tensors.
    """

    def get_config(self) -> dict[str, Any]:
        """What `from_config` needs to build this model again, as JSON can hold it."""
        raise NotImplementedError(f"{type(self).__name__} needs a get_config() to be saved")

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        return cls(**config)

    def save_pretrained(self, folder: str | os.PathLike[str], *, preprocessing: dict[str, Any] | None = None) -> None:
        """Save the model, and the preprocessing its inputs need, to `folder` (made if absent).

        The old model stays loadable until the new one is complete on disk: killed or out of disk at any moment, the
        folder holds one or the other. Parameters that are one tensor (tied) are written once and tied again on load.

        Args:
            folder: where `model.safetensors`, `config.json` and `preprocessing.json` go.
            preprocessing: a dict that JSON can hold; `load_preprocessing` gives it back.

        Raises:
            ModelFileError: the folder is a file, the model does not match its config, or preprocessing is not JSON.
            OSError: the disk is full or not writable. Once the new model is in place only the copies can be missing.
        """
        assert isinstance(self, nn.Module)
        tensors = {name: tensor.detach() for name, tensor in self.state_dict().items()}
        _check_config(self, tensors)
        tied = _tied_names(self)
        tensors = separate({name: tensor for name, tensor in tensors.items() if name not in tied})
        record: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "class": type(self).__name__,
            "config": self.get_config(),
            "preprocessing": preprocessing,
            "tied": tied,
            "tensors_sha256": tensors_digest(tensors),
        }
        try:
            metadata = {_METADATA_KEY: seal(record)}
        except (TypeError, ValueError) as error:
            raise ModelFileError(f"config and preprocessing must be what JSON can hold: {error}") from error

        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ModelFileError(f"{folder} is, or lies under, a file; give a folder to save the model to") from None
        write_atomically(folder / MODEL_FILE, save(tensors, metadata))
        _write_copy(folder / CONFIG_COPY, {"class": record["class"], **record["config"]})
        _write_copy(folder / PREPROCESSING_COPY, record["preprocessing"])
        remove_abandoned(folder, (MODEL_FILE, CONFIG_COPY, PREPROCESSING_COPY))

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], *, device: torch.device | str | None = None) -> Any:
        """Load the model that `save_pretrained` wrote, in eval mode, in the dtype it was saved in.

        Args:
            folder: the folder given to `save_pretrained`.
            device: where the parameters go; None is the CPU.

        Raises:
            ModelFileError: the folder holds no intact model of this class; the message says what to do.
        """
        return load_as(Path(folder), device, {cls.__name__: cls})[0]


def load_preprocessing(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The preprocessing saved with the model in `folder`, or None. The tensors are not read.

    Where another process may save to the folder, `load_with_preprocessing` gives it with its model.

    Raises:
        ModelFileError: as `Pretrained.from_pretrained`.
    """
    path = _model_path(Path(folder))
    try:
        with safe_open(path, "pt") as file:
            return _read_record(path, file.metadata())["preprocessing"]
    except SafetensorError as error:
        raise _damaged(path, error) from None


def load_as(
    folder: Path, device: torch.device | str | None, classes: dict[str, type]
) -> tuple[Any, dict[str, Any] | None]:
    """The model in `folder`, which is of one of `classes`, by name, and its preprocessing, both of one save.

    Raises:
        ModelFileError: as `Pretrained.from_pretrained`.
    """
    path = _model_path(folder)
    while True:
        before = _identity(path)
        try:
            return _load_once(path, device, classes)
        except ModelFileError:
            # safetensors opens the file twice, for the header and for the tensors: it may have been replaced between.
            if _identity(path) == before:
                raise


def _identity(path: Path) -> tuple[int, ...]:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _load_once(
    path: Path, device: torch.device | str | None, classes: dict[str, type]
) -> tuple[Any, dict[str, Any] | None]:
    try:
        with safe_open(path, "pt") as file:
            record = _read_record(path, file.metadata())
            name = record["class"]
            if name not in classes:
                raise ModelFileError(f"{path} holds a model of class {name}; load it with {name}.from_pretrained")
            # Copies, and the checksum is of the copies: what was checked is what is used, though the file change.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise _damaged(path, error) from None
    if tensors_digest(tensors) != record["tensors_sha256"]:
        raise _damaged(path, "the tensors do not match their checksum")
    tensors.update({alias: tensors[kept] for alias, kept in record["tied"].items() if kept in tensors})
    try:
        with torch.device("meta"):  # no memory, no random numbers
            model = classes[name].from_config(record["config"])  # type: ignore[attr-defined]
    except (TypeError, KeyError, ValueError) as error:
        raise ModelFileError(
            f"{path}: its config does not build {name} with this version of fastenc ({error}); "
            "load it with the version that saved it"
        ) from error
    if difference := _difference(model.state_dict(), tensors):
        raise ModelFileError(f"{path} does not fit its own config: {difference}; save the model again")
    model.load_state_dict(tensors, assign=True)
    for alias, kept in record["tied"].items():
        _set_parameter(model, alias, model.get_parameter(kept))
    return model.to(device or "cpu").eval(), record["preprocessing"]


def _model_path(folder: Path) -> Path:
    path = folder / MODEL_FILE
    if not folder.exists():
        raise ModelFileError(f"there is no folder {folder}; give the folder that save_pretrained wrote")
    if not path.is_file():
        raise ModelFileError(f"there is no {MODEL_FILE} in {folder}; give the folder that save_pretrained wrote")
    with path.open("rb") as file:
        head = file.read(9)
    # The ninth byte of a safetensors file is the brace that opens its header; the first eight can be anything.
    if head[8:] != b"{" and (head[:1] == b"\x80" or head[:2] == b"PK"):
        raise ModelFileError(
            f"{path} is a pickle, which can run code when it is loaded, so it was not opened; "
            "load it where you trust it and save it with save_pretrained"
        )
    return path


def _read_record(path: Path, metadata: dict[str, str] | None) -> dict[str, Any]:
    """The checked metadata, without its own checksum."""
    if not metadata or _METADATA_KEY not in metadata:
        raise ModelFileError(f"{path} was not written by fastenc; give a folder that save_pretrained wrote")
    try:
        return unseal(metadata[_METADATA_KEY], path, FORMAT_VERSION)
    except OtherFormatError as error:
        raise ModelFileError(str(error)) from None
    except ValueError as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, why: object) -> ModelFileError:
    return ModelFileError(f"{path} is truncated or damaged ({why}); restore it from a backup or save the model again")


def _check_config(model: Any, tensors: dict[str, Tensor]) -> None:
    """Refuse to write what could not be loaded: a model that was changed after it was built."""
    with torch.device("meta"):
        rebuilt = type(model).from_config(model.get_config())
    if difference := _difference(rebuilt.state_dict(), tensors):
        raise ModelFileError(
            f"this {type(model).__name__} is no longer what its config describes: {difference}; "
            "undo what was changed in it, or save its state_dict() with safetensors"
        )


def _difference(expected: dict[str, Tensor], tensors: dict[str, Tensor]) -> str:
    for name in expected:
        if name not in tensors:
            return f"{name} is missing"
        if expected[name].shape != tensors[name].shape:
            return f"{name} is {list(tensors[name].shape)}, not {list(expected[name].shape)}"
    extra = [name for name in tensors if name not in expected]
    return f"{extra[0]} is not part of it" if extra else ""


def _tied_names(model: nn.Module) -> dict[str, str]:
    """alias -> the first name of the same parameter."""
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        kept = first.setdefault(id(parameter), name)
        if kept != name:
            tied[name] = kept
    return tied


def _set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, parameter)


def _write_copy(path: Path, content: dict[str, Any] | None) -> None:
    if content is None:
        path.unlink(missing_ok=True)  # of an earlier save
    else:
        write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())
