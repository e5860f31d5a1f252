"""Files that are whole at any moment: written beside the old one and put in its place, with checksums."""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_ABANDONED_AFTER = 3600.0  # seconds; a temporary this old belongs to a save that was killed


class OtherFormatError(Exception):
    """A file in a format that this version does not read; the message says what to do."""


def canonical(record: dict[str, Any]) -> str:
    return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)


def text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def seal(record: dict[str, Any]) -> str:
    """A record, which has a `format_version`, as JSON with its own checksum.

    Raises:
        TypeError, ValueError: JSON cannot hold it.
    """
    record = json.loads(canonical(record))  # tuples to lists, keys to text: what `unseal` will see
    return canonical({**record, "sha256": text_digest(canonical(record))})


def unseal(text: str, path: Path, format_version: int) -> dict[str, Any]:
    """The record that `seal` made `text` of, found in the file `path`.

    Raises:
        OtherFormatError: it is of another format than `format_version`; the message is a sentence.
        ValueError: it is damaged; the message says how.
    """
    try:
        record = json.loads(text)
        version = record["format_version"]
        if version != format_version:
            cure = "upgrade fastenc" if version > format_version else "load it with the fastenc that saved it"
            raise OtherFormatError(
                f"{path} has format version {version} and this fastenc reads {format_version}; {cure}"
            )
        checksum = record.pop("sha256")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(str(error)) from error
    if checksum != text_digest(canonical(record)):
        raise ValueError("the record does not match its checksum")
    return record


def tensors_digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same on the CPU, contiguous, no two in one storage, as safetensors wants them."""
    storages = set()
    separate = {}
    for name, tensor in tensors.items():
        tensor = tensor.cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return separate


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path in the folder of `path` that takes its place at the end, or goes if there was an error.

    Raises:
        OSError: the disk is full or not writable; it names `path`, which is then as it was.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        what = f"{error.strerror}; the file there is as it was: free some space or choose another folder"
        raise OSError(error.errno, what, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write to a temporary in the same folder, flush it to the disk, rename it. A failure leaves `path` as it was."""
    with replacing(path) as temporary, temporary.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if os.name == "posix":  # Windows cannot open a folder to flush it
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_abandoned(folder: Path, names: Iterable[str]) -> None:
    """Remove the temporaries of `names` that writers who were killed have left in `folder`."""
    for name in names:
        for temporary in folder.glob(f".{name}.*.tmp"):
            with suppress(FileNotFoundError):  # another process may be at the same work
                if time.time() - temporary.stat().st_mtime > _ABANDONED_AFTER:
                    temporary.unlink()
