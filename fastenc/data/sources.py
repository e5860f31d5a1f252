"""Where data comes from: files, scikit-learn's handwritten digits, and things already in memory."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .arrays import DataError, as_array, as_rows, check_numbers, check_shape, is_arrow, is_frame, row_list
from .extras import require

if TYPE_CHECKING:
    import pandas as pd

_DIGITS = "digits"
_CSV_BLOCK = 1 << 24  # bytes that are parsed at a time; the longest line must fit


@dataclass(frozen=True, eq=False)
class Data:
    """Features, and the target of each row if there is one.

    Attributes:
        name: the file's name, or what kind of thing the data was.
        features: `[rows, features]`, of any real dtype, maybe a read-only memory map; or a table with unique column
            names, maybe with text and missing values, for a Preprocessor.
        target: `[rows]`: int64, float64, bool, or text as an object array of str; nothing is missing in it. If several
            targets were asked for, a dict of these by name.
    """

    name: str
    features: np.ndarray | pd.DataFrame
    target: Any = None

    def __len__(self) -> int:
        return len(self.features)

    def part(self, rows: slice) -> Data:
        """Some of the rows: a view."""
        features = self.features[rows] if isinstance(self.features, np.ndarray) else self.features.iloc[rows]
        return Data(self.name, features, target_part(self.target, rows))


def target_part(target: Any, rows: Any) -> Any:
    """Some rows, by a slice or their numbers, of the target or of each of several; None of none."""
    if isinstance(target, dict):
        return {name: values[rows] for name, values in target.items()}
    return None if target is None else target[rows]


def load(source: Any, *, target: str | Sequence[str] | None = None) -> Data:
    """Read `source`; whatever is wrong with it is one DataError.

    Args:
        source: "digits" for scikit-learn's handwritten digits (1797 rows of 64 pixels in 0 to 16, with labels); a path
            ending in .csv, .parquet or .npy; or a tensor, array, table or nested list as `as_rows` takes.
        target: the column of a table that is the target and not a feature; a list for several targets.

    A .npy file is memory-mapped read-only, and pickled objects in it are refused. A .csv file is comma-separated UTF-8
    with column names in its first line; empty fields and NA, NaN, null and the like are missing values.

    Raises:
        DataError: the file is missing, a folder, empty, broken, has no rows or no column names, two columns share a
            name, or `target` is not a column or has missing values.
        ModuleNotFoundError: a package of `fastenc[app]` is needed and missing.
    """
    if isinstance(source, str) and source == _DIGITS:
        _refuse_target(target, "digits brings its own labels")
        digits = require("sklearn.datasets", "reading the digits").load_digits()
        return Data(_DIGITS, digits.data, digits.target.astype(np.int64))
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        features = _read_file(path)
        name, shown = path.name, str(path)
    elif is_arrow(source) or is_frame(source):
        features = _arrow_to_frame(source, "the table") if is_arrow(source) else source
        name = shown = "the table"
    else:
        features = _array(source)
        name = shown = "the array"
    if isinstance(features, np.ndarray):
        _refuse_target(target, f"{shown} is an array without column names")
        return Data(name, features)
    return split_target(features, target, name, shown)


def _refuse_target(target: str | Sequence[str] | None, reason: str) -> None:
    if target is not None:
        raise DataError(f"target is {target!r}, but {reason}; leave target out")


def _array(source: Any) -> np.ndarray:
    array = as_array(source, "x")
    check_numbers(array, "x")
    if isinstance(source, (list, tuple)):
        return as_rows(source, dtype=torch.float64, finite=False).numpy()
    return array


def _read_file(path: Path) -> np.ndarray | pd.DataFrame:
    if not path.exists():
        raise DataError(f'no such file: {path}; give a path to a file in {_endings()}, or "{_DIGITS}"')
    if path.is_dir():
        raise DataError(f"{path} is a folder; give the path of one file in it, in {_endings()}")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path} ends in {path.suffix or 'nothing'}; the known endings are {_endings()}")
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty (0 bytes); write it again")
        return reader(path)
    except PermissionError as error:
        raise DataError(f"{path} cannot be read; change its permissions") from error


def _endings() -> str:
    *first, last = _READERS
    return f"{', '.join(first)} or {last}"


def _read_npy(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        magic = file.read(len(np.lib.format.MAGIC_PREFIX))
    if magic != np.lib.format.MAGIC_PREFIX:
        raise DataError(f"{path} is not a .npy file, whatever its ending; write it with np.save")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        if "object" in str(error):
            raise DataError(
                f"{path} holds pickled Python objects, which could run code when read; save an array of numbers"
            ) from error
        raise DataError(f"{path} is cut short or broken ({_first_sentence(error)}); write or copy it again") from error
    check_numbers(array, str(path))
    return array


def _read_csv(path: Path) -> pd.DataFrame:
    pyarrow = require("pyarrow", "reading CSV")
    reader = require("pyarrow.csv", "reading CSV")
    try:
        table = reader.read_csv(
            path,
            read_options=reader.ReadOptions(block_size=_CSV_BLOCK),
            parse_options=reader.ParseOptions(newlines_in_values=True),
            convert_options=reader.ConvertOptions(strings_can_be_null=True),
        )
        names = table.column_names  # decoded only now
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        raise DataError(f"{path} {csv_fault(path, error)}") from error
    check_header(names, path)
    for field in table.schema:
        if pyarrow.types.is_binary(field.type):  # what pyarrow makes of text that it cannot decode
            raise DataError(f"column {field.name!r} of {path} is not UTF-8 text; save the file as UTF-8")
    return _arrow_to_frame(table, str(path))


def csv_fault(path: Path, error: Exception) -> str:
    """Why a CSV could not be read, with the line; only now is it worth a second, slower pass."""
    if isinstance(error, UnicodeDecodeError):
        return "is not UTF-8 text; save the file as UTF-8"
    if found := re.match(r"In CSV column #(\d+): .*invalid UTF8 data", str(error)):
        return f"is not UTF-8 text in column {found[1]}, counted from 0; save the file as UTF-8"
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            lines = csv.reader(file)
            header: list[str] = next((line for line in lines if line), [])
            if not header:
                return "holds nothing but blank lines; write it again"
            rows = 0
            for line in lines:
                if line and len(line) != len(header):
                    return (
                        f"has {len(line)} field{'s' * (len(line) != 1)} in line {lines.line_num} and {len(header)} in "
                        'its header; give every line as many, with "quotes" around text that has commas'
                    )
                rows += bool(line)
            if rows == 0:
                return "has a header and no rows; add at least one row"
    except (csv.Error, OSError):
        pass
    return f"is not a CSV that can be read ({_first_sentence(error)}); save it again as comma-separated UTF-8"


def check_header(names: Sequence[str], path: Path) -> None:
    """Refuse what cannot be column names; a first row taken for a header would be a row lost without a word."""
    if "" in names:
        raise DataError(f"column {names.index('')} of {path} has no name; name it, or leave it out when saving")
    if len(names) == 1 and (mark := next((mark for mark in ";\t|" if mark in names[0]), None)):
        raise DataError(f"{path} is separated by {mark!r}; save it with commas")
    try:
        numbers = [float(name) for name in names]
    except ValueError:
        return
    if numbers != [numbers[0] + index for index in range(len(names))]:  # 0, 1, 2, ... is pandas' header for an array
        raise DataError(f"{path} begins with numbers where the column names should be; add a line of names")


def _read_parquet(path: Path) -> pd.DataFrame:
    pyarrow = require("pyarrow", "reading Parquet")
    try:
        with require("pyarrow.parquet", "reading Parquet").ParquetFile(path) as file:
            table = file.read()
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        raise DataError(
            f"{path} is not Parquet, or is cut short or broken ({_first_sentence(error)}); write or copy it again"
        ) from error
    return _arrow_to_frame(table, str(path))


_READERS: dict[str, Callable[[Path], Any]] = {".csv": _read_csv, ".parquet": _read_parquet, ".npy": _read_npy}


def _arrow_to_frame(table: Any, name: str) -> pd.DataFrame:
    _check_unique(table.schema.names, name)  # before pandas' metadata is applied, which fails on duplicates
    require("pandas", "reading tables")
    return table.to_pandas()


def _check_unique(names: Sequence[str], name: str) -> None:
    seen: set[str] = set()
    for column in names:
        if column in seen:
            raise DataError(f"{name} has two columns called {column!r}; rename or remove one of them")
        seen.add(column)


def split_target(
    frame: pd.DataFrame, target: str | Sequence[str] | None, name: str, shown: str, first: int = 0
) -> Data:
    """The columns of a table as features and target; `shown` is what to call it in errors.

    `first` is the number of its first row: of a table that is read in chunks.
    """
    columns = [str(column) for column in frame.columns]
    _check_unique(columns, shown)
    check_shape(frame.shape, shown)
    if target is None:
        return Data(name, frame)
    wanted = [target] if isinstance(target, str) else list(target)
    for each in wanted:
        if each not in columns:
            listed = ", ".join(columns[:10]) + (", ..." if len(columns) > 10 else "")
            raise DataError(f"{shown} has no column {each!r} to be the target; its columns are {listed}")
        if wanted.count(each) > 1:
            raise DataError(f"the target {each!r} is given twice; give each column once")
    if len(columns) == len(wanted):
        names = " and ".join(map(repr, wanted))
        what = f"target {names}" if len(wanted) == 1 else f"targets {names}"
        raise DataError(f"{shown} has no column besides the {what}; give at least one feature")
    targets = {each: _target(frame.iloc[:, columns.index(each)], each, shown, first) for each in wanted}
    features = frame.iloc[:, [index for index, column in enumerate(columns) if column not in targets]]
    return Data(name, features, targets[target] if isinstance(target, str) else targets)


def _target(series: pd.Series, target: str, name: str, first: int) -> np.ndarray:
    import pandas as pd

    what = f"the target column {target!r} of {name}"
    missing = (first + np.flatnonzero(series.isna().to_numpy())).tolist()
    if missing:
        raise DataError(
            f"{what} has no value in {row_list(missing, first + len(series))}; fill in or remove those rows"
        )
    kind = pd.api.types.infer_dtype(series)
    if kind == "integer":
        return series.to_numpy(dtype=np.int64)
    if kind in ("floating", "mixed-integer-float", "decimal"):
        return series.to_numpy(dtype=np.float64)
    if kind == "boolean":
        return series.to_numpy(dtype=np.bool_)
    if kind in ("string", "categorical"):
        return np.array([str(value) for value in series], dtype=object)
    raise DataError(f"{what} holds {kind} values; give numbers, or text as class labels")


def _first_sentence(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0].rstrip(".")
