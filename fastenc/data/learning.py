"""What is learned of a table that comes in chunks: each is seen once, and what is kept does not grow with the rows."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np

from .arrays import DataError
from .columns import Kind

KEPT_VALUES = 1 << 25  # float64 values kept for the medians, 256 MB, of all columns together
_BLOCK = 2_048  # values of a column that are learned from at a time, whatever chunks they came in


class Numbers:
    """Statistics of a column of numbers: the same bits however its values are cut into calls of `add`.

    Attributes:
        count, mean, variance, low, high: of the values seen, but for the last ones of `add`: see `finished`.
    """

    def __init__(self, limit: int) -> None:
        self.count, self.mean, self.variance = 0.0, 0.0, 0.0
        self.low, self.high = np.inf, -np.inf
        self._limit = limit
        self._kept: list[np.ndarray] = []
        self._rest: list[np.ndarray] = []  # not a block yet
        self._random: np.random.Generator | None = None

    def add(self, values: np.ndarray) -> None:
        """Learn from `values`, float64 `[n]` without NaN, which this keeps."""
        self._rest.append(values)
        if sum(map(len, self._rest)) >= _BLOCK:
            values = np.concatenate(self._rest)
            whole = len(values) // _BLOCK * _BLOCK
            for block in np.split(values[:whole], whole // _BLOCK):
                self._learn(block)
            self._rest = [values[whole:].copy()]

    def finished(self) -> Numbers:
        """The same with every value learned; this goes on."""
        if not any(map(len, self._rest)):
            return self
        done = copy.deepcopy(self)
        done._learn(np.concatenate(self._rest))
        done._rest = []
        return done

    def median(self) -> float:
        return float(np.median(np.concatenate(self._kept)))

    def filled(self, value: float, holes: int) -> tuple[float, float]:
        """The mean and variance with `value` in as many places more."""
        total = self.count + holes
        mean = (self.count * self.mean + holes * value) / total
        with np.errstate(over="ignore"):
            squares = self.count * (self.variance + (self.mean - mean) ** 2) + holes * np.square(value - mean)
        return mean, squares / total

    def _learn(self, block: np.ndarray) -> None:
        old, new = self.count, float(len(block))
        with np.errstate(over="ignore", invalid="ignore"):
            # Two sets' mean and variance as one's: Chan, Golub, LeVeque, "Updating formulae" (1979).
            mean, total = block.mean(), old + new
            distance = mean - self.mean
            squares = old * self.variance + new * block.var() + distance**2 * old * new / total
            self.mean += distance * new / total
            self.variance = squares / total
        self.count = total
        self.low, self.high = min(self.low, block.min()), max(self.high, block.max())
        if self._limit:
            self._keep(block, int(old))

    def _keep(self, values: np.ndarray, seen: int) -> None:
        """Keep values for the median: all of them, or an even sample (Vitter's algorithm R)."""
        room = max(0, self._limit - seen)
        if room:
            self._kept.append(values[:room].copy())
        rest = values[room:]
        if len(rest) == 0:
            return
        if len(self._kept) > 1:
            self._kept = [np.concatenate(self._kept)]
        self._random = self._random or np.random.default_rng(0)
        places = self._random.integers(0, np.arange(seen + room, seen + len(values)) + 1)
        inside = places < self._limit
        self._kept[0][places[inside]] = rest[inside]


class Learner:
    """Statistics of columns over chunks, the same bits however the rows are cut into chunks.

    The median of a column is exact up to KEPT_VALUES / columns values (at least 1,000), and beyond that the median of
    so many of them, drawn evenly at random.

    Attributes:
        names, named: of the columns, as of `Columns`.
        kinds: of each column so far; "empty" until a value is seen.
        rows, kept: how many rows were seen, and how many of them were learned from.
        numbers: the statistics of each column's numbers.
        present: int64 `[columns]`, how many values were seen, also in rows that are not learned from.
        missing: int64 `[columns]`, the values that were missing in the kept rows.
        categories: of each column the different texts, without missing ones.
    """

    def __init__(self, names: Sequence[str], named: bool, *, medians: bool = True) -> None:
        self.names, self.named = list(names), named
        self.kinds: list[Kind] = ["empty"] * len(names)
        self.rows = self.kept = 0
        limit = max(1_000, KEPT_VALUES // len(names)) if medians else 0
        self.numbers = [Numbers(limit) for _ in names]
        self.present = np.zeros(len(names), np.int64)
        self.missing = np.zeros(len(names), np.int64)
        self.categories: list[set[str]] = [set() for _ in names]

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
        if len(present):
            self.numbers[column].add(present)

    def add_texts(self, column: int, texts: np.ndarray) -> None:
        """Learn from `texts`, object `[rows]` of one column; None is missing."""
        present = [text for text in texts if text is not None]
        self.categories[column].update(present)
        self.missing[column] += len(texts) - len(present)
