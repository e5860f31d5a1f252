"""The training steps of one epoch, taken one operation after another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor, nn

from .losses import LossFunction, weighted_loss
from .sources import Batch, Rows
from .update import Update

BeforeStep = Callable[[int], None]
AfterStep = Callable[[int, Tensor], bool]


def train_rows(
    model: nn.Module,
    loss: LossFunction,
    update: Update,
    rows: Rows,
    order: Tensor | None,
    batch_size: int,
    after_step: AfterStep | None = None,
    before_step: BeforeStep | None = None,
) -> tuple[Tensor, Tensor]:
    """One epoch over `rows` in `order` (int64 [rows]; None: as they are); arguments and result as `train_batches`."""
    return train_batches(model, loss, update, rows.batches(batch_size, order), after_step, before_step)


def train_batches(
    model: nn.Module,
    loss: LossFunction,
    update: Update,
    batches: Iterable[Batch],
    after_step: AfterStep | None = None,
    before_step: BeforeStep | None = None,
) -> tuple[Tensor, Tensor]:
    """One step for each batch: forward, loss, backward, update; or an update for every few of them.

    Args:
        batches: (x, target, weight of each row or None) of at least one row each.
        after_step: called with the step's number and its loss [] after each step; True ends the epoch.
        before_step: called with the step's number before each step.

    Gradients of `update.accumulate` batches, the last time of what is left, make one update: it is that of the mean
    loss over all their rows.

    Returns: the steps' losses and numbers of rows, both [steps], on the loss's device and on the CPU. Nothing waits for
    the device before the end.
    """
    parameters = list(model.parameters())
    losses: list[Tensor | float] = []
    counts: list[int] = []
    pending = 0  # batches whose gradients wait for their update
    for x, target, weight in batches:
        if before_step is not None:
            before_step(len(losses))
        if pending == 0:
            update.begin()
        if update.accumulate == 1:
            value = take_step(model, parameters, loss, update, x, target, weight)
        else:
            value = _add_gradients(model, parameters, loss, update, x, target, weight, first=pending == 0)
            pending += 1
        # On the CPU a number: a small tensor kept of each step would lie between the large ones of the next, which then
        # find no room there, and the memory would grow with every step.
        losses.append(value.item() if value.is_cpu else value)
        counts.append(x.shape[0])
        if pending == update.accumulate:
            _apply_mean(parameters, update, sum(counts[-pending:]))
            pending = 0
        if after_step is not None and after_step(len(losses) - 1, value):
            break
    if pending:
        _apply_mean(parameters, update, sum(counts[-pending:]))
    counted = torch.tensor(counts, device="cpu")
    if value.is_cpu:
        return torch.tensor(losses, dtype=value.dtype, device="cpu"), counted
    return torch.stack(cast("list[Tensor]", losses)), counted


def take_step(
    model: nn.Module,
    parameters: list[nn.Parameter],
    loss: LossFunction,
    update: Update,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
) -> Tensor:
    """One step that `update` has begun: gradients afresh, forward, loss, backward, update.

    Returns: the loss before the update, [], without gradient and without the l1 penalty.
    """
    for parameter in parameters:  # what zero_grad does, without its bookkeeping
        parameter.grad = None
    value = _loss_of(loss, model(x), target, weight)
    update.backward(value)
    update.apply(parameters)
    torch.clear_autocast_cache()  # around a whole fit, autocast would go on with casts of the weights of before
    return value.detach()


def _add_gradients(
    model: nn.Module,
    parameters: list[nn.Parameter],
    loss: LossFunction,
    update: Update,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    first: bool,
) -> Tensor:
    """Add the gradients of a batch, times its rows, to those of the batches before it; its loss []."""
    if first:
        for parameter in parameters:
            parameter.grad = None
    value = _loss_of(loss, model(x), target, weight)
    update.backward(value * x.shape[0])
    return value.detach()


def _loss_of(loss: LossFunction, output: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    return loss(output, target) if weight is None else weighted_loss(loss, output, target, weight)


def _apply_mean(parameters: list[nn.Parameter], update: Update, rows: int) -> None:
    """Update by the mean of gradients that were added up over `rows`."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    torch._foreach_div_(gradients, float(rows))
    update.apply(parameters)
    torch.clear_autocast_cache()
