"""What a model gives and how good it is: over data, in eval mode, without gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .callbacks import Callback
from .losses import fit_target, weighted_loss
from .sources import Rows, Stream
from .weights import mode

if TYPE_CHECKING:
    from .trainer import Trainer

EVALUATION_ROWS = 1024  # at a time, where nothing is learned


def measure(
    trainer: Trainer, source: Rows | Stream, batch_size: int = EVALUATION_ROWS, callbacks: Sequence[Callback] = ()
) -> dict[str, float]:
    """What `Trainer.evaluate` gives, of checked data; weights of rows, of mean 1, count in all but the metrics."""
    model, metrics, by_labels = trainer.model, trainer.metrics, trainer.loss == "cross_entropy"
    share, count = trainer.share, 0
    total = correct = torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)
    for callback in callbacks:
        callback.on_test_begin()
    metrics.reset(total.device)
    with mode(model, training=False), torch.inference_mode():
        batches = source.batches(batch_size) if share is None else share.batches(source, batch_size)
        for x, target, weight in batches:
            output = model(x)
            if isinstance(source, Stream):
                target = fit_target(target, output, trainer.loss, f"the target in {source.name}")
            rows = len(x) if share is None else share.rows
            if weight is None:
                loss = trainer.batch_loss(output, target)
            else:
                loss = weighted_loss(trainer.loss, output, target, weight)
            if metrics:
                metrics.update(output, target, share)
            if rows == 0:  # of a batch smaller than the number of processes
                continue
            count += rows
            total = total + loss.double() * rows
            if by_labels:
                labels = target if target.ndim < output.ndim else target.argmax(1)
                right = (output.argmax(1) == labels).double()
                right = right.flatten(1).mean(1) if right.ndim > 1 else right
                correct = correct + (right.sum() if weight is None else (right * weight).sum())
    sums = [float(total), float(correct), count]
    if share is not None:
        sums = share.total(sums)
    results = {"loss": sums[0] / sums[2]}
    if by_labels:
        results["accuracy"] = sums[1] / sums[2]
    if metrics:
        results.update(metrics.compute())
    for callback in callbacks:
        callback.on_test_end(results)
    return results


def training_metrics(trainer: Trainer, train: Rows | Stream) -> dict[str, float]:
    """The metrics of the training data after an epoch; of a stream, as its steps were taken."""
    if isinstance(train, Stream):
        return trainer.metrics.compute()
    measure(trainer, train)
    return trainer.metrics.latest


def outputs(function: Callable[[Tensor], Tensor], source: Rows | Stream, batch_size: int) -> Tensor:
    """What `function` gives for each row: [rows, ...], in memory of its own.

    Raises:
        TypeError: it gives something else than one tensor.
    """
    rows = len(source) if isinstance(source, Rows) else 0  # of a stream it shows at its end
    result, parts, start = None, [], 0
    for batch, _, _ in source.batches(batch_size):
        part = function(batch)
        if not isinstance(part, Tensor):
            raise TypeError(f"the model gives a {type(part).__name__}; predict and encode need one tensor")
        if not rows:
            parts.append(part)
            continue
        if result is None:
            with torch.inference_mode(False):  # so that the result can be trained on
                result = torch.empty((rows, *part.shape[1:]), dtype=part.dtype, device=part.device)
        result[start : start + len(part)] = part
        start += len(part)
    return torch.cat(parts) if result is None else result
