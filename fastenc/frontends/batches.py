"""Items of any length in batches: of nearly equal ones, so that little of a batch is padding."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from ..data import DataError
from .base import FrontEncoder
from .reader import Reader

KEPT_BYTES = 1 << 30  # of items that are kept in memory; the others are read again in each epoch
POOL = 32  # batches that are sorted by length together
ENCODED = 64  # items encoded at a time


class Items(Dataset):
    """Items behind a Reader: number -> array. All are read once at the start, so that a bad one is found at once.

    Args:
        reader: fitted.
        items: what it reads.

    Attributes:
        lengths: int64 `[items]`, as of `Reader.length`.
        sha256: of all that was read.
    """

    def __init__(self, reader: Reader, items: Sequence[Any]) -> None:
        self.reader, self.items = reader, items
        self._kept: dict[int, np.ndarray] = {}
        self.lengths = np.empty(len(items), np.int64)
        held, digest = 0, hashlib.sha256()
        for number, item in enumerate(items):
            array = reader.read(item)
            self.lengths[number] = reader.length(array)
            digest.update(f"{array.dtype.str} {array.shape} ".encode())
            digest.update(np.ascontiguousarray(array).data)
            held += array.nbytes
            if held <= KEPT_BYTES:
                self._kept[number] = array
        self.sha256 = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> tuple[int, np.ndarray]:
        kept = self._kept.get(number)
        return number, self.reader.read(self.items[number]) if kept is None else kept


class ByLength(Sampler[list[int]]):
    """Batches of rows of nearly the same length.

    Shuffled, rows are drawn in a random order, sorted by length within pools of POOL batches, cut into batches, and the
    batches of all pools are shuffled: any two rows can meet, and padding is nearly as little as if all were sorted.
    Otherwise the rows come longest first.

    Args:
        lengths: `[items]`, of each item.
        rows: which of the items.
        batch_size: rows in a batch; one of them takes what is left.
        seed: of the order; each epoch has another one. None: not shuffled.
    """

    def __init__(self, lengths: np.ndarray, rows: np.ndarray, batch_size: int, seed: int | None) -> None:
        self.lengths, self.rows, self.batch_size = lengths, np.asarray(rows), batch_size
        self._random = None if seed is None else np.random.default_rng(seed)

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        if self._random is None:
            yield from self._cut(self.rows)
            return
        order = self._random.permutation(self.rows)
        pool = POOL * self.batch_size
        batches = [batch for start in range(0, len(order), pool) for batch in self._cut(order[start : start + pool])]
        for number in self._random.permutation(len(batches)):
            yield batches[number]

    def _cut(self, rows: np.ndarray) -> list[list[int]]:
        rows = rows[np.argsort(-self.lengths[rows], kind="stable")]
        return [rows[start : start + self.batch_size].tolist() for start in range(0, len(rows), self.batch_size)]


def make_loader(
    items: Items,
    rows: np.ndarray,
    target: Tensor | Callable[[Tensor], Tensor],
    *,
    batch_size: int = 32,
    seed: int | None = None,
) -> DataLoader:
    """A DataLoader of (x, target) for `Trainer.fit`, of some of the items, by length.

    Args:
        rows: which of the items.
        target: of each item, `[items, ...]`, on the CPU: labels, or for an AutoEncoder what `summaries` gives; or a
            function of a batch, such as `FrontEncoder.summary`, which then makes it anew in each epoch.
        seed: of the order; None: not shuffled, for validation.
    """

    def collate(rows: list[tuple[int, np.ndarray]]) -> tuple[Tensor, Tensor]:
        x = items.reader.batch([array for _, array in rows])
        return x, target[[number for number, _ in rows]] if isinstance(target, Tensor) else target(x)

    return DataLoader(items, batch_sampler=ByLength(items.lengths, rows, batch_size, seed), collate_fn=collate)


def summaries(encoder: FrontEncoder, items: Items) -> Tensor:
    """What an AutoEncoder on `encoder` reconstructs, of each item: float32 [items, summary_features], on the CPU."""
    return torch.from_numpy(map_items(encoder.summary, items, next(encoder.parameters())))


def encode_items(model: nn.Module, items: Items) -> np.ndarray:
    """What `model`, which takes the batches of the items' reader, gives for each item: float32 [items, ...].

    In the items' order, without gradients, in eval mode.
    """
    was_training = model.training
    model.eval()
    try:
        return map_items(model, items, next(model.parameters()))
    finally:
        model.train(was_training)


@torch.inference_mode()
def map_items(function: Callable[[Tensor], Tensor], items: Items, place: Tensor) -> np.ndarray:
    """What `function` gives for each item, float32 [items, ...]; batches are on the device of `place`, in its dtype."""
    result: np.ndarray | None = None
    for numbers in ByLength(items.lengths, np.arange(len(items)), ENCODED, None):
        x = items.reader.batch([items[number][1] for number in numbers])
        x = x.to(place.device, place.dtype if x.is_floating_point() else None)
        out = function(x).float().cpu().numpy()
        if result is None:
            result = np.empty((len(items), *out.shape[1:]), np.float32)
        result[numbers] = out
    if result is None:
        raise DataError("there are no items; give at least one")
    return result
