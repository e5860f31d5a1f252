"""The columns of an array or a table, read in blocks of rows as numbers or as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from .arrays import DataError, as_array, check_numbers, check_shape, is_arrow, is_frame
from .extras import require

Kind = Literal["number", "text", "empty"]

_NUMBERS = {"integer", "floating", "mixed-integer-float", "decimal"}
_TEXTS = {"string", "boolean", "categorical"}
_TIMES = {"datetime64", "datetime", "date", "timedelta64", "timedelta", "time", "period", "interval"}


class Columns:
    """A two-dimensional array of numbers, or a pandas or pyarrow table of columns of any kind.

    Attributes:
        names: of the columns; `0`, `1`, ... for an array.
        named: whether the names are the table's own.
        rows: how many there are; at least one.

    Raises:
        DataError: on construction: not two-dimensional, no rows, two columns with one name, or an array that does not
            hold numbers.
    """

    def __init__(self, features: Any) -> None:
        if is_arrow(features):
            require("pandas", "preprocessing tables")
            features = features.to_pandas()
        self.named = is_frame(features)
        if self.named:
            check_shape(features.shape, "the table")
            self.names = [str(name) for name in features.columns]
            repeated = next((name for name in self.names if self.names.count(name) > 1), None)
            if repeated is not None:
                raise DataError(f"the table has two columns called {repeated!r}; rename or remove one of them")
        else:
            features = as_array(features, "the array")
            check_numbers(features, "the array")
            self.names = [str(index) for index in range(features.shape[1])]
        self.rows = len(features)
        self._features = features

    def kind(self, column: int) -> Kind:
        """What a column holds: numbers, text (also categories and booleans), or nothing but missing values.

        Raises:
            DataError: dates, bytes, complex numbers, lists, or text and numbers mixed.
        """
        if not self.named:
            return "number"
        series = self._features.iloc[:, column]
        if series.isna().all():
            return "empty"
        kind = require("pandas", "preprocessing tables").api.types.infer_dtype(series, skipna=True)
        if kind in _NUMBERS:
            return "number"
        if kind in _TEXTS:
            return "text"
        name = self.names[column]
        if kind in _TIMES:
            raise DataError(
                f'column {name!r} holds dates or times; turn them into numbers, as dates="parts" does with '
                "dates, or remove the column"
            )
        holds = "values of mixed kinds" if kind.startswith("mixed") else f"{kind} values"
        raise DataError(f"column {name!r} holds {holds}; make all of them numbers or text, or remove the column")

    def numbers(self, rows: slice, columns: Sequence[int]) -> np.ndarray:
        """A block as a new float64 array `[rows, columns]`; NaN where a value is missing or infinite."""
        if self.named:
            block = self._features.iloc[rows]
            out = np.empty((len(block), len(columns)))
            for index, column in enumerate(columns):
                series = block.iloc[:, column]
                # A column that is all missing can be of a dtype, such as dates, that does not convert to float64.
                out[:, index] = np.nan if series.isna().all() else series.to_numpy(dtype=np.float64, na_value=np.nan)
        else:
            everything = len(columns) == len(self.names)
            block = self._features[rows] if everything else self._features[rows, columns]
            out = np.array(block, dtype=np.float64, subok=False)
        out[~np.isfinite(out)] = np.nan
        return out

    def texts(self, rows: slice, columns: Sequence[int]) -> np.ndarray:
        """A block of a table as a new object array `[rows, columns]` of str; None where a value is missing."""
        block = self._features.iloc[rows]
        out = np.empty((len(block), len(columns)), dtype=object)
        for index, column in enumerate(columns):
            series = block.iloc[:, column]
            pairs = zip(series.to_numpy(dtype=object), series.isna(), strict=True)
            out[:, index] = [None if missing else _as_text(value) for value, missing in pairs]
        return out


def _as_text(value: Any) -> str:
    # A column of whole numbers with a hole in it reaches us as floats: 1.0 is then the category 1.
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
