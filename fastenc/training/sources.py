"""Where batches come from: rows in memory (Rows) or a torch Dataset or DataLoader (Stream)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fastenc.data import DataError, as_rows, as_target

Batch = tuple[Tensor, Tensor, Tensor | None]  # x, target, and the rows' weights if they have any
_GATHER_BYTES = 1 << 20  # of rows gathered by one call: many small batches, or one large one


@dataclass(frozen=True)
class Rows:
    """All rows in memory, on the model's device, or in a memory map.

    x          [rows, features], the model's dtype
    target     [rows, ...]; x itself where there is no other
    read_only  whether what writes to x or target may end the process
    weight     [rows], x's dtype: how many times the loss of each row counts, in the mean over them all; None: once
    """

    x: Tensor
    target: Tensor
    read_only: bool = False
    weight: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    def part(self, rows: slice) -> Rows:
        """Some of the rows: a view."""
        x = self.x[rows]
        weight = None if self.weight is None else self.weight[rows]
        return Rows(x, x if self.target is self.x else self.target[rows], self.read_only, weight)

    def weighed(self, weight: Any, name: str) -> Rows:
        """The rows with these weights, an array [rows] of any kind; None leaves them as they are.

        Raises:
            DataError: another shape, or a weight that is negative, NaN or Inf.
        """
        if weight is None:
            return self
        weights = as_target(weight, len(self), name=name).double()
        if weights.ndim != 1:
            raise DataError(f"{name} has shape {list(weights.shape)}; give one number for each row, [{len(self)}]")
        if bool((weights < 0.0).any()):
            raise DataError(f"{name} holds negative numbers; give how often each row counts, 0 or more")
        return replace(self, weight=weights.to(self.x.device))

    def evened(self, name: str) -> Rows:
        """The rows with their weights scaled to a mean of 1, so that weighted sums over batches make the weighted mean.

        Raises:
            DataError: no row has a weight above 0.
        """
        if self.weight is None:
            return self
        mean = self.weight.mean()
        if mean == 0.0:
            raise DataError(f"all weights of {name} are 0; give some of its rows a weight above 0")
        return replace(self, weight=(self.weight / mean).to(self.x.dtype))

    def split(self, fraction: float) -> tuple[Rows, Rows]:
        """The first rows, and the last `fraction` of them, counted as Keras does.

        Raises:
            DataError: one of the two would be empty.
        """
        first = int(len(self) * (1.0 - fraction))
        if not 0 < first < len(self):
            raise DataError(
                f"validation_split={fraction} of {len(self)} rows leaves {first} to train on and {len(self) - first} "
                "to validate on; change it so that both have rows, or give validation_data"
            )
        return self.part(slice(first)), self.part(slice(first, None))

    def batches(self, batch_size: int, order: Tensor | None = None) -> Iterator[Batch]:
        """(x, target, weight) of `batch_size` rows each, the last one of what is left, in `order` (int64 [rows]).

        With an order, rows are gathered into memory that is used again: a batch is good until the next is asked for.
        So are rows that are read-only, since a model may write to its input.
        """
        if order is None and self.read_only:
            order = torch.arange(len(self), device=self.x.device)
        weight = self.weight if self.weight is None or order is None else self.weight[order]
        weights = itertools.repeat(None) if weight is None else iter(weight.split(batch_size))
        if order is None:
            yield from zip(self.x.split(batch_size), self.target.split(batch_size), weights, strict=False)
            return
        row_bytes = max(1, self.x[0].nbytes + self.target[0].nbytes)
        span = min(len(order), batch_size * max(1, _GATHER_BYTES // (batch_size * row_bytes)))
        x_buffer = self.x.new_empty((span, *self.x.shape[1:]))
        target_buffer = x_buffer if self.target is self.x else self.target.new_empty((span, *self.target.shape[1:]))
        for chunk in order.split(span):
            x = target = torch.index_select(self.x, 0, chunk, out=x_buffer[: len(chunk)])
            if self.target is not self.x:
                target = torch.index_select(self.target, 0, chunk, out=target_buffer[: len(chunk)])
            yield from zip(x.split(batch_size), target.split(batch_size), weights, strict=False)


@dataclass(frozen=True)
class Stream:
    """Batches of a DataLoader, in its order and sizes, moved to the model's device and, where floating, its dtype."""

    loader: DataLoader
    name: str
    device: torch.device
    dtype: torch.dtype
    features: int | None

    def batches(self, batch_size: int | None = None) -> Iterator[Batch]:
        """(x, target, None) of each batch; the target is x where the loader gives no other. Its own batch size holds.

        Raises:
            DataError: no batches, a batch that is not x or (x, y), or x with another number of features.
        """
        batch = None
        for batch in self.loader:
            parts = list(batch) if isinstance(batch, (tuple, list)) else [batch]
            if len(parts) not in (1, 2) or not all(isinstance(part, Tensor) for part in parts):
                raise DataError(
                    f"{self.name} gives a {type(batch).__name__} for a batch; make it give x or (x, y) tensors"
                )
            x, target = self._move(parts[0]), self._move(parts[-1])
            if self.features is not None and x.shape[-1:] != (self.features,):
                raise DataError(
                    f"{self.name} gives batches of shape {list(x.shape)} and the model takes {self.features} features; "
                    "give it the columns that the model was made for"
                )
            yield x, x if len(parts) == 1 else target, None
        if batch is None:
            raise DataError(f"{self.name} gives no batches; give it at least one row, or set drop_last=False")

    def _move(self, part: Tensor) -> Tensor:
        return part.to(self.device, self.dtype if part.is_floating_point() else None, non_blocking=True)


def is_stream(x: Any) -> bool:
    return isinstance(x, (DataLoader, Dataset))


def make_stream(
    x: Any,
    y: Any,
    name: str,
    batch_size: int,
    shuffle: bool,
    device: torch.device,
    dtype: torch.dtype,
    features: int | None,
) -> Stream:
    """A DataLoader as it is; a Dataset in batches of `batch_size`, shuffled if it can be."""
    if y is not None:
        raise DataError(f"{name} is a {type(x).__name__}, which gives its targets itself; leave out the other argument")
    if not isinstance(x, DataLoader):
        if not isinstance(x, IterableDataset) and len(x) == 0:
            raise DataError(f"{name} has no rows; give at least one")
        x = DataLoader(x, batch_size, shuffle=shuffle and not isinstance(x, IterableDataset))
    return Stream(x, name, device, dtype, features)


def make_rows(
    x: Any, y: Any, names: tuple[str, str], device: torch.device, dtype: torch.dtype, features: int | None
) -> Rows:
    """Arrays of any kind that `fastenc.data.as_rows` and `as_target` take, on the device. y None: the target is x.

    Memory is shared where it can be: memory maps may be larger than memory.
    """
    rows = as_rows(x, name=names[0], dtype=dtype, features=features, writable=not _is_read_only(x))
    target = None if y is None else as_target(y, len(rows), name=names[1], writable=not _is_read_only(y)).to(device)
    rows = rows.to(device)
    read_only = device.type == "cpu" and (_is_read_only(x) or _is_read_only(y))
    return Rows(rows, rows if target is None else target, read_only)


def _is_read_only(array: Any) -> bool:
    return isinstance(array, np.ndarray) and not array.flags.writeable
