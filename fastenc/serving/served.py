"""ServedModel: a saved model as requests see it, whatever kind of data it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..data.dates import PARTS
from ..pipeline import SavedModel, run_in_chunks

TABLES = (".csv", ".npy", ".parquet")
TEXT_KINDS = ("text", "sequence")  # whose items are texts, not files: what JSON can hold
ITEMS_AT_ONCE = 64  # padded together


@dataclass(frozen=True, eq=False)
class Inputs:
    """What one request asks for.

    Attributes:
        rows: float32 `[rows, features]`, or a list of arrays that a Reader gave.
        names: of each, for people; None where they are rows of a table.
        source_rows: `[rows]`, of each its row in what was sent, where some have been left out; None where none were.
        dropped: how many rows were left out because a value was missing.
        unseen: how many texts were in no category.
    """

    rows: Any
    names: Sequence[str] | None = None
    source_rows: np.ndarray | None = None
    dropped: int = 0
    unseen: int = 0

    def __len__(self) -> int:
        return len(self.rows)


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
            parts = {f"{name}.{part}" for name in self.dates for part in PARTS}
            if state["named"]:
                self.takes_arrays = set(state["kinds"]) == {"number"}
                self.columns = [name for name in state["columns"] if name not in parts] + self.dates
            else:
                self.numbers = len(state["columns"])
        self.encode([np.zeros((1, self.in_features), np.float32)])  # so that the first request is as quick as others

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

    def encode(self, requests: Sequence[Any]) -> list[np.ndarray]:
        """`Inputs.rows` of some requests -> their vectors, float32 `[rows, width]` each.

        What a row gives does not depend on what else is in the call, but for rounding: a product of matrices may add
        up in another order for another number of rows.
        """
        lengths = [len(rows) for rows in requests]
        if self.reader is None:
            vectors = np.concatenate(list(run_in_chunks(self.saved.encoder, np.concatenate(requests))))
        else:
            vectors = self._encode_items([array for rows in requests for array in rows])
        return np.split(vectors, np.cumsum(lengths)[:-1])

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
