"""Arrays of any kind to the two tensors that training needs: rows of numbers, and one target for each row."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

_NUMPY_DTYPES = {torch.float16: np.float16, torch.float32: np.float32, torch.float64: np.float64}
_DATES = "dates or times; turn them into numbers, for example days since a date"
_PART = 1 << 20  # of elements looked at at a time: of rows on disk, memory holds as many
_CURE_TEXT = "give the table to fastenc.data.Preprocessor, which turns text columns into numbers"


class DataError(ValueError):
    """The data cannot be used: one sentence that names what is wrong, where, and the cure."""


def as_rows(
    x: Any,
    *,
    name: str = "x",
    dtype: torch.dtype = torch.float32,
    features: int | None = None,
    finite: bool = True,
    writable: bool = True,
) -> Tensor:
    """`x` as a contiguous CPU tensor `[rows, features]` of `dtype`.

    Args:
        x: a torch tensor (any device), a numpy array or memory map, a pandas DataFrame, a pyarrow Table or RecordBatch,
            or a nested list: two dimensions, real numbers or booleans. pandas' and pyarrow's nulls become NaN.
        name: what to call `x` in errors.
        dtype: a floating-point dtype.
        features: the number of columns there must be; None for any.
        finite: whether to refuse NaN and Inf.
        writable: whether the tensor may be written to.

    The tensor shares memory with `x` where `x` already is contiguous, native and of `dtype`; `x` itself is never
    written to. A read-only array is copied if `writable`, because torch has no read-only tensors; if not, it is shared
    too, and to write to the tensor of a read-only memory map would end the process.

    Raises:
        DataError: not two-dimensional, no rows, no columns, not `features` columns, text, dates or complex numbers, a
            finite value that `dtype` cannot hold, or NaN or Inf if `finite`.
    """
    wanted = _NUMPY_DTYPES.get(dtype, np.float32)
    if is_frame(x) or is_arrow(x):
        check_shape(tuple(x.shape), name)
        array = np.empty(tuple(x.shape), wanted)
        for index, (column, values) in enumerate(_table_columns(x, name)):
            array[:, index] = _cast(values, wanted, f"column {column!r} of {name}")
    else:
        array = as_array(x, name)
        check_numbers(array, name)
        array = _cast(array, wanted, name, writable)
    if features is not None and array.shape[1] != features:
        raise DataError(
            f"{name} has {array.shape[1]} columns where {features} are expected; give the {features} columns that the "
            "model was made for, in the same order"
        )
    rows = _tensor(array).to(dtype)
    if finite and (bad := _rows_not_finite(rows)):
        raise DataError(
            f"{name} has NaN or Inf in {row_list(bad, len(rows))}; fill them in with "
            'Preprocessor(missing="impute") or leave those rows out with Preprocessor(missing="drop")'
        )
    return rows


def as_target(y: Any, rows: int, *, name: str = "y", writable: bool = True) -> Tensor:
    """`y` as a contiguous CPU tensor with one entry for each of `rows` rows.

    Integers and booleans in one dimension are class labels: int64 `[rows]`. Anything else is a regression target:
    float32 `[rows]` or `[rows, outputs]`. Accepts what `as_rows` does, and one-dimensional arrays, lists, pandas
    Series and pyarrow arrays. Memory is shared, or not, as `as_rows` does.

    Raises:
        DataError: not `rows` entries, three or more dimensions, text, or missing, NaN or Inf values.
    """
    pandas = sys.modules.get("pandas")
    if is_frame(y) or is_arrow(y):
        array = as_rows(y, name=name, finite=False).numpy()
    elif pandas is not None and isinstance(y, pandas.Series):
        array = _series_values(y, name) if _is_numeric(y) else y.to_numpy()
    else:
        array = as_array(y, name)
    if array.ndim not in (1, 2) or array.shape[0] != rows:
        raise DataError(
            f"{name} has shape {list(array.shape)} and x has {rows} rows; give one target for each row, "
            f"as [{rows}] or [{rows}, outputs]"
        )
    if array.dtype.kind not in "biuf":
        raise DataError(
            f"{name} holds {_kind(array)}, not numbers; for class labels give their numbers, as "
            f"np.unique({name}, return_inverse=True)[1] makes them"
        )
    if array.ndim == 1 and array.dtype.kind in "biu":
        if array.dtype.kind == "u" and array.max(initial=0) > np.iinfo(np.int64).max:
            raise DataError(f"{name} holds labels above the largest int64; number the classes from 0")
        return _tensor(np.require(array, np.int64, _requirements(writable)))
    target = _tensor(_cast(array, np.float32, name, writable))
    if bad := _rows_not_finite(target):
        raise DataError(f"{name} has NaN or Inf in {row_list(bad, rows)}; leave those rows out of x and {name}")
    return target


def is_frame(x: Any) -> bool:
    """Whether `x` is a pandas DataFrame; does not import pandas."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(x, pandas.DataFrame)


def is_arrow(x: Any) -> bool:
    """Whether `x` is a pyarrow Table or RecordBatch; does not import pyarrow."""
    pyarrow = sys.modules.get("pyarrow")
    return pyarrow is not None and isinstance(x, (pyarrow.Table, pyarrow.RecordBatch))


def as_array(x: Any, name: str) -> np.ndarray:
    """A tensor, an array or a nested list as a numpy array of its own dtype and shape, without a copy if possible."""
    if isinstance(x, Tensor):
        if x.layout != torch.strided or x.is_meta:
            raise DataError(f"{name} is a {'meta' if x.is_meta else 'sparse'} tensor; give a dense one with data in it")
        x = x.detach().cpu()
        # numpy knows neither bfloat16 nor the 8-bit floats; float32 holds all of their values.
        known = not x.is_floating_point() or x.dtype in _NUMPY_DTYPES
        return (x if known else x.float()).resolve_conj().resolve_neg().numpy()
    if isinstance(x, (str, bytes, dict)) or not (isinstance(x, (list, tuple)) or hasattr(x, "__array__")):
        raise DataError(
            f"{name} is of type {type(x).__name__}; give a tensor, a numpy array, a pandas or pyarrow table, or a list "
            "of rows"
        )
    try:
        array = np.asarray(x)
    except ValueError as error:
        raise DataError(f"the rows of {name} have different lengths; give every row the same columns") from error
    if array.dtype.kind in "US" and isinstance(x, (list, tuple)):
        array = np.asarray(x, dtype=object)  # so that an error names the text, not the numbers beside it
    return array


def check_numbers(array: np.ndarray, name: str) -> None:
    """Raise DataError unless `array` is two-dimensional, not empty, and holds real numbers or booleans."""
    check_shape(array.shape, name)
    if array.dtype.kind == "c":
        raise DataError(f"{name} is complex; give its real and imaginary parts as separate columns")
    if array.dtype.kind in "mM":
        raise DataError(f"{name} holds {_DATES}")
    if array.dtype.kind not in "biuf":
        column = _first_column_without_numbers(array)
        if column is None:
            raise DataError(f"{name} is an array of {array.dtype}; convert it with {name}.astype(float)")
        raise DataError(
            f"column {column} of {name} holds {_kind(array[:, column])} where numbers should be; put the data in a "
            f"pandas DataFrame and {_CURE_TEXT}"
        )


def check_shape(shape: tuple[int, ...], name: str) -> None:
    """Raise DataError unless `shape` is [rows, columns] with at least one of each."""
    if len(shape) > 0 and shape[0] == 0:
        raise DataError(f"{name} has no rows; give at least one")
    if len(shape) < 2:
        raise DataError(
            f"{name} has {len(shape)} dimension{'s' * (len(shape) != 1)} where [rows, features] is expected; use "
            "x.reshape(-1, 1) if it is one feature, or x[None] if it is one row"
        )
    if len(shape) > 2:
        raise DataError(
            f"{name} has {len(shape)} dimensions, {list(shape)}, where [rows, features] is expected; use "
            f"x.reshape({shape[0]}, -1) to make every row one vector"
        )
    if shape[1] == 0:
        raise DataError(f"{name} has no columns; give at least one feature")


def row_list(rows: Sequence[int] | np.ndarray, total: int) -> str:
    """For example `3 of 100 rows (row 3, 7, 9, counted from 0)`; at most five are listed."""
    listed = ", ".join(str(row) for row in rows[:5]) + (", ..." if len(rows) > 5 else "")
    return f"{len(rows)} of {total} row{'s' * (total != 1)} (row {listed}, counted from 0)"


def _requirements(writable: bool) -> list[Literal["C", "A", "W"]]:
    """Of np.require: contiguous, aligned and, if asked for, writable."""
    return ["C", "A", "W"] if writable else ["C", "A"]


class _Shared:
    """A read-only array's memory under numpy's interface of a writable one: torch knows no other."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array  # which keeps the memory
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array if array.flags.writeable else np.asarray(_Shared(array)))


def _rows_not_finite(numbers: Tensor) -> list[int]:
    """The rows of `numbers` [rows, ...] that hold NaN or Inf."""
    rows: list[int] = []
    count = max(1, _PART // numbers[0].numel())
    for start, part in zip(range(0, len(numbers), count), numbers.split(count), strict=True):
        if part.sum(dtype=torch.float32).isfinite():  # NaN and Inf stay in a sum, which takes no memory
            continue
        bad = (~torch.isfinite(part)).reshape(len(part), -1).any(1)
        rows += (bad.nonzero().flatten() + start).tolist()
    return rows


def _cast(values: np.ndarray, dtype: Any, name: str, writable: bool = True) -> np.ndarray:
    """`values` as a native, contiguous array of `dtype`; DataError if a finite value would become Inf."""
    with np.errstate(over="ignore", invalid="ignore"):
        out = np.require(values, dtype, _requirements(writable))
    if not np.can_cast(values.dtype, dtype) and np.isinf(out).any():
        lost = np.argwhere(np.isinf(out) & np.isfinite(values))
        if len(lost):
            where = tuple(lost[0].tolist())
            raise DataError(
                f"{name} holds {len(lost)} value{'s' * (len(lost) != 1)} too large for {np.dtype(dtype)}, the first "
                f"{values[where]:g} in row {where[0]}; scale them down, or remove them"
            )
    return out


def _table_columns(table: Any, name: str) -> Iterator[tuple[str, np.ndarray]]:
    """Each column of a DataFrame or a pyarrow table, as its name and float64 values with NaN for nulls."""
    if is_frame(table):
        for index, column in enumerate(table.columns):
            yield str(column), _series_values(table.iloc[:, index], f"column {str(column)!r} of {name}").astype(float)
        return
    import pyarrow as pa

    for column, values in zip(table.schema.names, table.columns, strict=True):
        kind = values.type
        if pa.types.is_temporal(kind):
            raise DataError(f"column {column!r} of {name} holds {_DATES}")
        numeric = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
        if not (numeric or pa.types.is_boolean(kind)):
            raise DataError(f"column {column!r} of {name} holds {kind} where numbers should be; {_CURE_TEXT}")
        yield column, values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)


def _series_values(series: Any, name: str) -> np.ndarray:
    """A pandas Series as numpy numbers: integers and booleans as they are, float64 with NaN if values are missing."""
    kind = series.dtype.kind
    if kind == "c":
        raise DataError(f"{name} is complex; give its real and imaginary parts as separate columns")
    if kind in "mM":
        raise DataError(f"{name} holds {_DATES}")
    if not _is_numeric(series):
        raise DataError(f"{name} holds {series.dtype} values where numbers should be; {_CURE_TEXT}")
    if series.hasnans:
        return series.to_numpy(dtype=np.float64, na_value=np.nan)
    return series.to_numpy(dtype=getattr(series.dtype, "numpy_dtype", None))


def _is_numeric(series: Any) -> bool:
    from pandas.api.types import is_numeric_dtype

    return series.dtype.kind == "b" or is_numeric_dtype(series.dtype)


def _first_column_without_numbers(array: np.ndarray) -> int | None:
    for column in range(array.shape[1]):
        if not all(isinstance(value, (int, float, np.number, np.bool_)) for value in array[:, column]):
            return column
    return None


def _kind(array: np.ndarray) -> str:
    """What an array that does not hold numbers holds instead, with an example."""
    if array.dtype.kind in "UST":
        return f"text such as {str(array.flat[0])!r:.30}"
    for value in array.flat:
        if not isinstance(value, (int, float, np.number, np.bool_)):
            return f"{'text' if isinstance(value, str) else type(value).__name__} such as {str(value)!r:.30}"
    return f"{array.dtype} values"
