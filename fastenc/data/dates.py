"""Columns of dates to columns of numbers: the parts of a date that a model can learn from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .arrays import DataError
from .extras import require

PARTS = ("days", "year", "month", "day", "weekday", "hour")
_DATES = ("datetime64", "datetime", "date")


def date_columns(frame: Any) -> list[str]:
    """The names of a DataFrame's columns that hold dates, with or without a time of day."""
    infer = require("pandas", "preprocessing tables").api.types.infer_dtype
    series = [frame.iloc[:, column] for column in range(frame.shape[1])]
    return [str(name) for name, each in zip(frame.columns, series, strict=True) if infer(each, skipna=True) in _DATES]


def with_parts(frame: Any, names: Sequence[str]) -> Any:
    """The DataFrame with each column in `names` replaced, at its end, by one column for each of PARTS.

    `when` becomes `when.days` (days since 1970, with their fraction), `when.year` and so on; NaN where it is missing.
    Times with a zone count in UTC. Text is read as ISO 8601.

    Raises:
        DataError: a column is absent, or holds what is no date.
    """
    if not names:
        return frame
    pandas = require("pandas", "preprocessing tables")
    if not hasattr(frame, "columns"):
        raise DataError(f"the data is an array without column names, and training had {names[0]!r}; give a table")
    columns = [str(column) for column in frame.columns]
    parts = {}
    for name in names:
        if name not in columns:
            raise DataError(f"the table has no column {name!r}, which training had; add it, or train again without it")
        series = frame.iloc[:, columns.index(name)]
        try:
            dates = pandas.to_datetime(series, utc=True, format="ISO8601").dt.tz_localize(None).dt.as_unit("us")
        except (ValueError, TypeError, AttributeError, OverflowError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise DataError(
                f"column {name!r} held dates in training and holds something else now ({reason}); correct its values"
            ) from error
        epoch = pandas.Timestamp("1970-01-01")
        parts[f"{name}.days"] = (dates - epoch) / pandas.Timedelta(days=1)
        for part in PARTS[1:]:
            values = getattr(dates.dt, "day_of_week" if part == "weekday" else part)
            parts[f"{name}.{part}"] = values.astype("float64")
    rest = frame.iloc[:, [index for index, column in enumerate(columns) if column not in names]]
    return pandas.concat([rest, pandas.DataFrame(parts, index=frame.index)], axis=1)
