"""How a model was trained: `training.json` beside it, so that it can be judged on rows that it was not trained on."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from .pretrained import MODEL_FILE

RECORD_FILE = "training.json"


def split_rows(rows: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random row numbers `0..rows-1` in two parts, `(kept, held out)`; `fraction` of them, rounded, are held out.

    The same arguments give the same parts with any version of numpy, which is why this is numpy's frozen RandomState.
    """
    order = np.random.RandomState(seed).permutation(rows)
    held_out = round(rows * fraction)
    return order[held_out:], order[:held_out]


class Fingerprint:
    """sha256 of rows that come one block after the other: the same for any blocks, and from any format of file."""

    def __init__(self) -> None:
        self._digest, self._shape = hashlib.sha256(), (0, 0)

    def add(self, x: np.ndarray) -> None:
        """Some more rows, float32 `[rows, features]`."""
        self._digest.update(np.ascontiguousarray(x).data)
        self._shape = (self._shape[0] + len(x), x.shape[1])

    def hexdigest(self) -> str:
        whole = self._digest.copy()
        whole.update(f" float32 {self._shape}".encode())
        return whole.hexdigest()


def fingerprint(x: np.ndarray) -> str:
    """The Fingerprint of all rows at once."""
    digest = Fingerprint()
    digest.add(x)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_record(
    folder: str | os.PathLike[str],
    data: str,
    *,
    rows: int,
    held_out: float,
    seed: int,
    target: str | list[str] | None,
    history: dict[str, list[float]],
    classes: list[str] | dict[str, list[str] | None] | None = None,
    private: dict[str, Any] | None = None,
) -> None:
    """Write how the model that lies in `folder` was trained beside it, tied to the model's bytes.

    Call it after `save_pretrained`. If it never comes to that, the record there is another model's and is not believed.

    Args:
        data: the fingerprint of all rows after preprocessing.
        rows: of the source, before preprocessing dropped any.
        held_out, seed: `split_rows(rows, held_out, seed)` are the rows that were trained on and those that were not.
        target: the column of labels, or several.
        history: of the Trainer.
        classes: of a Classifier, what its outputs stand for; of a MultiTask, those of each task.
        private: of private training, what was spent; see `PrivateFit.to_dict`.
    """
    folder = Path(folder)
    temporary = folder / f".{RECORD_FILE}.{os.getpid()}.tmp"
    try:
        record = {"model_sha256": file_sha256(folder / MODEL_FILE), "rows_sha256": data, "rows": rows}
        record |= {"held_out": held_out, "seed": seed, "target": target, "history": history}
        record |= {} if classes is None else {"classes": classes}
        record |= {} if private is None else {"private": private}
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, folder / RECORD_FILE)
    finally:
        temporary.unlink(missing_ok=True)


def read_record(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The record of the model in `folder`; None if there is none, or if it is not this model's."""
    folder = Path(folder)
    try:
        record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        known = "rows_sha256" in record and record["model_sha256"] == file_sha256(folder / MODEL_FILE)
        return record if known else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
