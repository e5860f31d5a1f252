"""What a Preprocessor has learned: columns and steps, how they apply to rows, and how they are saved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from .arrays import DataError, row_list
from .columns import Columns
from .learning import Learner
from .steps import HashedText, finite_array, restore_encoder, restore_imputer, restore_scaler, scaler_state

if TYPE_CHECKING:
    from typing_extensions import Self

MISSING = ("impute", "drop", "error")
SCALES = ("standard", "minmax", "none")
TEXTS = ("one-hot", "hash")
DATES = ("refuse", "parts")
_CHUNK = 1 << 22  # values in float64 at a time: 32 MB, so that a large memory map stays on disk

_FORMAT = "fastenc.preprocessor"
_VERSION = 2  # 1 where nothing needs hashing or dates, so that an older fastenc reads what it can


@dataclass(frozen=True, eq=False)
class Block:
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


def block_rows(columns: int) -> int:
    """How many rows of so many columns are worked on at a time."""
    return max(1, _CHUNK // columns)


class Learned:
    """The options and what was learned under them; see `Preprocessor`, which learns it."""

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
    def from_dict(cls, state: Any) -> Self:
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
    def _restore(cls, state: dict[str, Any]) -> Self:
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

    def _blocks(self, table: Columns, order: list[int]) -> Iterator[Block]:
        numbers, texts = self._indices("number", order), self._indices("text", order)
        step = block_rows(len(order))
        for start in range(0, table.rows, step):
            rows = slice(start, min(start + step, table.rows))
            yield Block(
                np.arange(rows.start, rows.stop),
                table.numbers(rows, numbers),
                table.texts(rows, texts) if texts else np.empty((rows.stop - rows.start, 0), dtype=object),
            )

    def _without_missing(self, block: Block) -> Block:
        if self.missing == "impute" or not block.missing.any():
            return block
        keep = ~block.missing
        return Block(block.rows[keep], block.numbers[keep], block.texts[keep])

    def _imputed(self, block: Block) -> np.ndarray:
        return block.numbers if self._imputer is None else self._imputer.transform(block.numbers)

    def _scaled(self, block: Block) -> np.ndarray:
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

    def _refresh(self) -> None:
        """Take over what was learned meanwhile, if the attributes do not have it yet."""

    def _require_fit(self) -> None:
        self._refresh()
        if not self._columns:
            raise RuntimeError("this Preprocessor has learned nothing yet; call fit with the training rows first")
