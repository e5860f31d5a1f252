"""One recording, a file or a table of time steps, as numbers: what SeriesReader reads."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ..data import DataError, load

LARGEST = float(np.finfo(np.float32).max)


def read_recording(item: Any) -> tuple[np.ndarray, list[str] | None, str]:
    """The values of a recording, float64 [T, C], the names of its columns if it has any, and what to call it in errors.

    Args:
        item: the path of a .csv or .npy file, the bytes of one, an array [T, C], or a pandas or pyarrow table.

    Raises:
        DataError: it cannot be read, has no rows, text or dates, or values that float32 cannot hold.
    """
    if isinstance(item, (bytes, bytearray)):
        return _from_bytes(bytes(item))
    shown = str(item) if isinstance(item, (str, os.PathLike)) else "the recording"
    features = load(Path(item) if isinstance(item, str) else item).features
    if isinstance(features, np.ndarray):
        values, names = np.array(features, np.float64), None
    else:
        names = [str(name) for name in features.columns]
        values = np.full(features.shape, np.nan)
        for number, name in enumerate(names):
            column = features.iloc[:, number]
            if column.isna().all():  # of no type, where all fields are empty
                continue
            if column.dtype.kind not in "biuf":
                what = "dates" if column.dtype.kind in "mM" else repr(str(column[column.notna()].iloc[0])[:30])
                raise DataError(
                    f"column {name!r} of {shown} holds {what} where numbers should be; leave the column out, or write "
                    "it as numbers"
                )
            values[:, number] = column.to_numpy(dtype=np.float64, na_value=np.nan)
    large = np.argwhere(np.abs(values) > LARGEST)
    if len(large):
        row, number = large[0].tolist()
        raise DataError(
            f"column {number if names is None else names[number]!r} of {shown} holds {values[row, number]:g} in row "
            f"{row}, counted from 0; leave a field empty, or NaN, where there is no reading"
        )
    return values, names, shown


def _from_bytes(content: bytes) -> tuple[np.ndarray, list[str] | None, str]:
    """As `read_recording`: through a file, as the readers take no others."""
    ending = ".npy" if content.startswith(np.lib.format.MAGIC_PREFIX) else ".csv"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"recording{ending}"
        path.write_bytes(content)
        try:
            values, names, _ = read_recording(path)
        except DataError as error:
            raise DataError(str(error).replace(str(path), "the recording")) from error
    return values, names, "the recording"
