"""scikit-learn's imputer, scalers and one-hot encoder, made of what was learned of the rows.

A step is rebuilt by fitting it on rows made up so that it learns the same: only public attributes are ever read or set.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from .arrays import DataError
from .columns import Columns
from .extras import require

MAX_CATEGORIES = 1000

_PURPOSE = "preprocessing"
_MEDIAN_VALUES = 1 << 25  # float64 values at a time, 256 MB: a median needs whole columns
_SCALER_STATE = {"standard": ("mean_", "var_", "scale_"), "minmax": ("data_min_", "data_max_"), "none": ()}


def medians_of(table: Columns, columns: Sequence[int]) -> np.ndarray:
    """The columns' medians over all rows, float64 `[columns]`; each column must have a value."""
    step = max(1, _MEDIAN_VALUES // table.rows)
    medians = []
    for start in range(0, len(columns), step):
        # SimpleImputer's own fit sorts masked arrays: the same medians, many times slower.
        for column in table.numbers(slice(None), columns[start : start + step]).T:
            medians.append(np.median(column[~np.isnan(column)]))
    return np.array(medians)


def restore_imputer(medians: np.ndarray) -> Any:
    """A SimpleImputer that fills in `medians`, float64 `[columns]`."""
    return require("sklearn.impute", _PURPOSE).SimpleImputer(strategy="median").fit(medians[None])


def check_spread(spread: np.ndarray, low: np.ndarray, high: np.ndarray, names: Sequence[str]) -> None:
    """Raise DataError if the variance or range of a column, `[columns]`, is too large for float64."""
    wide = np.flatnonzero(~np.isfinite(spread))
    if len(wide):
        name, largest = names[wide[0]], max(abs(low[wide[0]]), abs(high[wide[0]]))
        raise DataError(
            f"column {name!r} has values up to {largest:g}, too large to scale in float64; divide it by a constant "
            "first"
        )


def scaler_of(
    scale: str, mean: np.ndarray, variance: np.ndarray, low: np.ndarray, high: np.ndarray, names: Sequence[str]
) -> Any:
    """The scaler called `scale` for rows with these statistics, float64 `[columns]` each; None for "none".

    Raises:
        DataError: a column's variance or range is too large for float64.
    """
    if scale == "none":
        return None
    with np.errstate(over="ignore"):
        check_spread(variance if scale == "standard" else high - low, low, high, names)
    if scale == "minmax":
        return _new_scaler(scale).fit(np.stack([low, high]))
    # A mean added up in blocks can be off in the last bit, and a constant column would not become exactly 0.
    constant = low == high
    mean, variance = np.where(constant, low, mean), np.where(constant, 0.0, variance)
    deviation = np.where(variance > 0, np.sqrt(variance), 1.0)
    state = {"mean_": mean.tolist(), "var_": variance.tolist(), "scale_": deviation.tolist()}
    return restore_scaler(scale, state, len(names))


def scaler_state(scale: str, scaler: Any) -> dict[str, list[float]]:
    """What a scaler learned, for `restore_scaler`."""
    return {name: getattr(scaler, name).tolist() for name in _SCALER_STATE[scale]}


def restore_scaler(scale: str, state: dict[str, list[float]], columns: int) -> Any:
    """The scaler whose `scaler_state` is `state`; ValueError unless it is one of `columns` columns."""
    values = {name: finite_array(state[name], columns, name) for name in _SCALER_STATE[scale]}
    if not values:
        return None
    scaler = _new_scaler(scale)
    if scale == "minmax":
        if (values["data_min_"] > values["data_max_"]).any():
            raise ValueError("a minimum is above its maximum")
        return scaler.fit(np.stack([values["data_min_"], values["data_max_"]]))
    if (values["scale_"] <= 0).any():
        raise ValueError("a scale is not positive")
    scaler.fit(values["mean_"][None])
    for name, value in values.items():
        setattr(scaler, name, value)
    return scaler


def check_categories(name: str, count: int) -> None:
    """Raise DataError if a column has too many categories for as many columns."""
    if count > MAX_CATEGORIES:
        raise DataError(
            f"column {name!r} has {count} different texts, and at most {MAX_CATEGORIES} can become columns; remove it "
            'if it only names the row, group its values, or use text="hash"'
        )


def restore_encoder(categories: Sequence[Sequence[str | None]]) -> Any:
    """The OneHotEncoder with these categories for each column; ValueError if they cannot be categories."""
    for column in categories:
        texts = [category for category in column if category is not None]
        if not column or len(set(column)) < len(column) or not all(isinstance(text, str) for text in texts):
            raise ValueError("the categories of a column are not different texts")
    return _new_encoder([np.array(column, dtype=object) for column in categories]).fit(
        np.array([[column[0] for column in categories]], dtype=object)
    )


class HashedText:
    """Text as counts of its words: each column `[rows]` becomes `size` columns, by scikit-learn's FeatureHasher.

    A word is hashed to one of the columns and a sign, so that nothing need be learned, and words not seen before count
    as well as others; two words may share a column. A missing text is a word of its own.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._hasher = require("sklearn.feature_extraction", _PURPOSE).FeatureHasher(size, input_type="string")

    def transform(self, texts: np.ndarray) -> np.ndarray:
        """object `[rows, columns]` of str or None to float32 `[rows, columns * size]`."""
        columns = [self._hasher.transform([_words(text) for text in column]).toarray() for column in texts.T]
        return np.concatenate(columns, axis=1).astype(np.float32)


def _words(text: str | None) -> list[str]:
    if text is None:
        return ["(missing)"]
    return re.findall(r"\w+", text.lower()) or [text]


def finite_array(values: Any, size: int, name: str) -> np.ndarray:
    """`values` as float64 `[size]`; ValueError if they are anything else, or NaN or Inf."""
    array = np.array(values, dtype=np.float64)
    if array.shape != (size,) or not np.isfinite(array).all():
        raise ValueError(f"{name} is not {size} finite numbers")
    return array


def _new_scaler(scale: str) -> Any:
    module = require("sklearn.preprocessing", _PURPOSE)
    return module.StandardScaler() if scale == "standard" else module.MinMaxScaler()


def _new_encoder(categories: Any) -> Any:
    return require("sklearn.preprocessing", _PURPOSE).OneHotEncoder(
        categories=categories, handle_unknown="ignore", sparse_output=False, dtype=np.float32
    )
