"""The training steps of one epoch, taken one operation after another."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .losses import LossFunction
from .sources import Rows
from .update import Update

AfterStep = Callable[[int, Tensor], bool]


def train_rows(
    model: nn.Module,
    loss: LossFunction,
    update: Update,
    rows: Rows,
    order: Tensor | None,
    batch_size: int,
    after_step: AfterStep | None = None,
) -> tuple[Tensor, Tensor]:
    """One epoch over `rows` in `order` (int64 [rows]; None: as they are); arguments and result as `train_batches`."""
    return train_batches(model, loss, update, rows.batches(batch_size, order), after_step)


def train_batches(
    model: nn.Module,
    loss: LossFunction,
    update: Update,
    batches: Iterable[tuple[Tensor, Tensor]],
    after_step: AfterStep | None = None,
) -> tuple[Tensor, Tensor]:
    """One step for each batch: forward, loss, backward, update.

    Args:
        batches: (x, target) of at least one row each.
        after_step: called with the step's number and its loss [] after each step; True ends the epoch.

    Returns: the steps' losses and numbers of rows, both [steps], on the loss's device and on the CPU. Nothing waits for
    the device before the end.
    """
    parameters = list(model.parameters())
    losses: list[Tensor] = []
    counts: list[int] = []
    for x, target in batches:
        update.begin()
        value = take_step(model, parameters, loss, update, x, target)
        losses.append(value)
        counts.append(x.shape[0])
        if after_step is not None and after_step(len(losses) - 1, value):
            break
    return torch.stack(losses), torch.tensor(counts, device="cpu")


def take_step(
    model: nn.Module,
    parameters: list[nn.Parameter],
    loss: LossFunction,
    update: Update,
    x: Tensor,
    target: Tensor,
) -> Tensor:
    """One step that `update` has begun: gradients afresh, forward, loss, backward, update.

    Returns: the loss before the update, [], without gradient and without the l1 penalty.
    """
    for parameter in parameters:  # what zero_grad does, without its bookkeeping
        parameter.grad = None
    value = loss(model(x), target)
    value.backward()
    update.apply(parameters)
    torch.clear_autocast_cache()  # around a whole fit, autocast would go on with casts of the weights of before
    return value.detach()
