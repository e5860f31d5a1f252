"""Files larger than memory: their rows in chunks, and batches of them to train on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from .arrays import DataError, as_rows, as_target
from .extras import require
from .preprocessing import Preprocessor
from .sources import Data, load, split_target
from .tables import CsvTables, ParquetTables

CHUNK_ROWS = 1 << 16
_CHUNK_VALUES = 1 << 22  # of all columns: 32 MB as float64


class Chunks:
    """The rows of a source some at a time, as often as they are asked for; memory holds one chunk, or one row group.

    Args:
        source: "digits", or a .csv, .parquet or .npy file, or a table or array in memory, as `load` takes.
        target: the columns that are targets and not features, as for `load`.
        rows: the most in a chunk; None for as many as have four million values, up to 65,536.

    Attributes:
        name: as of `Data`.
        columns: the names of a table's columns, with those of the targets; None for arrays.

    `len()` is the number of rows; a CSV is read once for it. The columns of a CSV are of the types that `load` gives
    them.

    Raises:
        DataError: as `load`; what only a row shows, when that is reached.
        ValueError: rows is below 1.
    """

    def __init__(self, source: Any, *, target: str | Sequence[str] | None = None, rows: int | None = None) -> None:
        if rows is not None and rows < 1:
            raise ValueError(f"rows is {rows!r}; it must be at least 1")
        self.source, self.target = source, target
        self._tables: CsvTables | ParquetTables | None = None
        self._data: Data | None = None
        if isinstance(source, (str, os.PathLike)) and source != "digits":
            path = Path(source)
            kinds: dict[str, type[CsvTables] | type[ParquetTables]] = {".csv": CsvTables, ".parquet": ParquetTables}
            kind = kinds.get(path.suffix.lower())
            if kind is not None and path.is_file() and path.stat().st_size and os.access(path, os.R_OK):
                require("pandas", "reading tables")
                self._tables = kind(path)
        if self._tables is None:
            self._data = load(source, target=target)  # in memory, a memory map, or the sentence that says what is wrong
        self.name = Path(source).name if self._data is None else self._data.name
        self.columns = self._names()
        self._size = rows or max(1, min(CHUNK_ROWS, _CHUNK_VALUES // max(1, self._width())))

    def __len__(self) -> int:
        return len(self._tables if self._data is None else self._data)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Data]:
        start = 0
        if self._data is not None:
            for start in range(0, len(self._data), self._size):
                yield self._data.part(slice(start, start + self._size))
            return
        assert self._tables is not None
        for batch in self._tables.batches(self._size):
            if batch.num_rows:
                yield split_target(batch.to_pandas(), self.target, self.name, str(self.source), start)
                start += batch.num_rows

    def _names(self) -> list[str] | None:
        if self._data is None:
            return self._tables.names  # type: ignore[union-attr]
        columns = getattr(self._data.features, "columns", None)
        return None if columns is None else [str(column) for column in columns]

    def _width(self) -> int:
        return len(self.columns) if self.columns is not None else self._data.features.shape[1]  # type: ignore[union-attr]


def read_chunks(
    source: str | os.PathLike[str], *, target: str | Sequence[str] | None = None, rows: int | None = CHUNK_ROWS
) -> Iterator[Data]:
    """The rows of a .csv, .parquet or .npy file, at most `rows` at a time: what `Chunks` gives, once.

    Raises:
        DataError, ValueError: as `Chunks`.
    """
    yield from Chunks(source, target=target, rows=rows)


class ChunkedRows(IterableDataset):
    """Batches of a file's prepared rows, as a Dataset that is read anew in each epoch.

    Args:
        source: a .csv, .parquet or .npy file.
        preprocessor: what has learned from its rows, for example by `partial_fit` of `read_chunks`; None for rows that
            are numbers already.
        batch_size: rows of a batch; the last of a chunk has what is left.
        target: the column of numbers or class numbers to give as well.
        rows: of a chunk; they are shuffled among themselves if `shuffle`, in a new order in each epoch.
        seed: makes the orders repeatable.

    Use `loader()` to train: `Trainer.fit(rows.loader())`. What is wrong with a row is a DataError that names the rows.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        preprocessor: Preprocessor | None = None,
        *,
        batch_size: int = 256,
        target: str | None = None,
        rows: int = CHUNK_ROWS,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size!r}; it must be at least 1")
        self.chunks, self.preprocessor = Chunks(source, target=target, rows=rows), preprocessor
        self.batch_size, self.shuffle = batch_size, shuffle
        self._random = np.random.default_rng(seed)

    def loader(self) -> DataLoader:
        return DataLoader(self, batch_size=None)

    def __iter__(self) -> Iterator[Any]:
        start = 0
        for chunk in self.chunks:
            try:
                x, y = self._tensors(chunk)
            except DataError as error:
                raise DataError(
                    f"{self.chunks.source}, in rows {start} to {start + len(chunk) - 1}: {error}"
                ) from error
            start += len(chunk)
            order = torch.from_numpy(self._random.permutation(len(x))) if self.shuffle else torch.arange(len(x))
            for batch in order.split(self.batch_size):
                yield x[batch] if y is None else (x[batch], y[batch])

    def _tensors(self, chunk: Data) -> tuple[Tensor, Tensor | None]:
        if self.preprocessor is None:
            x, kept = as_rows(chunk.features), np.arange(len(chunk))
        else:
            prepared = self.preprocessor.transform(chunk.features)
            x, kept = torch.from_numpy(prepared.x), prepared.rows
        return x, None if chunk.target is None else as_target(chunk.target[kept], len(kept))
