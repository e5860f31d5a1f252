"""What is learned of a table that comes in chunks: each is seen once, and what is kept does not grow with the rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .arrays import DataError
from .columns import Kind

KEPT_VALUES = 1 << 25  # float64 values kept for the medians, 256 MB, of all columns together


class Learner:
    """Statistics of columns over chunks: equal to those over all rows at once, within rounding.

    The median of a column is exact up to KEPT_VALUES / columns values (at least 1,000), and beyond that the median of
    so many of them, drawn evenly at random.

    Attributes:
        names, named: of the columns, as of `Columns`.
        kinds: of each column so far; "empty" until a value is seen.
        rows, kept: how many rows were seen, and how many of them were learned from.
        count, mean, variance, low, high: float64 `[columns]` of the numbers seen.
        missing: int64 `[columns]`, the values that were missing in the kept rows.
        categories: of each column the different texts, without missing ones.
    """

    def __init__(self, names: Sequence[str], named: bool) -> None:
        columns = len(names)
        self.names, self.named = list(names), named
        self.kinds: list[Kind] = ["empty"] * columns
        self.rows = self.kept = 0
        self.count, self.mean, self.variance = np.zeros(columns), np.zeros(columns), np.zeros(columns)
        self.low, self.high = np.full(columns, np.inf), np.full(columns, -np.inf)
        self.missing = np.zeros(columns, np.int64)
        self.categories: list[set[str]] = [set() for _ in names]
        self._limit = max(1_000, KEPT_VALUES // columns)
        self._values: list[list[np.ndarray]] = [[] for _ in names]
        self._random = np.random.default_rng(0)

    def kinds_with(self, kinds: Sequence[Kind]) -> list[Kind]:
        """The kinds after a chunk whose columns are of `kinds`; DataError if a column would be of two."""
        merged: list[Kind] = []
        for name, old, new in zip(self.names, self.kinds, kinds, strict=True):
            if "empty" not in (old, new) and old != new:
                raise DataError(
                    f"column {name!r} holds {new}s and held {old}s in the rows before; make all of them numbers or "
                    "text, or remove the column"
                )
            merged.append(old if new == "empty" else new)
        return merged

    def add_numbers(self, column: int, values: np.ndarray) -> None:
        """Learn from `values`, float64 `[rows]` of one column; NaN is missing."""
        present = values[~np.isnan(values)]
        self.missing[column] += len(values) - len(present)
        if len(present) == 0:
            return
        old, new = self.count[column], float(len(present))
        with np.errstate(over="ignore", invalid="ignore"):
            # Two sets' mean and variance as one's: Chan, Golub, LeVeque, "Updating formulae" (1979).
            mean, total = present.mean(), old + new
            distance = mean - self.mean[column]
            squares = old * self.variance[column] + new * present.var() + distance**2 * old * new / total
            self.mean[column] += distance * new / total
            self.variance[column] = squares / total
        self.count[column] = total
        self.low[column] = min(self.low[column], present.min())
        self.high[column] = max(self.high[column], present.max())
        self._keep(column, present, int(old))

    def add_texts(self, column: int, texts: np.ndarray) -> None:
        """Learn from `texts`, object `[rows]` of one column; None is missing."""
        present = [text for text in texts if text is not None]
        self.categories[column].update(present)
        self.missing[column] += len(texts) - len(present)

    def median(self, column: int) -> float:
        return float(np.median(np.concatenate(self._values[column])))

    def filled(self, column: int, value: float) -> tuple[float, float]:
        """The mean and variance of the column with `value` where one is missing."""
        present, holes = self.count[column], float(self.missing[column])
        total = present + holes
        mean = (present * self.mean[column] + holes * value) / total
        squares = present * (self.variance[column] + (self.mean[column] - mean) ** 2) + holes * (value - mean) ** 2
        return float(mean), float(squares / total)

    def _keep(self, column: int, values: np.ndarray, seen: int) -> None:
        """Keep values for the median: all of them, or an even sample (Vitter's algorithm R)."""
        kept = self._values[column]
        room = max(0, self._limit - seen)
        if room:
            kept.append(values[:room].copy())
        rest = values[room:]
        if len(rest) == 0:
            return
        if len(kept) > 1:
            kept[:] = [np.concatenate(kept)]
        places = self._random.integers(0, np.arange(seen + room, seen + len(values)) + 1)
        inside = places < self._limit
        kept[0][places[inside]] = rest[inside]
