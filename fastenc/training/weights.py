"""A model's weights and mode, kept and put back."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Snapshot:
    """A copy of a model's parameters and buffers, as they are when it is made or `take` is called."""

    def __init__(self, model: nn.Module) -> None:
        self._live: list[Tensor] = [*model.parameters(), *model.buffers()]
        self.kept = [tensor.detach().clone() for tensor in self._live]

    def take(self) -> None:
        """Copy the weights again, into the same memory."""
        self._copy(self._live, self.kept)

    def keep(self, tensors: list[Tensor]) -> None:
        """Take `tensors`, which another Snapshot of such a model has `kept`."""
        self._copy(tensors, self.kept)

    def restore(self) -> None:
        """Give the model the copy."""
        self._copy(self.kept, self._live)

    @torch.no_grad()
    def _copy(self, sources: list[Tensor], targets: list[Tensor]) -> None:
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)


@torch.no_grad()
def all_finite(model: nn.Module) -> bool:
    """Whether no parameter holds NaN or Inf.

    They stay in a sum, which on a CPU takes a tenth of the time of a largest value; that of large numbers may overflow.
    """
    parameters = list(model.parameters())
    if not all(parameter.is_cpu for parameter in parameters):  # waits for the device once
        return bool(nn.utils.get_total_norm(parameters, math.inf, foreach=True).isfinite())
    return all(math.isfinite(p.sum()) or bool(p.isfinite().all()) for p in parameters)


@contextmanager
def mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Train or eval mode inside; afterwards every submodule is as it was."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was_training in before:
            module.training = was_training
