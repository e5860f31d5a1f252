"""Files, preprocessing and model put together: what the command line's commands share."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .data import Chunks, Data, DataError, Prepared, Preprocessor, as_rows
from .data.sources import target_part
from .frontends import Reader, reader_from_dict
from .loading import load_with_preprocessing
from .pretrained import MODEL_FILE, load_preprocessing
from .record import split_rows

CHUNK_ROWS = 16_384
MIN_EVALUATION_ROWS = 4
OWN_SPLIT = 0.3  # share that is scored where the model has no held-out rows in the data
OWN_SEED = 0


def existing_parent(folder: Path) -> Path:
    """The folder above, or the one above that, and so on, that is there."""
    return next(path for path in folder.absolute().parents if path.exists())


def check_model_folder(folder: Path) -> None:
    """Refuse a folder to train into that holds something else than a fastenc model, before any training is done."""
    if folder.is_dir():
        if (folder / MODEL_FILE).exists():
            load_preprocessing(folder)
        elif any(folder.iterdir()):
            raise DataError(f"{folder} holds something else than a fastenc model; give a new or empty folder to --out")
    elif folder.exists():
        raise DataError(f"{folder} is a file; give a folder to --out")
    parent = folder if folder.exists() else existing_parent(folder)
    if not os.access(parent, os.W_OK):
        raise DataError(f"{parent} cannot be written to; change its permissions, or give another folder to --out")


@contextmanager
def naming(source: str) -> Iterator[None]:
    """Puts the name of the file before an error in what it holds."""
    try:
        yield
    except DataError as error:
        if source in str(error):
            raise
        raise DataError(f"{source}: {error}") from error


@contextmanager
def one_sentence() -> Iterator[None]:
    """Options that do not go together are an error of the user's on the command line."""
    try:
        yield
    except ValueError as error:
        raise error if isinstance(error, DataError) else DataError(str(error)) from error


def labels_of(chunks: Chunks, remembered: str | list[str] | None) -> str | None:
    """The column of labels that a model was trained with, of several the first, if there is such a column."""
    first = remembered[0] if isinstance(remembered, list) else remembered
    return first if first in (chunks.columns or ()) else None


def take(features: Any, rows: np.ndarray) -> Any:
    """Some rows of an array or a DataFrame."""
    return features[rows] if isinstance(features, np.ndarray) else features.iloc[rows]


class SavedModel:
    """A model folder, loaded.

    Attributes:
        model: in eval mode.
        encoder: the part of it that makes the codes.
        preprocessor: what its inputs need; None if it was saved without, or if they are no rows of numbers.
        reader: of a model with a front end, what reads its items; None where the inputs are rows.
    """

    def __init__(self, folder: Path) -> None:
        self.model: nn.Module
        self.model, state = load_with_preprocessing(folder)
        self.encoder: Any = getattr(self.model, "encoder", self.model)
        with naming(str(folder)):
            self.reader: Reader | None = None if state is None else reader_from_dict(state)
            self.preprocessor = None if state is None or self.reader is not None else Preprocessor.from_dict(state)

    def prepare(self, source: str, features: Any) -> Prepared:
        """`features` as float32 rows for the model; DataError names `source`."""
        self._check_takes_rows()
        with naming(source):
            if self.preprocessor is not None:
                return self.preprocessor.transform(features)
            return self._as_they_are(features, 0)

    def prepare_chunks(self, source: str, chunks: Iterable[Data]) -> Iterator[tuple[Prepared, Any]]:
        """The same block by block, each with its targets: of a file that need not be whole in memory."""
        self._check_takes_rows()
        start, current = 0, None

        def features() -> Iterator[Any]:
            nonlocal start, current
            for chunk in chunks:
                start, current = start + (0 if current is None else len(current)), chunk
                yield chunk.features

        with naming(source):
            if self.preprocessor is not None:
                blocks = self.preprocessor.transform_chunks(features())
            else:
                blocks = (self._as_they_are(each, start) for each in features())
            for block in blocks:
                assert current is not None
                yield block, target_part(current.target, block.rows - start)

    def _check_takes_rows(self) -> None:
        if self.reader is not None:
            raise DataError(
                f"the model takes items of the kind {self.reader.kind}, not rows of a table; give it their folder or "
                "file on the command line, or see fastenc.frontends"
            )

    def _as_they_are(self, features: Any, start: int) -> Prepared:
        try:
            x = as_rows(features, name="the data", features=self.encoder.in_features, writable=False).numpy()
        except DataError as error:
            if start == 0:
                raise
            raise DataError(f"in rows {start} to {start + len(features) - 1}: {error}") from error
        # What shares memory with a read-only map must say so: to write to it would end the process.
        if isinstance(features, np.ndarray) and not features.flags.writeable:
            x.flags.writeable = False
        return Prepared(x, np.arange(start, start + len(x)), dropped=0, unseen=0)

    def codes(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Blocks of rows, float32 `[rows, features]`, to their codes, float32 `[rows of a chunk, code size]`.

        How the rows are cut into blocks changes no bit of the codes.
        """
        for piece in in_pieces(blocks, CHUNK_ROWS):
            yield from run_in_chunks(self.encoder, piece)


def in_pieces(blocks: Iterable[np.ndarray], rows: int) -> Iterator[np.ndarray]:
    """The rows of blocks of any length in pieces of `rows`, the last of what is left."""
    held: list[np.ndarray] = []
    missing = rows
    for block in blocks:
        while len(block) >= missing:
            held.append(block[:missing])
            yield held[0] if len(held) == 1 else np.concatenate(held)
            held, block, missing = [], block[missing:], rows
        if len(block):
            held.append(block)
            missing -= len(block)
    if held:
        yield np.concatenate(held)


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


def rows_to_score(
    rows: np.ndarray, fingerprint: str, record: dict[str, Any] | None, source: str
) -> tuple[np.ndarray, np.ndarray, str]:
    """Which of the prepared rows to fit the comparisons on, which to score, and a sentence that says why.

    With the data that the model was trained on, the rows it was trained on and those that were held out; else a split
    of its own. `rows` `[prepared]` are their numbers in the source.
    """
    if len(rows) < MIN_EVALUATION_ROWS:
        raise DataError(
            f"{source} has {len(rows)} usable rows and evaluate needs at least {MIN_EVALUATION_ROWS}; add some"
        )
    trained_on = record is not None and record["rows_sha256"] == fingerprint
    if record is not None and trained_on:
        _, held_out = split_rows(record["rows"], record["held_out"], record["seed"])
        is_held_out = np.isin(rows, held_out)
        fit_rows, score_rows = np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
        if len(score_rows):
            why = (
                f"{source} is what the model was trained on. Scored on the {len(score_rows)} rows that were held out; "
                f"PCA and the classifiers are fitted on the other {len(fit_rows)}, as the model was."
            )
            return fit_rows, score_rows, why
    fit_rows, score_rows = split_rows(len(rows), OWN_SPLIT, OWN_SEED)
    why = (
        f"Scored on {len(score_rows)} rows of {source}, chosen at random; PCA and the classifiers are fitted on the "
        f"other {len(fit_rows)}."
    )
    if trained_on:
        why += " The model was trained on all of them, which flatters it: evaluate it on other data."
    elif record is None:
        why += " Whether the model was trained on any of them is not known."
    return fit_rows, score_rows, why
