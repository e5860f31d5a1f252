"""Rows and batches that are other ones in each epoch: augmentation outside of the training step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fastenc.data import DataError
from fastenc.data.augmentation import Augmentation, Mixup, augment_rows, mixes

from .losses import LossFunction, loss_name
from .sources import Batch, Rows, Stream
from .weights import mode

Augment = Augmentation | Mixup | Sequence[Augmentation | Mixup]


@dataclass(frozen=True)
class AugmentedRows(Rows):
    """Rows of its own that `renew` fills: whole steps go on reading the same memory.

    clean    what is augmented; where its target is x itself, the target here is the clean x
    """

    clean: Rows | None = None
    augment: Augment = ()

    def renew(self) -> None:
        """Augment all rows anew."""
        assert self.clean is not None
        x, target = augment_rows(self.augment, self.clean.x, self.clean.target)
        self.x.copy_(x)
        if mixes(self.augment):
            self.target.copy_(target)


@dataclass(frozen=True)
class AugmentedStream(Stream):
    """A Stream each batch of which is augmented."""

    augment: Augment = ()

    def batches(self, batch_size: int | None = None) -> Iterator[Batch]:
        for x, target, weight in super().batches(batch_size):
            yield *augment_rows(self.augment, x, target), weight


def augmented(source: Rows | Stream, augment: Augment, model: nn.Module, loss: str | LossFunction) -> Rows | Stream:
    """`source`, augmented. For rows a copy of x is made, and of the target if it is mixed.

    Raises:
        DataError: labels cannot be mixed for this loss, or where they come from a Dataset or DataLoader; mixed rows
            that have weights.
    """
    if isinstance(source, Stream):
        if mixes(augment) and loss_name(loss) == "cross_entropy":
            raise DataError(f"Mixup needs arrays to mix labels, and {source.name} is a Dataset or DataLoader")
        return AugmentedStream(**vars(source), augment=augment)
    clean = source
    if not mixes(augment):
        return AugmentedRows(clean.x.clone(), clean.target, clean.read_only, clean.weight, clean, augment)
    if clean.weight is not None:
        raise DataError("Mixup mixes rows, and sample_weight weighs single ones; leave one of them out")
    if not clean.target.is_floating_point():
        if loss_name(loss) != "cross_entropy":
            raise DataError("Mixup mixes targets, and labels can be mixed for loss='cross_entropy' only; use that")
        with mode(model, training=False), torch.inference_mode():
            classes = model(clean.x[:1].clone()).shape[1]
        clean = Rows(clean.x, nn.functional.one_hot(clean.target, classes).to(clean.x.dtype), clean.read_only)
    return AugmentedRows(clean.x.clone(), clean.target.clone(), clean=clean, augment=augment)
