"""`fastenc encode`: the rows of a file that may be larger than memory to vectors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from ..data import Chunks
from ..pipeline import SavedModel
from ..vectors import check_output, rows_file, write_row_numbers, write_vectors
from .items import encode_to_file
from .options import ColumnOption, DataArgument, ModelArgument, report_rows


def encode(
    folder: ModelArgument,
    data: DataArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="A .npy, .csv or .parquet file.", show_default=False)
    ],
    column: ColumnOption = None,
) -> None:
    """Turn the rows of DATA into vectors with the model in DIR.

    The file gets one vector for each row, in the same order. If the model was trained with --missing drop, rows with
    missing values get none, and the row number of each vector, counted from 0, is written beside it: for vectors.npy
    in vectors.rows.npy. DATA may be larger than memory: it is read, and the file written, in chunks.

    Of images and other items of a front end, their names are written beside the vectors, in vectors.names.txt.
    """
    check_output(output)
    saved = SavedModel(folder)
    if saved.reader is not None:
        encode_to_file(saved, data, output, column)
        return
    drops = saved.preprocessor is not None and saved.preprocessor.missing == "drop"
    kept: list[np.ndarray] = []
    dropped = unseen = 0

    def prepared() -> Iterator[np.ndarray]:
        nonlocal dropped, unseen
        for block, _ in saved.prepare_chunks(data, Chunks(data)):
            dropped, unseen = dropped + block.dropped, unseen + block.unseen
            if drops:
                kept.append(block.rows)
            yield block.x

    rows, width = write_vectors(output, saved.codes(prepared()))
    report_rows(dropped, rows + dropped, unseen)
    if drops:
        write_row_numbers(output, np.concatenate(kept))
        typer.echo(f"row numbers written to {rows_file(output)}")
    typer.echo(f"{rows} vectors of {width} numbers written to {output}")
