"""Files larger than memory: their rows in chunks, and batches of them to train on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from .arrays import DataError, as_rows, as_target
from .extras import require
from .preprocessing import Preprocessor
from .sources import Data, check_header, csv_fault, load, split_target

CHUNK_ROWS = 1 << 16
_FIRST_BLOCK = 1 << 24  # bytes of a CSV that its columns' types are found from


def read_chunks(source: str | os.PathLike[str], *, target: str | None = None, rows: int = CHUNK_ROWS) -> Iterator[Data]:
    """The rows of a .csv, .parquet or .npy file, at most `rows` at a time; memory holds one chunk, or one row group.

    Numbers of a .csv are read as float64. What a column holds is found from the first 16 MB; one that is text further
    on is refused.

    Raises:
        DataError: as `load`, some of it only when the row that shows it is reached.
        ValueError: rows is below 1.
    """
    if rows < 1:
        raise ValueError(f"rows is {rows!r}; it must be at least 1")
    path = Path(source)
    reader = {".csv": _csv_tables, ".parquet": _parquet_tables}.get(path.suffix.lower())
    if reader is None or not path.is_file() or path.stat().st_size == 0:
        data = load(path, target=target)  # a memory map, or the sentence that says what is wrong
        for start in range(0, len(data), rows):
            yield Data(data.name, data.features[start : start + rows])
        return
    require("pandas", "reading tables")
    for table in reader(path, rows):
        if table.num_rows:
            yield split_target(table.to_pandas(), target, path.name, str(path))


def _parquet_tables(path: Path, rows: int) -> Iterator[Any]:
    pyarrow, parquet = require("pyarrow", "reading Parquet"), require("pyarrow.parquet", "reading Parquet")
    try:
        with parquet.ParquetFile(path) as file:
            if file.metadata.num_rows == 0:
                raise DataError(f"{path} has no rows; give at least one")
            for batch in file.iter_batches(rows):
                yield pyarrow.Table.from_batches([batch])
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise DataError(f"{path} is not Parquet, or is broken ({reason}); write or copy it again") from error


def _csv_tables(path: Path, rows: int) -> Iterator[Any]:
    pyarrow, reader = require("pyarrow", "reading CSV"), require("pyarrow.csv", "reading CSV")

    def opened(types: dict[str, Any]) -> Any:
        return reader.open_csv(
            path,
            read_options=reader.ReadOptions(block_size=_FIRST_BLOCK),
            parse_options=reader.ParseOptions(newlines_in_values=True),
            convert_options=reader.ConvertOptions(strings_can_be_null=True, column_types=types),
        )

    try:
        with opened({}) as file:
            schema = file.schema
        check_header(schema.names, path)
        # A whole number in the first block may be a fraction in the next.
        types = {field.name: pyarrow.float64() for field in schema if pyarrow.types.is_integer(field.type)}
        seen = 0
        with opened(types) as file:
            for batch in file:
                seen += batch.num_rows
                for start in range(0, batch.num_rows, rows):
                    yield pyarrow.Table.from_batches([batch.slice(start, rows)])
        if seen == 0:
            raise DataError(f"{path} has a header and no rows; add at least one row")
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path} {csv_fault(path, error)}") from error


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
        self.source, self.preprocessor, self.target = source, preprocessor, target
        self.batch_size, self.rows, self.shuffle = batch_size, rows, shuffle
        self._random = np.random.default_rng(seed)

    def loader(self) -> DataLoader:
        return DataLoader(self, batch_size=None)

    def __iter__(self) -> Iterator[Any]:
        start = 0
        for chunk in read_chunks(self.source, target=self.target, rows=self.rows):
            try:
                x, y = self._tensors(chunk)
            except DataError as error:
                raise DataError(f"{self.source}, in rows {start} to {start + len(chunk) - 1}: {error}") from error
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
