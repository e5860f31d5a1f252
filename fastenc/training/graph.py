"""Whole steps: the training step of one batch size recorded in a CUDA graph, and replayed for each full batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..ops import as_if_captured
from .losses import LossFunction
from .recordable import host_state, on_device, signature, why_not
from .recorder import CudaRecorder
from .sources import Batch, Rows
from .steps import AfterStep, BeforeStep, take_step
from .update import Update

WARM_UP = 3  # ordinary steps before recording: optimiser state, workspaces and compiled kernels must exist by then


class WholeSteps:
    """The steps of one `fit` over `rows`: full batches by replaying a recorded step, the rest by the ordinary one.

    The first WARM_UP full batches are ordinary steps, which change the model as any other; then the step is recorded.
    From there on a full batch is one call: the device counts the steps, gathers its rows, computes, updates, and keeps
    the loss. What the step was recorded for (modes, requires_grad, hooks, memory, the optimiser's options) is compared
    wherever code of the user can have run: before an epoch and after a listener. If it has changed, the recording is
    dropped, and made again after another warm-up. `explanation` tells what was done.

    Learning rates lie on the device, as float32 like in PyTorch's fused kernels, and are updated there when they
    change, by a function of the step's number or by the user; `optimizer.param_groups` holds the user's own numbers
    between the steps. The penalty and clipping of `update` are part of the recorded step.
    """

    def __init__(self, rows: Rows, batch_size: int, recorder: CudaRecorder) -> None:
        self._rows, self._batch_size, self._recorder = rows, batch_size, recorder
        self._replay: Callable[[], None] | None = None
        self._signature: list | None = None
        self._warm = self._taken = self._replayed = 0
        self._never: str | None = None  # found out by trying: holds for this fit
        self._reason: str | None = None
        self._recordable = False
        self._rates: list[tuple[float, Tensor]] = []  # of each group: the user's number, and the device's
        # What the recorded step reads and writes beside the model. The device counts the epoch's steps in `_step`.
        self._order = rows.x.new_empty((len(rows) // batch_size, batch_size), dtype=torch.int64)
        self._step = rows.x.new_zeros(1, dtype=torch.int64)
        self._losses = rows.x.new_zeros(-(-len(rows) // batch_size), dtype=torch.float64)  # holds any loss exactly
        self._gradients: list[tuple[nn.Parameter, Tensor | None]] = []

    @property
    def explanation(self) -> str:
        """How the steps were taken so far, and why."""
        reason = self._reason
        if not self._replayed:
            if reason is None:
                reason = f"it takes more than {WARM_UP} full batches to record one"
            return f"step by step: {reason}"
        after = "" if reason is None else f"; now step by step: {reason}"
        return f"{self._replayed:,} of {self._taken:,} steps were replayed from a CUDA graph{after}"

    def train(
        self,
        model: nn.Module,
        loss: LossFunction,
        update: Update,
        order: Tensor | None,
        after_step: AfterStep | None = None,
        before_step: BeforeStep | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One epoch; arguments and result as `train_rows`, and the same bits where the kernels repeat theirs."""
        if order is None:
            order = torch.arange(len(self._rows), device=self._order.device)
        with self._recorder.stream(self._order.device):
            self._order.copy_(order[: self._order.numel()].view_as(self._order))
            return self._train(model, loss, update, order.split(self._batch_size), after_step, before_step)

    def close(self) -> None:
        """Drop the recording and its memory. Gradients stay, in memory of their own."""
        for parameter, gradient in self._gradients:
            if gradient is not None and parameter.grad is gradient:
                parameter.grad = gradient.clone()
        self._drop()

    def _train(
        self,
        model: nn.Module,
        loss: LossFunction,
        update: Update,
        batches: Sequence[Tensor],
        after_step: AfterStep | None,
        before_step: BeforeStep | None,
    ) -> tuple[Tensor, Tensor]:
        full = len(self._order)
        look, position = True, None  # whether to look at what the user may have changed; where the device's count is
        for index, chosen in enumerate(batches):
            if before_step is not None:
                before_step(index)
            update.begin()
            if look:
                self._look(model, loss, update)
            if look or update.changing:
                self._send_rates(update.optimizer)
            if index < full and self._replay is None and self._reason is None and self._warm >= WARM_UP:
                self._record(model, loss, update)
            if index < full and self._replay is not None:
                if position != index:  # the last step was an ordinary one
                    self._step.fill_(index)
                    for parameter, gradient in self._gradients:
                        parameter.grad = gradient
                self._replay()
                position = index + 1
                self._replayed += 1
            else:
                warm_up = index < full and self._reason is None
                value = (self._warm_up if warm_up else self._step_by_step)(model, loss, update, chosen)
                self._losses[index] = value
                position = None
            self._taken += 1
            look = after_step is not None or before_step is not None
            if after_step is not None and after_step(index, self._losses[index]):
                break
        return self._losses[: index + 1].clone(), torch.tensor(
            [len(chosen) for chosen in batches[: index + 1]], device="cpu"
        )

    def _look(self, model: nn.Module, loss: LossFunction, update: Update) -> None:
        """See what the user has changed beside learning rates: it ends the recording."""
        reason = why_not(model, update.optimizer, self._order.device)
        self._recordable = reason is None
        self._reason = reason or self._never
        if self._reason is not None or signature(model, loss, update) != self._signature:
            self._drop()

    def _send_rates(self, optimizer: Optimizer) -> None:
        """Bring learning rates that have changed to the device."""
        for index, group in enumerate(optimizer.param_groups if self._recordable else ()):
            rate = 0.0 if on_device(group["lr"], group["params"]) else float(group["lr"])
            if index == len(self._rates):
                self._rates.append((rate, torch.full((), rate, dtype=torch.float32, device=self._order.device)))
            elif rate != self._rates[index][0]:
                self._rates[index] = (rate, self._rates[index][1].fill_(rate))

    def _drop(self) -> None:
        self._replay = self._signature = None
        self._gradients = []
        self._warm = 0

    def _step_by_step(self, model: nn.Module, loss: LossFunction, update: Update, chosen: Tensor) -> Tensor:
        """An ordinary step of the rows `chosen`; its loss."""
        with self._rates_on_device(update.optimizer):
            return take_step(model, [*model.parameters()], loss, update, *self._batch(chosen))

    def _warm_up(self, model: nn.Module, loss: LossFunction, update: Update, chosen: Tensor) -> Tensor:
        """An ordinary step, of which the last before recording is watched for what cannot be replayed.

        It launches the kernels that the recording will: compiling one is not allowed there.
        """
        self._warm += 1
        if self._warm < WARM_UP:
            with as_if_captured():
                value = self._step_by_step(model, loss, update, chosen)
        else:
            before = host_state(model)
            waits: list[str] = []
            with self._recorder.watch(waits), as_if_captured():
                value = self._step_by_step(model, loss, update, chosen)
            if waits:
                self._never = f"a step waits for the device: {waits[0]}"
            elif host_state(model) != before:
                self._never = "a step draws random numbers on the CPU or changes attributes of the model's modules"
            self._reason = self._never
        self._signature = signature(model, loss, update)
        return value

    def _record(self, model: nn.Module, loss: LossFunction, update: Update) -> None:
        def work() -> None:
            chosen = self._order.index_select(0, self._step).view(-1)
            value = take_step(model, parameters, loss, update, *self._batch(chosen))
            self._losses.index_copy_(0, self._step, value.double().view(1))
            self._step.add_(1)

        self._step.zero_()
        parameters = [*model.parameters()]
        for parameter in parameters:
            parameter.grad = None  # so that gradients get memory of the recording's own
        try:
            with self._rates_on_device(update.optimizer), _capturable(update.optimizer):
                self._replay = self._recorder.record(work)
        except Exception as error:  # whatever it is, an ordinary step shows whether it is an error
            self._drop()
            self._reason = self._never = f"recording it failed: {(str(error).splitlines() or [repr(error)])[0]}"
            warnings.warn(f"Trainer trains step by step, without a CUDA graph: {self._never}", stacklevel=2)
            return
        self._gradients = [(parameter, parameter.grad) for parameter in parameters]

    def _batch(self, chosen: Tensor) -> Batch:
        rows = self._rows
        x = rows.x.index_select(0, chosen)
        target = x if rows.target is rows.x else rows.target.index_select(0, chosen)
        return x, target, None if rows.weight is None else rows.weight.index_select(0, chosen)

    @contextmanager
    def _rates_on_device(self, optimizer: Optimizer) -> Iterator[None]:
        """Inside, the optimiser reads its learning rates from the device, where its kernels can."""
        theirs = [(group, group["lr"]) for group in optimizer.param_groups] if self._recordable else []
        for (group, lr), (_, rate) in zip(theirs, self._rates, strict=False):
            group["lr"] = lr if on_device(lr, group["params"]) else rate
        try:
            yield
        finally:
            for group, lr in theirs:
                group["lr"] = lr


@contextmanager
def _capturable(optimizer: Optimizer) -> Iterator[None]:
    """Let Adam be recorded: its fused kernel always can, but Adam asks for the flag, and warns of it elsewhere."""
    groups = [group for group in optimizer.param_groups if "capturable" in group]
    theirs = [group["capturable"] for group in groups]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group, capturable in zip(groups, theirs, strict=True):
            group["capturable"] = capturable
