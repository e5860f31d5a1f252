"""Preprocessor: columns of numbers and text to float32 rows, by what was learned on the training rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .arrays import DataError, is_arrow, is_frame, row_list
from .columns import Columns
from .dates import date_columns, with_parts
from .extras import require
from .learning import Learner
from .steps import (
    HashedText,
    check_categories,
    finite_array,
    medians_of,
    restore_encoder,
    restore_imputer,
    restore_scaler,
    scaler_of,
    scaler_state,
)

MISSING = ("impute", "drop", "error")
SCALES = ("standard", "minmax", "none")
TEXTS = ("one-hot", "hash")
DATES = ("refuse", "parts")

_FORMAT = "fastenc.preprocessor"
_VERSION = 2  # 1 where nothing needs hashing or dates, so that an older fastenc reads what it can
_CHUNK = 1 << 22  # values in float64 at a time: 32 MB, so that a large memory map stays on disk


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


class Preprocessor:
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

    def __init__(
        self,
        missing: str = "impute",
        scale: str = "standard",
        text: str = "one-hot",
        dates: str = "refuse",
        hash_size: int = 64,
    ) -> None:
        options = (
            ("missing", missing, MISSING),
            ("scale", scale, SCALES),
            ("text", text, TEXTS),
            ("dates", dates, DATES),
        )
        for name, value, known in options:
            if value not in known:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
        if not isinstance(hash_size, int) or hash_size < 1:
            raise ValueError(f"hash_size is {hash_size!r}; it must be a whole number of at least 1")
        self.missing = missing
        self.scale = scale
        self.text = text
        self.dates = dates
        self.hash_size = hash_size
        self._columns: dict[str, str] = {}  # name -> kind, in training order
        self._named = False
        self._imputer: Any = None
        self._scaler: Any = None
        self._encoder: Any = None
        self._date_names: list[str] = []
        self._learner: Learner | None = None  # of partial_fit
        self._stale = False  # whether it knows more than the attributes above

    @property
    def number_names(self) -> list[str]:
        """The number columns: the first features, and the columns of `inverse_transform`."""
        self._refresh()
        return self._names_of("number")

    @property
    def feature_names(self) -> list[str]:
        """The columns of `Prepared.x`: the number columns, then `column=category` for each text column."""
        self._refresh()
        names = self._names_of("number")
        if isinstance(self._encoder, HashedText):
            names += [f"{name}#{index}" for name in self._names_of("text") for index in range(self.hash_size)]
        elif self._encoder is not None:
            for name, categories in zip(self._names_of("text"), self._encoder.categories_, strict=True):
                names += [f"{name}={'(missing)' if category is None else category}" for category in categories]
        return names

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
        step = max(1, _CHUNK // len(order))
        for last in (False, True) if self.missing == "error" else (True,):  # refuse before anything is learned
            for start in range(0, table.rows, step):
                rows = slice(start, min(start + step, table.rows))
                block = _Block(
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
                block = _Block(start + block.rows, block.numbers, block.texts)
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

    def to_dict(self) -> dict[str, Any]:
        """What was learned, as JSON holds it without loss; RuntimeError if nothing is fitted yet."""
        self._require_fit()
        more: dict[str, Any] = {}
        if self.text != "one-hot" or self.dates != "refuse":
            more = {"text": self.text, "hash_size": self.hash_size, "dates": self.dates}
            more["date_columns"] = self._date_names
        return {
            "format": _FORMAT,
            "version": _VERSION if more else 1,
            "missing": self.missing,
            "scale": self.scale,
            **more,
            "named": self._named,
            "columns": list(self._columns),
            "kinds": list(self._columns.values()),
            "medians": None if self._imputer is None else self._imputer.statistics_.tolist(),
            "scaler": None if self._scaler is None else scaler_state(self.scale, self._scaler),
            "categories": [list(column) for column in getattr(self._encoder, "categories_", [])],
        }

    @classmethod
    def from_dict(cls, state: Any) -> Preprocessor:
        """The Preprocessor whose `to_dict` is `state`.

        Raises:
            DataError: `state` is something else, of a newer format, or broken.
        """
        if not isinstance(state, dict) or state.get("format") != _FORMAT:
            raise DataError("this is not a saved Preprocessor; give what Preprocessor.to_dict made")
        version = state.get("version")
        if isinstance(version, int) and version > _VERSION:
            raise DataError(f"the Preprocessor was saved in format {version}, newer than this fastenc; upgrade fastenc")
        try:
            return cls._restore(state)
        except (KeyError, TypeError, ValueError) as error:
            what = f"{error} is absent" if isinstance(error, KeyError) else str(error)
            raise DataError(f"the saved Preprocessor is broken: {what}; fit and save it again") from error

    @classmethod
    def _restore(cls, state: dict[str, Any]) -> Preprocessor:
        if state["version"] not in (1, _VERSION):
            raise ValueError(f"there is no format {state['version']!r}")
        if state["version"] == 1:
            new = cls(state["missing"], state["scale"])
        else:
            new = cls(state["missing"], state["scale"], state["text"], state["dates"], state["hash_size"])
            new._date_names = list(state["date_columns"])
            if not all(isinstance(name, str) for name in new._date_names):
                raise ValueError("a date column's name is no text")
        columns, kinds = state["columns"], state["kinds"]
        new._columns = dict(zip(columns, kinds, strict=True))
        new._named = bool(state["named"])
        if not columns or len(new._columns) < len(columns) or not all(isinstance(name, str) for name in columns):
            raise ValueError("the column names are not different texts")
        if not set(kinds) <= {"number", "text"}:
            raise ValueError("a column is neither number nor text")
        numbers = len(new.number_names)
        if numbers and new.missing == "impute":
            new._imputer = restore_imputer(finite_array(state["medians"], numbers, "medians"))
        if numbers and new.scale != "none":
            new._scaler = restore_scaler(new.scale, state["scaler"], numbers)
        if new.text == "hash":
            new._encoder = HashedText(new.hash_size) if len(kinds) > numbers else None
            return new
        if len(state["categories"]) != len(kinds) - numbers:
            raise ValueError("there are not as many lists of categories as text columns")
        if state["categories"]:
            new._encoder = restore_encoder(state["categories"])
        return new

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

    def _match(self, table: Columns) -> list[int]:
        """For each training column, the index of the table's column that it is found in."""
        if table.named and self._named:
            absent = [repr(name) for name in self._columns if name not in table.names]
            if absent:
                raise DataError(
                    f"the table has no column {', '.join(absent[:10])}{', ...' * (len(absent) > 10)}, which training "
                    "had; add what is absent, or train again without it"
                )
            index = {name: column for column, name in enumerate(table.names)}
            order = [index[name] for name in self._columns]
        elif len(table.names) != len(self._columns):
            raise DataError(
                f"the data has {len(table.names)} columns and training had {len(self._columns)}; give the same columns "
                "in the same order"
            )
        elif not table.named and self._names_of("text"):
            raise DataError(
                "training had a table with text columns and this is an array; give a table with their names"
            )
        else:
            order = list(range(len(table.names)))
        for name, column in zip(self._columns, order, strict=True):
            if table.kind(column) == "text" and self._columns[name] == "number":
                raise DataError(
                    f"column {table.names[column]!r} held numbers in training and holds text now; correct its values"
                )
        return order

    def _blocks(self, table: Columns, order: list[int]) -> Iterator[_Block]:
        numbers, texts = self._indices("number", order), self._indices("text", order)
        step = max(1, _CHUNK // len(order))
        for start in range(0, table.rows, step):
            rows = slice(start, min(start + step, table.rows))
            yield _Block(
                np.arange(rows.start, rows.stop),
                table.numbers(rows, numbers),
                table.texts(rows, texts) if texts else np.empty((rows.stop - rows.start, 0), dtype=object),
            )

    def _without_missing(self, block: _Block) -> _Block:
        if self.missing == "impute" or not block.missing.any():
            return block
        keep = ~block.missing
        return _Block(block.rows[keep], block.numbers[keep], block.texts[keep])

    def _imputed(self, block: _Block) -> np.ndarray:
        return block.numbers if self._imputer is None else self._imputer.transform(block.numbers)

    def _scaled(self, block: _Block) -> np.ndarray:
        """The block's numbers, filled in and scaled, in float32."""
        numbers = self._imputed(block)
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = (numbers if self._scaler is None else self._scaler.transform(numbers)).astype(np.float32)
        wide = np.argwhere(~np.isfinite(scaled))
        if len(wide):
            row, column = wide[0]
            raise DataError(
                f"column {self.number_names[column]!r} is {numbers[row, column]:g} in row {block.rows[row]} (counted "
                "from 0), too large for float32 after scaling; correct or remove that row"
                + (', or use scale="standard"' if self.scale == "none" else "")
            )
        return scaled

    def _refuse_missing(self, bad: np.ndarray, rows: int) -> None:
        if self.missing == "error" and len(bad):
            raise DataError(
                f'values are missing, NaN or Inf in {row_list(bad, rows)}; use missing="impute" or missing="drop"'
            )
        if self.missing == "drop" and len(bad) == rows:
            raise DataError(f'every row has a missing value, {rows} of {rows}; use missing="impute"')

    def _names_of(self, kind: str) -> list[str]:
        return [name for name, each in self._columns.items() if each == kind]

    def _indices(self, kind: str, order: list[int]) -> list[int]:
        return [column for column, each in zip(order, self._columns.values(), strict=True) if each == kind]

    def _require_fit(self) -> None:
        self._refresh()
        if not self._columns:
            raise RuntimeError("this Preprocessor has learned nothing yet; call fit with the training rows first")


def _as_frame(features: Any) -> Any:
    """A pyarrow table as a DataFrame; anything else as it is."""
    if not is_arrow(features):
        return features
    require("pandas", "preprocessing tables")
    return features.to_pandas()


@dataclass(frozen=True, eq=False)
class _Block:
    """Some rows: their indices `[n]`, numbers float64 `[n, numbers]` with NaN, texts object `[n, texts]` with None."""

    rows: np.ndarray
    numbers: np.ndarray
    texts: np.ndarray

    @cached_property
    def missing(self) -> np.ndarray:
        """Whether each row has a missing value: bool `[n]`."""
        return np.isnan(self.numbers).any(1) | (self.texts == None).any(1)  # noqa: E711

    @property
    def present(self) -> np.ndarray:
        """How many values each column has: int64 `[numbers + texts]`."""
        return np.concatenate([(~np.isnan(self.numbers)).sum(0), (self.texts != None).sum(0)])  # noqa: E711
