"""Files that are whole at any moment: written beside the old one and put in its place, with checksums."""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_ABANDONED_AFTER = 3600.0  # seconds; a temporary this old belongs to a save that was killed


def canonical(record: dict[str, Any]) -> str:
    return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)


def text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


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


def write_atomically(path: Path, content: bytes) -> None:
    """Write to a temporary in the same folder, flush it to the disk, rename it. A failure leaves `path` as it was."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        what = f"{error.strerror}; the file there is as it was: free some space or choose another folder"
        raise OSError(error.errno, what, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
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
