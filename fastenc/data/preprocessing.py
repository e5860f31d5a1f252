"""Preprocessor: columns of numbers and text to float32 rows, by what was learned on the training rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arrays import DataError, is_arrow, is_frame
from .columns import Columns
from .dates import date_columns, with_parts
from .extras import require
from .learned import DATES, MISSING, SCALES, TEXTS, Block, Learned, block_rows
from .learning import Learner
from .steps import HashedText, check_categories, medians_of, restore_encoder, restore_imputer, scaler_of

__all__ = ["DATES", "MISSING", "SCALES", "TEXTS", "Prepared", "Preprocessor"]


@dataclass(frozen=True, eq=False)
class Prepared:
    """What `Preprocessor.transform` made.

    Attributes:
        x: float32 `[kept, features]`, finite.
        rows: int64 `[kept]`, the row of the source that each row of `x` came from.
        dropped: how many rows of the source are left out because a value was missing.
        unseen: how many values of text columns were in no category, and are zeros in `x`.
    """

    x: np.ndarray
    rows: np.ndarray
    dropped: int
    unseen: int


class Preprocessor(Learned):
    """Fills in or drops missing values, scales numbers, and turns text into one column per category.

    Args:
        missing: what to do about rows with missing values: "impute" fills numbers with the column's training median
            and makes missing text a category of its own; "drop" leaves the row out; "error" refuses it.
        scale: of number columns, after filling in: "standard" (mean 0, standard deviation 1 over the training rows),
            "minmax" (0 to 1 over the training rows) or "none". A column that is constant in training is only shifted,
            so that its value there becomes 0.
        text: of text, categorical and boolean columns: "one-hot" makes a column of each category, "hash" makes
            `hash_size` columns of counts of words (see `steps.HashedText`), for many different texts or sentences.
        dates: "refuse" refuses columns of dates; "parts" makes number columns of them (see `dates.with_parts`).
        hash_size: how many columns a text becomes with "hash".

    NaN, Inf and nulls are missing values. One-hot columns stand for the categories seen in training; a value that is in
    none of them, also a missing one if training had none, is all zeros. Arrays hold numbers only.

    The columns of a table are found by name: order does not matter, and columns that training did not have are ignored,
    so that a file with labels can be encoded as it is. The columns of an array are matched by count, as are those of a
    table if training had an array.

    Statistics are computed in float64; the result is float32. Needs scikit-learn, of `fastenc[app]`.
    """

    def fit(self, features: Any) -> Preprocessor:
        """Learn from `features`, an array or table `[rows, columns]` of training rows only.

        Raises:
            DataError: what `Columns` refuses; a column with nothing but missing values, or with more than
                `steps.MAX_CATEGORIES` categories; missing values if `missing` is "error", or in every row if it is
                "drop"; or numbers too large to have a variance or a range in float64.
        """
        # A fit that fails leaves self as it was.
        fresh = Preprocessor(self.missing, self.scale, self.text, self.dates, self.hash_size)
        features = _as_frame(features)
        fresh._date_names = date_columns(features) if self.dates == "parts" and is_frame(features) else []
        table = Columns(with_parts(features, fresh._date_names))
        fresh._learner = Learner(table.names, table.named, medians=False)
        fresh._learn(table)
        fresh._refresh(lambda columns: medians_of(table, columns))
        fresh._learner = None
        self.__dict__.update(fresh.__dict__)
        return self

    def partial_fit(self, features: Any, *, row_numbers: np.ndarray | None = None) -> Preprocessor:
        """Learn from some more training rows: each chunk is seen once, and memory does not grow with their number.

        What is learned is what `fit` learns from all of them at once, to the last bit, but for medians of very many
        values: see `learning.Learner`. A column may be empty in some chunks, and not in all of them. `row_numbers`
        `[rows]` are what to call the rows in errors; None counts all that were given.

        Raises:
            DataError: as `fit`; also a chunk with other columns than the first, or with text where numbers were. What
                only all chunks together can show, a column without any value, is raised when it is used.
            RuntimeError: this was fitted by `fit`, or loaded, and has nothing to go on from.
        """
        if self._learner is None and self._columns:
            raise RuntimeError("partial_fit goes on from partial_fit only; make a new Preprocessor for it")
        features = _as_frame(features)
        first = self._learner is None
        if first and self.dates == "parts" and is_frame(features):
            self._date_names = date_columns(features)
        table = Columns(with_parts(features, self._date_names))
        if first:
            self._learner = Learner(table.names, table.named)
        self._learn(table, row_numbers)
        return self

    def _learn(self, table: Columns, row_numbers: np.ndarray | None = None) -> None:
        """Learn from some more rows: all of the learning that there is."""
        learner = self._learner
        assert learner is not None
        if table.named != learner.named or sorted(table.names) != sorted(learner.names):
            raise DataError(
                f"these rows have the columns {', '.join(table.names[:10])} and those before had "
                f"{', '.join(learner.names[:10])}; give the same columns in every chunk"
            )
        order = [table.names.index(name) for name in learner.names]
        kinds = learner.kinds_with([table.kind(column) for column in order])
        numbers = [index for index, kind in enumerate(kinds) if kind != "text"]
        texts = [index for index, kind in enumerate(kinds) if kind == "text"]
        step = block_rows(len(order))
        for last in (False, True) if self.missing == "error" else (True,):  # refuse before anything is learned
            for start in range(0, table.rows, step):
                rows = slice(start, min(start + step, table.rows))
                block = Block(
                    np.arange(rows.start, rows.stop),
                    table.numbers(rows, [order[index] for index in numbers]),
                    table.texts(rows, [order[index] for index in texts])
                    if texts
                    else np.empty((rows.stop - rows.start, 0), dtype=object),
                )
                if not last:
                    named = learner.rows + block.rows if row_numbers is None else row_numbers[rows]
                    self._refuse_missing(named[block.missing], learner.rows + table.rows)
                    continue
                learner.present[[*numbers, *texts]] += block.present
                block = self._without_missing(block)
                learner.kept += len(block.rows)
                for index, values in zip(numbers, block.numbers.T, strict=True):
                    learner.add_numbers(index, values)
                for index, values in zip(texts, block.texts.T, strict=True):
                    if self.text == "one-hot":
                        learner.add_texts(index, values)
                        check_categories(learner.names[index], len(learner.categories[index]))
        learner.kinds, learner.rows = kinds, learner.rows + table.rows
        self._stale = True

    def transform(self, features: Any) -> Prepared:
        """`features`, an array or table `[rows, columns]`, as float32 rows.

        Raises:
            DataError: what `Columns` refuses; a column that is absent, or held numbers in training and text now;
                missing values if `missing` is "error", or in every row if it is "drop"; or a value that float32 cannot
                hold after scaling.
            RuntimeError: nothing is fitted yet.
        """
        table = self._table(features)
        x = np.empty((table.rows, len(self.feature_names)), np.float32)
        rows = np.empty(table.rows, np.int64)
        kept = unseen = 0
        for part in self._prepared([table]):
            new = slice(kept, kept + len(part.rows))
            x[new], rows[new] = part.x, part.rows
            kept, unseen = new.stop, unseen + part.unseen
        return Prepared(x[:kept], rows[:kept], table.rows - kept, unseen)

    def transform_chunks(self, chunks: Iterable[Any]) -> Iterator[Prepared]:
        """What `transform` gives of all chunks put together, block by block: for rows that memory cannot hold at once.

        Rows are numbered through the chunks. A block may have no rows, if all of its own were dropped. Raises what
        `transform` does, where the chunk that shows the fault is reached.
        """
        return self._prepared(map(self._table, chunks))

    def _table(self, features: Any) -> Columns:
        self._require_fit()
        return Columns(with_parts(_as_frame(features), self._date_names))

    def _prepared(self, tables: Iterable[Columns]) -> Iterator[Prepared]:
        start = dropped = 0
        for table in tables:
            for block in self._blocks(table, self._match(table)):
                block = Block(start + block.rows, block.numbers, block.texts)
                if self.missing == "error":
                    self._refuse_missing(block.rows[block.missing], start + table.rows)
                whole, block = len(block.rows), self._without_missing(block)
                dropped += whole - len(block.rows)
                numbers = block.numbers.shape[1]
                x, unseen = np.empty((len(block.rows), len(self.feature_names)), np.float32), 0
                if len(x):
                    x[:, :numbers] = self._scaled(block)
                    if self._encoder is not None:
                        made = self._encoder.transform(block.texts)
                        if self.text == "one-hot":
                            unseen = block.texts.size - int(np.count_nonzero(made))
                        x[:, numbers:] = made
                yield Prepared(x, block.rows, whole - len(x), unseen)
            start += table.rows
        if dropped == start:
            self._refuse_missing(np.arange(start), start)

    def inverse_transform(self, x: Any) -> np.ndarray:
        """The number columns of `x` in their own units: `[rows, features] -> float64 [rows, numbers]`.

        The columns are `number_names`. The one-hot columns of `x` are left out: a reconstruction has no one category.

        Raises:
            DataError: `x` does not have as many columns as there are `feature_names`.
            RuntimeError: nothing is fitted yet.
        """
        self._require_fit()
        width = len(self.feature_names)
        x = np.asarray(x, dtype=np.float64)
        if x.ndim != 2 or x.shape[1] != width:
            raise DataError(f"x has shape {list(x.shape)}; give [rows, {width}], as transform makes them")
        numbers = x[:, : len(self.number_names)]
        return numbers.copy() if self._scaler is None else self._scaler.inverse_transform(numbers)

    def _refresh(self, medians: Callable[[list[int]], np.ndarray] | None = None) -> None:
        """Take over what was learned; `medians` finds those of columns where the learner has not kept the values."""
        learner = self._learner
        if learner is None or not self._stale:
            return
        if not learner.present.all():
            name = learner.names[int(np.argmin(learner.present))]
            raise DataError(f"column {name!r} has no value in any of the {learner.rows} training rows; remove it")
        if learner.kept == 0:
            self._refuse_missing(np.arange(learner.rows), learner.rows)
        columns = {kind: [i for i, each in enumerate(learner.kinds) if each == kind] for kind in ("number", "text")}
        made = [learner.numbers[index].finished() for index in columns["number"]]
        self._columns, self._named = dict(zip(learner.names, learner.kinds, strict=True)), learner.named
        self._imputer = self._scaler = self._encoder = None
        self._stale = False
        if numbers := columns["number"]:
            statistics = [(each.mean, each.variance) for each in made]
            if self.missing == "impute":
                values = np.array([each.median() for each in made]) if medians is None else medians(numbers)
                self._imputer = restore_imputer(values)
                holes = learner.missing[numbers].tolist()
                statistics = [each.filled(*pair) for each, *pair in zip(made, values.tolist(), holes, strict=True)]
            mean, variance = np.array(statistics).T
            low, high = (np.array([getattr(each, name) for each in made]) for name in ("low", "high"))
            names = [learner.names[index] for index in numbers]
            self._scaler = scaler_of(self.scale, mean, variance, low, high, names)
        if texts := columns["text"]:
            self._encoder = HashedText(self.hash_size)
            if self.text == "one-hot":
                # As scikit-learn orders them: missing last.
                self._encoder = restore_encoder(
                    [
                        [*sorted(learner.categories[index]), *([None] if learner.missing[index] else [])]
                        for index in texts
                    ]
                )


def _as_frame(features: Any) -> Any:
    """A pyarrow table as a DataFrame; anything else as it is."""
    if not is_arrow(features):
        return features
    require("pandas", "preprocessing tables")
    return features.to_pandas()
