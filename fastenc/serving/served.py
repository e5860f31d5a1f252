"""ServedModel: a saved model as requests see it, whatever kind of data it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..data import DataError, Prepared
from ..data.dates import PARTS
from ..data.extras import require
from ..pipeline import SavedModel, run_in_chunks

TABLES = (".csv", ".npy", ".parquet")
TEXT_KINDS = ("text", "sequence")  # whose items are texts, not files: what JSON can hold
ITEMS_AT_ONCE = 64  # padded together


@dataclass(frozen=True, eq=False)
class Inputs:
    """What one request sends.

    Attributes:
        rows: an array or a DataFrame `[rows, columns]`, not yet prepared; or a list of arrays that a Reader gave.
        shown: what to call it in errors.
        names: of each row, for people; None where they are rows of a table.
    """

    rows: Any
    shown: str = "the rows"
    names: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, eq=False)
class Encoded:
    """What one request gets.

    Attributes:
        vectors: float32 `[kept, width]`.
        source_rows: `[kept]`, of each its row in what was sent, where some have been left out; None where none were.
        dropped: how many rows were left out because a value was missing.
        unseen: how many texts were in no category.
    """

    vectors: np.ndarray
    source_rows: np.ndarray | None = None
    dropped: int = 0
    unseen: int = 0


class ServedModel:
    """A saved model, and what is to be known of it to read requests.

    Attributes:
        saved: the model.
        reader: of a model with a front end; None where the inputs are rows.
        columns: names of the columns of the tables it takes; None where it takes arrays or items.
        dates: those of them that hold dates.
        in_features: numbers of a row as the encoder takes it; None for items.
        numbers: of a row as clients send it, where they are arrays or tables without names; None for items.
        takes_arrays: whether rows may come as numbers without names.
        width: numbers of a vector.
        endings: of the files that it takes.
    """

    def __init__(self, saved: SavedModel) -> None:
        self.saved = saved
        self.reader = saved.reader
        self.width: int = saved.encoder.out_features
        self.columns: list[str] | None = None
        self.dates: list[str] = []
        self.in_features: int | None = None
        self.numbers: int | None = None
        self.takes_arrays = True
        self._number_names: set[str] = set()
        self.endings = TABLES
        if self.reader is not None:
            # Texts and series come in tables, too.
            tables = (".csv", ".parquet") if self.reader.kind == "text" else ()
            self.endings = tuple(dict.fromkeys((*self.reader.suffixes, *tables)))
            return
        self.in_features = self.numbers = saved.encoder.in_features
        if saved.preprocessor is not None:
            state = saved.preprocessor.to_dict()
            self.dates = state.get("date_columns", [])
            self._number_names = {
                name for name, kind in zip(state["columns"], state["kinds"], strict=True) if kind == "number"
            }
            parts = {f"{name}.{part}" for name in self.dates for part in PARTS}
            if state["named"]:
                self.takes_arrays = set(state["kinds"]) == {"number"}
                self.columns = [name for name in state["columns"] if name not in parts] + self.dates
            else:
                self.numbers = len(state["columns"])
        self._run([np.zeros((1, self.in_features), np.float32)])  # so that the first request is as quick as others

    @property
    def kind(self) -> str:
        return "table" if self.reader is None else self.reader.kind

    def describe(self) -> dict[str, Any]:
        """Of the model what clients need; nothing of where it lies."""
        found: dict[str, Any] = {"class": type(self.saved.model).__name__, "kind": self.kind, "width": self.width}
        if self.columns is not None:
            found["columns"] = self.columns
        elif self.numbers is not None:
            found["numbers"] = self.numbers
        found["files"] = list(self.endings)
        found["texts"] = self.kind in TEXT_KINDS
        return found

    def encode(self, requests: Sequence[Inputs]) -> list[Encoded]:
        """What each of some requests gets: prepared together, and encoded in one call.

        What a row gives does not depend on what else is in the call, but for rounding: a product of matrices may add
        up in another order for another number of rows.

        Raises:
            DataError: one of the requests cannot be used.
        """
        if self.reader is not None:
            vectors = self._encode_items([array for request in requests for array in request.rows])
            return [Encoded(each) for each in np.split(vectors, np.cumsum([len(each) for each in requests])[:-1])]
        prepared = self._prepare(requests)
        return [
            Encoded(vectors, each.rows if each.dropped else None, each.dropped, each.unseen)
            for vectors, each in zip(self._run([each.x for each in prepared]), prepared, strict=True)
        ]

    def _prepare(self, requests: Sequence[Inputs]) -> list[Prepared]:
        """Preprocessing works row by row, and its cost is nearly all by the call."""
        joined = self._join([request.rows for request in requests])
        whole = None if joined is None else self._prepare_one(Inputs(joined))
        if whole is None or whole.unseen:  # of which request is not known
            return [self._prepare_one(request) for request in requests]
        ends = np.cumsum([len(request) for request in requests])
        cuts = np.searchsorted(whole.rows, ends)
        parts = []
        for request, start, low, high in zip(requests, [0, *ends[:-1]], [0, *cuts[:-1]], cuts, strict=True):
            if low == high:  # all of its rows have missing values: an error, which says so
                parts.append(self._prepare_one(request))
                continue
            kept = slice(low, high)
            parts.append(Prepared(whole.x[kept], whole.rows[kept] - start, len(request) - (high - low), 0))
        return parts

    def _prepare_one(self, request: Inputs) -> Prepared:
        try:
            return self.saved.prepare(request.shown, request.rows)
        except OverflowError as error:
            raise DataError(f"{request.shown}: a number is too large for float64; correct it") from error

    def _join(self, tables: Sequence[Any]) -> Any:
        """Tables or arrays as one; None for one alone, and where a column would become of another type."""
        first = tables[0]
        if len(tables) == 1 or any(type(table) is not type(first) for table in tables):
            return None
        if isinstance(first, np.ndarray):
            return np.concatenate(tables) if len({table.shape[1] for table in tables}) == 1 else None
        if not all(list(table.columns) == list(first.columns) for table in tables):
            return None
        for column, *types in zip(first.columns, *(table.dtypes for table in tables), strict=True):
            numbers = column in self._number_names and all(each.kind in "iuf" for each in types)
            if not numbers and any(each != types[0] for each in types):
                return None
        return require("pandas", "preprocessing tables").concat(tables, ignore_index=True)

    def _run(self, blocks: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The vectors of each of some blocks of prepared rows."""
        vectors = np.concatenate(list(run_in_chunks(self.saved.encoder, np.concatenate(blocks))))
        return np.split(vectors, np.cumsum([len(block) for block in blocks])[:-1])

    def _encode_items(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Those of about the same length together, so that little of a batch is padding."""
        assert self.reader is not None
        place = next(self.saved.encoder.parameters())
        vectors = np.empty((len(arrays), self.width), np.float32)
        order = np.argsort([self.reader.length(array) for array in arrays], kind="stable")
        for start in range(0, len(order), ITEMS_AT_ONCE):
            chosen = order[start : start + ITEMS_AT_ONCE]
            x = self.reader.batch([arrays[number] for number in chosen])
            with torch.inference_mode():
                x = x.to(place.device, place.dtype if x.is_floating_point() else None)
                vectors[chosen] = self.saved.encoder(x).float().cpu().numpy()
        return vectors
