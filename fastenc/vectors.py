"""Writing vectors to a file chunk by chunk: .npy, .csv or .parquet, complete or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import IO

import numpy as np

from .data import DataError
from .data.extras import require
from .files import replacing

ENDINGS = (".npy", ".csv", ".parquet")


def check_output(path: Path) -> None:
    """Refuse an output file that could not be written, before any work is done for it."""
    if path.suffix.lower() not in ENDINGS:
        raise DataError(f"{path} does not end in {', '.join(ENDINGS)}; choose one of them for the vectors")
    if path.is_dir():
        raise DataError(f"{path} is a folder; give the name of a file in it, for example {path / 'vectors.npy'}")
    check_folder_of(path)


def check_folder_of(path: Path) -> None:
    """Refuse a file to write in a folder that is not there."""
    if not path.absolute().parent.is_dir():
        raise DataError(f"the folder {path.absolute().parent} does not exist; make it first")


def write_vectors(path: str | os.PathLike[str], chunks: Iterable[np.ndarray]) -> tuple[int, int]:
    """Write one or more chunks of vectors, float32 `[rows, width]` each, one after the other; returns (rows, width).

    .npy holds one array `[rows, width]`; .csv and .parquet have the columns code_0, code_1, ... The file appears under
    its name when all is written; until then, and after an error, what was there before stays.
    """
    path = Path(path)
    check_output(path)
    chunks = iter(chunks)
    first = next(chunks)
    width = first.shape[1]
    write = {".npy": _write_npy, ".csv": _write_csv, ".parquet": _write_parquet}[path.suffix.lower()]
    with replacing(path) as temporary, temporary.open("wb") as file:
        rows = write(file, chain([first], chunks), width)
        file.flush()
        os.fsync(file.fileno())
    return rows, width


def rows_file(path: Path) -> Path:
    """Where the row numbers of the vectors in `path` go: vectors.npy -> vectors.rows.npy."""
    return path.with_name(f"{path.stem}.rows.npy")


def write_row_numbers(path: Path, rows: np.ndarray) -> None:
    """Write int64 `[vectors]`, the source row of each vector in `path`, to `rows_file(path)`."""
    with replacing(rows_file(path)) as temporary, temporary.open("wb") as file:
        np.save(file, rows.astype(np.int64))


def column_names(width: int) -> list[str]:
    return [f"code_{column}" for column in range(width)]


def _write_npy(file: IO[bytes], chunks: Iterable[np.ndarray], width: int) -> int:
    def write_header(rows: int) -> None:
        header = {"descr": "<f4", "fortran_order": False, "shape": (rows, width)}
        np.lib.format.write_array_header_1_0(file, header)

    write_header(0)
    rows = 0
    for chunk in chunks:
        file.write(np.ascontiguousarray(chunk, "<f4").data)
        rows += len(chunk)
    file.seek(0)  # numpy leaves room in the header for any number of rows
    write_header(rows)
    return rows


def _write_csv(file: IO[bytes], chunks: Iterable[np.ndarray], width: int) -> int:
    file.write((",".join(column_names(width)) + "\n").encode())
    rows = 0
    for chunk in chunks:
        np.savetxt(file, chunk, delimiter=",", fmt="%.9g")  # nine digits give every float32 back
        rows += len(chunk)
    return rows


def _write_parquet(file: IO[bytes], chunks: Iterable[np.ndarray], width: int) -> int:
    pa = require("pyarrow", "writing Parquet")
    parquet = require("pyarrow.parquet", "writing Parquet")
    schema = pa.schema([(name, pa.float32()) for name in column_names(width)])
    rows = 0
    with parquet.ParquetWriter(file, schema) as writer:
        for chunk in chunks:
            columns = [np.ascontiguousarray(chunk[:, column], np.float32) for column in range(width)]
            writer.write_table(pa.table(columns, schema=schema))
            rows += len(chunk)
    return rows
