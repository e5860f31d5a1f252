"""Files larger than memory to rows to train on: learned from, prepared and split chunk by chunk."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from .data import Chunks, DataError, Preprocessor
from .pipeline import naming, take
from .record import Fingerprint, split_rows

IN_MEMORY = 1 << 27  # bytes of rows; more are on disk


class RowStore:
    """Rows that come block by block, and are kept in memory or, where they are many, in a file.

    The file lies in `folder`, has no name, and is gone with the process, however that ends.
    """

    def __init__(self, features: int, folder: Path) -> None:
        self._features, self._folder = features, folder
        self._blocks: list[np.ndarray] = []
        self._file: IO[bytes] | None = None
        self._rows = 0

    def add(self, x: np.ndarray) -> None:
        """Some more rows, float32 `[rows, features]`; OSError if the disk is full."""
        self._rows += len(x)
        self._blocks.append(x)
        if self._file is None and self._rows * self._features * 4 > IN_MEMORY:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
        if self._file is not None:
            try:
                for block in self._blocks:
                    self._file.write(np.ascontiguousarray(block).data)
            except OSError as error:
                what = f"{error.strerror}; the prepared rows take {self._rows * self._features * 4} bytes and more"
                raise OSError(error.errno, what, str(self._folder)) from error
            self._blocks = []

    def rows(self) -> np.ndarray:
        """All of them, float32 `[rows, features]`: an array, or a map of the file that may be written to."""
        if self._file is not None:
            self._file.flush()
            with self._file:  # the map keeps it
                return np.memmap(self._file, np.float32, "r+", shape=(self._rows, self._features))
        empty = np.empty((0, self._features), np.float32)
        return np.concatenate([empty, *self._blocks])


@dataclass(frozen=True, eq=False)
class TrainingRows:
    """Prepared rows, split.

    x, x_held_out    float32 [rows, features], to train on and not to train on; both maybe maps of files
    preprocessor     learned from the rows of x
    rows             how many rows the source has; of these `dropped` are in neither
    unseen           how many texts were in no category
    fingerprint      of all prepared rows, in the order of the source
    """

    x: np.ndarray
    x_held_out: np.ndarray
    preprocessor: Preprocessor
    rows: int
    dropped: int
    unseen: int
    fingerprint: str


def prepare_in_chunks(
    data: str, chunks: Chunks, preprocessor: Preprocessor, folder: Path, held_out: float, seed: int
) -> TrainingRows:
    """Read the source twice: learn from the rows to train on, then prepare and split all of them.

    Args:
        data: what to call the source in errors.
        preprocessor: new; it learns here.
        folder: where rows go that are too many for memory.
        held_out, seed: as of `split_rows`.

    Raises:
        DataError: bad data, or a split that leaves nothing to train on.
        OSError: no room in the folder.
    """
    rows = len(chunks)
    kept, others = split_rows(rows, held_out, seed)
    if len(kept) == 0:
        raise DataError(f"{data} has {rows} rows and --validation-split takes all of them; lower it")
    is_held_out = np.zeros(rows, bool)
    is_held_out[others] = True
    del kept, others
    start = 0
    with naming(data):
        for chunk in chunks:
            training = np.flatnonzero(~is_held_out[start : start + len(chunk)])
            if len(training):
                preprocessor.partial_fit(take(chunk.features, training), row_numbers=start + training)
            start += len(chunk)
        features = len(preprocessor.feature_names)
        stores = RowStore(features, folder), RowStore(features, folder)
        digest, dropped, unseen = Fingerprint(), 0, 0
        for block in preprocessor.transform_chunks(chunk.features for chunk in chunks):
            digest.add(block.x)
            for store, chosen in zip(stores, (~is_held_out[block.rows], is_held_out[block.rows]), strict=True):
                store.add(block.x[chosen])
            dropped, unseen = dropped + block.dropped, unseen + block.unseen
    x, x_held_out = (store.rows() for store in stores)
    return TrainingRows(x, x_held_out, preprocessor, rows, dropped, unseen, digest.hexdigest())
