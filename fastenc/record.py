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


def fingerprint(x: np.ndarray) -> str:
    """sha256 of the shape and the bytes of an array; rows read again from another file format give the same."""
    digest = hashlib.sha256(f"{x.dtype.str} {x.shape}".encode())
    digest.update(np.ascontiguousarray(x).data)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_record(
    folder: str | os.PathLike[str],
    x: np.ndarray,
    *,
    rows: int,
    held_out: float,
    seed: int,
    target: str | None,
    history: dict[str, list[float]],
    classes: list[str] | None = None,
) -> None:
    """Write how the model that lies in `folder` was trained beside it, tied to the model's bytes.

    Call it after `save_pretrained`. If it never comes to that, the record there is another model's and is not believed.

    Args:
        x: all rows after preprocessing, float32; only their fingerprint is kept.
        rows: of the source, before preprocessing dropped any.
        held_out, seed: `split_rows(rows, held_out, seed)` are the rows that were trained on and those that were not.
        target: the column of labels.
        history: of the Trainer.
        classes: of a Classifier, what its outputs stand for.
    """
    folder = Path(folder)
    temporary = folder / f".{RECORD_FILE}.{os.getpid()}.tmp"
    try:
        record = {"model_sha256": file_sha256(folder / MODEL_FILE), "data_sha256": fingerprint(x), "rows": rows}
        record |= {"held_out": held_out, "seed": seed, "target": target, "history": history}
        record |= {} if classes is None else {"classes": classes}
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, folder / RECORD_FILE)
    finally:
        temporary.unlink(missing_ok=True)


def read_record(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The record of the model in `folder`; None if there is none, or if it is not this model's."""
    folder = Path(folder)
    try:
        record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        return record if record["model_sha256"] == file_sha256(folder / MODEL_FILE) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
