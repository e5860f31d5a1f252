"""A Trainer's share of the work where several processes train one model: its rows of every batch.

All processes are given all data, and draw the same orders. Of each batch every process takes consecutive rows; the
gradients, weighted by rows, are added up between the backward pass and the update. Weights stay the same bits on all
processes, and are those of one process within rounding.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from .agreement import agree, agree_on_fit, check_batch, check_model
from .distributed import Processes, find_processes
from .losses import BATCH_LOSSES, LossFunction
from .rng import generators
from .sources import Batch, Rows, Stream
from .steps import AfterStep, BeforeStep, train_batches
from .update import Update

if TYPE_CHECKING:
    from .fitting import Fit
    from .trainer import Trainer

P = ParamSpec("P")
T = TypeVar("T")


class Share:
    """What one process does of a Trainer's work.

    Attributes:
        processes: all of the job.
        rows: of the present batch, how many are this process's.
        watched: whether a callback on any process has work inside an epoch's steps.
    """

    def __init__(self, trainer: Trainer, processes: Processes) -> None:
        self.trainer, self.processes = trainer, processes
        self.rows = 0
        self.watched = False
        self._all_rows = 0  # of the present batch
        self._weight = 1.0  # of the present batch's loss
        self._steps: list[tuple[int, int]] = []  # of the present epoch, the two numbers of rows
        self._own = self._whole = 0  # rows since the last update; those taken for want of others count, too
        self._common: list[Tensor] | None = None  # where the random numbers of all processes are, during a step

    @property
    def explanation(self) -> str:
        """Why steps are taken one operation after another."""
        return (
            f"{self.processes.count} processes share every batch, and add up their gradients between the backward pass "
            "and the update"
        )

    def begin(self, fit: Fit, epochs: int) -> None:
        """Together: see that all have been asked the same; then weights and random numbers are those of process 0.

        Raises:
            DataError, ValueError: they have not.
        """
        self.watched = agree_on_fit(self.processes, self.trainer, fit, epochs)
        self.copy_from_first()

    def copy_from_first(self) -> None:
        """Together: weights, buffers and random numbers become those of process 0."""
        trainer = self.trainer
        model, device = trainer.model, next(trainer.model.parameters()).device
        self.processes.copy_from_first([*model.parameters(), *model.buffers()])
        state = trainer.random_numbers.state(device)
        trainer.random_numbers.load(self.processes.from_first(lambda: state), device)

    def agree_on(self, source: Rows | Stream) -> None:
        """Together: see that all measure the same.

        Raises:
            DataError, ValueError: they do not.
        """
        agree(self.processes, self.trainer, {"x and y": source})

    def copy_buffers(self) -> None:
        """Together: buffers, such as running means, become those of process 0."""
        self.processes.copy_from_first(list(self.trainer.model.buffers()))

    def train(
        self,
        loss: LossFunction,
        update: Update,
        batches: Iterator[Batch],
        after_step: AfterStep | None,
        before_step: BeforeStep | None,
    ) -> tuple[Tensor, Tensor]:
        """Together: one epoch over this process's `batches`; the losses and rows of whole batches, as train_batches."""
        self._steps = []
        shared = SharedUpdate(**{field.name: getattr(update, field.name) for field in fields(update)}, share=self)

        def after(step: int, value: Tensor) -> bool:
            assert after_step is not None
            return self.processes.any(after_step(step, self._losses(value[None], self._steps[-1:])[0]))

        try:
            losses, _ = train_batches(
                self.trainer.model, loss, shared, batches, None if after_step is None else after, before_step
            )
        finally:
            self.end_step()
        return self._losses(losses, self._steps), torch.tensor([both[1] for both in self._steps], device="cpu")

    def training_batches(self, source: Rows | Stream, batch_size: int, order: Tensor | None = None) -> Iterator[Batch]:
        """This process's (x, target, weight) of each batch, within random numbers of its own until `end_step`."""
        for index, batch in enumerate(self.batches(source, batch_size, order)):
            self._steps.append((self.rows, self._all_rows))
            self._own += len(batch[0])
            self._whole += self._all_rows
            self._weight = self.rows / len(batch[0])  # but for `loss`, where that is no mean over rows
            self._begin_step(index)
            yield batch

    def batches(self, source: Rows | Stream, batch_size: int, order: Tensor | None = None) -> Iterator[Batch]:
        """This process's (x, target, weight) of each batch, `rows` of them; of none it gets one that counts nothing.

        The model then runs on every process alike, which its own communication may need.
        """
        if isinstance(source, Stream):
            yield from self._of_stream(source)
            return
        order = torch.arange(len(source), device=source.x.device) if order is None else order
        whole = len(order) // batch_size * batch_size
        part = self._part(batch_size)
        mine = order[:whole].view(-1, batch_size)[:, part].flatten()
        for batch in source.batches(max(1, part.stop - part.start), mine) if len(mine) else ():
            self._set(batch_size)
            yield batch
        if rest := len(order) - whole:
            self._set(rest)
            yield from source.batches(rest, order[whole:][self._part_or_one(rest)])

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss of this process's rows; of the whole batch where it may be no mean over rows."""
        loss, taken = self.trainer.loss, len(target)
        by_rows = isinstance(loss, str) and loss not in BATCH_LOSSES
        if by_rows or not (isinstance(output, Tensor) and output.ndim > 0 and len(output) == taken):
            return self.trainer.loss_function(output, target)
        # Each process has the gradient of the whole loss by its own rows, `count` times, and of what else the loss
        # looks at: their mean over the processes is the gradient.
        self._weight = self._all_rows / (taken * self.processes.count)
        return self.trainer.loss_function(_Whole.apply(output[: self.rows], self), self.whole(target))

    def own(self, rows: Tensor) -> Tensor:
        """What this process gave of the present batch."""
        return rows[: self.rows]

    def whole(self, rows: Tensor) -> Tensor:
        """Together: what all processes gave of the present batch, in its order."""
        return self.processes.gather(rows[: self.rows], self._counts(self._all_rows))

    def total(self, numbers: list[float]) -> list[float]:
        """Together: the sums over the processes."""
        sums = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        self.processes.add(sums)
        return sums.tolist()

    def weigh(self, value: Tensor) -> Tensor:
        """A step's loss as its backward pass is to have it."""
        return value if self._weight == 1.0 else value * self._weight

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Together: gradients of means over own rows become those of the means over all rows since the last update."""
        self.processes.add_gradients(parameters, self._own / self._whole)
        self._own = self._whole = 0

    def end_step(self) -> None:
        """Go on with the random numbers of all processes."""
        if self._common is not None:
            for generator, state in zip(self._generators(), self._common, strict=True):
                generator.set_state(state)
            self._common = None

    def _begin_step(self, index: int) -> None:
        """Random numbers that differ between processes and steps, and are the same after a resume."""
        self._common = [generator.get_state() for generator in self._generators()]
        update = self.trainer.update
        place = struct.pack("<qqq", update.steps.taken, index % update.accumulate, self.processes.rank)
        digest = hashlib.blake2b(self._common[0].numpy().tobytes() + place, digest_size=8).digest()
        for generator in self._generators():
            generator.manual_seed(int.from_bytes(digest, "little") >> 1)

    def _generators(self) -> list[torch.Generator]:
        return generators(next(self.trainer.model.parameters()).device)

    def _of_stream(self, stream: Stream) -> Iterator[Batch]:
        for x, target, _ in stream.batches():
            check_batch(self.processes, stream, x, target)
            self._set(len(x))
            part = self._part_or_one(len(x))
            mine = x[part]
            yield mine, mine if target is x else target[part], None
        check_batch(self.processes, stream, None, None)

    def _losses(self, losses: Tensor, steps: list[tuple[int, int]]) -> Tensor:
        """Together: the mean losses over whole batches, from those over own rows; float64 on the CPU."""
        shares = torch.tensor([own / whole for own, whole in steps], dtype=torch.float64, device="cpu")
        means = torch.where(shares > 0, losses.double().cpu() * shares, 0.0)
        self.processes.add(means)
        return means

    def _set(self, all_rows: int) -> None:
        self._all_rows = all_rows
        part = self._part(all_rows)
        self.rows = part.stop - part.start

    def _part(self, rows: int) -> slice:
        """Which of a batch's rows are this process's."""
        rank, count = self.processes.rank, self.processes.count
        return slice(rank * rows // count, (rank + 1) * rows // count)

    def _part_or_one(self, rows: int) -> slice:
        part = self._part(rows)
        return part if part.stop > part.start else slice(0, 1)

    def _counts(self, rows: int) -> list[int]:
        count = self.processes.count
        return [(rank + 1) * rows // count - rank * rows // count for rank in range(count)]


@dataclass(frozen=True)
class SharedUpdate(Update):
    """An update by the gradients of all processes."""

    share: Share | None = None

    def backward(self, value: Tensor) -> None:
        assert self.share is not None
        super().backward(self.share.weigh(value))
        self.share.end_step()

    def apply(self, parameters: Sequence[nn.Parameter]) -> None:
        assert self.share is not None
        self.share.add_gradients(parameters)
        super().apply(parameters)


class _Whole(torch.autograd.Function):
    """The rows of all processes, from this process's; the gradient is `count` times that by its own rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, share: Share) -> Tensor:
        ctx.part, ctx.count = share._part(share._all_rows), share.processes.count
        return share.whole(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0][ctx.part] * ctx.count, None


def together(method: Callable[Concatenate[Trainer, P], T]) -> Callable[Concatenate[Trainer, P], T]:
    """A Trainer's method that all processes of its job have to call: inside, `trainer.share` is this one's share."""

    @functools.wraps(method)
    def shared(trainer: Trainer, /, *args: P.args, **options: P.kwargs) -> T:
        with _sharing(trainer):
            return method(trainer, *args, **options)

    return shared


@contextmanager
def _sharing(trainer: Trainer) -> Iterator[None]:
    if trainer.share is not None:  # a callback asks for more within a fit
        yield
        return
    trainer.processes = find_processes(trainer.processes)
    if trainer.processes is None:
        yield
        return
    check_model(trainer.model)
    trainer.share = Share(trainer, trainer.processes)
    try:
        yield
    except BaseException:
        trainer.processes.close()
        raise
    finally:
        trainer.share = None
