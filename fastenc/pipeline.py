"""Files, preprocessing and model put together: what the command line's commands share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .data import Data, DataError, Prepared, Preprocessor, as_rows, load
from .pretrained import MODEL_FILE, load_preprocessing, load_pretrained
from .record import fingerprint, split_rows

CHUNK_ROWS = 16_384
MIN_EVALUATION_ROWS = 4
OWN_SPLIT = 0.3  # share that is scored where the model has no held-out rows in the data
OWN_SEED = 0


def check_model_folder(folder: Path) -> None:
    """Refuse a folder to train into that holds something else than a fastenc model, before any training is done."""
    if folder.is_dir():
        if (folder / MODEL_FILE).exists():
            load_preprocessing(folder)
        elif any(folder.iterdir()):
            raise DataError(f"{folder} holds something else than a fastenc model; give a new or empty folder to --out")
    elif folder.exists():
        raise DataError(f"{folder} is a file; give a folder to --out")
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(parent, os.W_OK):
        raise DataError(f"{parent} cannot be written to; change its permissions, or give another folder to --out")


@contextmanager
def naming(source: str) -> Iterator[None]:
    """Puts the name of the file before an error in what it holds."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{source}: {error}") from error


def load_labelled(source: str, target: str | None, remembered: str | None) -> Data:
    """The data with its labels: those in `target` or, if that is None and there is such a column, in `remembered`."""
    data = load(source, target=target)
    if data.target is None and target is None and remembered in getattr(data.features, "columns", ()):
        with naming(source):
            return replace(load(data.features, target=remembered), name=data.name)
    return data


def take(features: Any, rows: np.ndarray) -> Any:
    """Some rows of an array or a DataFrame."""
    return features[rows] if isinstance(features, np.ndarray) else features.iloc[rows]


class SavedModel:
    """A model folder, loaded.

    Attributes:
        model: in eval mode.
        encoder: the part of it that makes the codes.
        preprocessor: what its inputs need; None if it was saved without.
    """

    def __init__(self, folder: Path) -> None:
        self.model: nn.Module = load_pretrained(folder)
        self.encoder: Any = getattr(self.model, "encoder", self.model)
        state = load_preprocessing(folder)
        with naming(str(folder)):
            self.preprocessor = None if state is None else Preprocessor.from_dict(state)

    def prepare(self, source: str, features: Any) -> Prepared:
        """`features` as float32 rows for the model; DataError names `source`."""
        with naming(source):
            if self.preprocessor is not None:
                return self.preprocessor.transform(features)
            x = as_rows(features, name="the data", features=self.encoder.in_features, writable=False).numpy()
            # What shares memory with a read-only map must say so: to write to it would end the process.
            x.flags.writeable = not (isinstance(features, np.ndarray) and not features.flags.writeable)
            return Prepared(x, np.arange(len(x)), dropped=0, unseen=0)

    def prepare_blocks(self, source: str, features: Any) -> Iterator[Prepared]:
        """The same in blocks of rows one after the other, so that a memory map need not be whole in memory."""
        if self.preprocessor is None:
            yield self.prepare(source, features)
            return
        with naming(source):
            yield from self.preprocessor.transform_chunks([features])

    def codes(self, x: np.ndarray) -> Iterator[np.ndarray]:
        """float32 `[rows, features]` to codes, float32 `[rows of a chunk, code size]`, chunk by chunk."""
        return run_in_chunks(self.encoder, x)

    def reconstruction(self, x: np.ndarray) -> np.ndarray | None:
        """What the decoder makes of the codes of `x`, float32 of its shape; None if the model has no decoder."""
        return np.concatenate(list(run_in_chunks(self.model, x))) if hasattr(self.model, "decode") else None


def run_in_chunks(model: nn.Module, x: np.ndarray) -> Iterator[np.ndarray]:
    """`model` on `x`, float32 `[rows, features]`, some rows at a time, without gradients; gives float32 arrays."""
    parameter = next(model.parameters())
    for start in range(0, len(x), CHUNK_ROWS):
        with torch.inference_mode():
            rows = np.require(
                x[start : start + CHUNK_ROWS], requirements="W"
            )  # of a read-only map, one chunk is copied
            chunk = torch.from_numpy(rows).to(parameter.device, parameter.dtype)
            out = model(chunk).float().cpu().numpy()
        yield out


def rows_to_score(prepared: Prepared, record: dict[str, Any] | None, source: str) -> tuple[np.ndarray, np.ndarray, str]:
    """Which rows of `prepared` to fit the comparisons on, which to score, and a sentence that says why.

    With the data that the model was trained on, the rows it was trained on and those that were held out; else a split
    of its own.
    """
    rows = len(prepared.x)
    if rows < MIN_EVALUATION_ROWS:
        raise DataError(f"{source} has {rows} usable rows and evaluate needs at least {MIN_EVALUATION_ROWS}; add some")
    trained_on = record is not None and record["data_sha256"] == fingerprint(prepared.x)
    if record is not None and trained_on:
        _, held_out = split_rows(record["rows"], record["held_out"], record["seed"])
        is_held_out = np.isin(prepared.rows, held_out)
        fit_rows, score_rows = np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
        if len(score_rows):
            why = (
                f"{source} is what the model was trained on. Scored on the {len(score_rows)} rows that were held out; "
                f"PCA and the classifiers are fitted on the other {len(fit_rows)}, as the model was."
            )
            return fit_rows, score_rows, why
    fit_rows, score_rows = split_rows(rows, OWN_SPLIT, OWN_SEED)
    why = (
        f"Scored on {len(score_rows)} rows of {source}, chosen at random; PCA and the classifiers are fitted on the "
        f"other {len(fit_rows)}."
    )
    if trained_on:
        why += " The model was trained on all of them, which flatters it: evaluate it on other data."
    elif record is None:
        why += " Whether the model was trained on any of them is not known."
    return fit_rows, score_rows, why
