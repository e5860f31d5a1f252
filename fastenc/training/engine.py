"""Whole steps on the CPU: the C++ training engine of `csrc/cpu/train.h`, for the stacks that it knows."""

from __future__ import annotations

import importlib
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim import SGD, Adam, AdamW, Optimizer

from ..activation import activation_code
from ..backends import cpu
from ..encoder import AutoEncoder, Classifier, Encoder, Regressor, plain_stack
from ..modules import FusedDense
from ..ops import forced_backend
from .losses import LossFunction, loss_name
from .recordable import hook_reason, signature
from .sources import Rows
from .steps import AfterStep, BeforeStep, train_rows
from .update import Update

LOSS_CODES = ("mse", "mae", "huber", "cross_entropy", "bce", "bce_with_logits", "cosine")  # as LossKind
OPTIMIZER_CODES = ("sgd", "adam", "adamw")  # as OptimizerKind
CALL_S = 0.05  # about as long as Ctrl-C may wait; returning to Python costs a thousandth of it
FIRST_STEPS = 8  # of the first call, from which the length of the next is told
Stack = tuple[list[FusedDense], list[float]]  # as `plain_stack` gives it
_UNKNOWN_OPTIONS = ("amsgrad", "maximize", "differentiable", "dampening")


class EngineSteps:
    """The steps of one `fit` over `rows`: by the engine where it can take them, else one operation after another.

    The engine works in the module's own parameters and in the optimiser's own state, by PyTorch's rules; its results
    are those of the ordinary steps within rounding, and the same bits for any number of threads. Under
    `torch.autocast("cpu", torch.bfloat16)` it multiplies in bf16 and keeps the weights in fp32. Afterwards parameters
    have no gradient; with a listener after each step they have that of the step, as after an ordinary one.

    `elsewhere`: what to say where the model is not on the CPU. `watchful`: see before each epoch what the user may have
    changed; not needed where no code of the user's runs between epochs. `explanation` tells how steps were taken.
    """

    def __init__(self, rows: Rows, batch_size: int, elsewhere: str, watchful: bool = True) -> None:
        self._watchful = watchful
        self._rows, self._batch_size, self._elsewhere = rows, batch_size, elsewhere
        self._engine: Any = None
        self._signature: list[Any] | None = None
        self._trained: list[nn.Parameter] = []
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._drops = False
        self._held: list[Any] = []  # what the engine has the addresses of
        self._target_reason: dict[str, str | None] = {}
        self._call_steps = FIRST_STEPS
        self._taken = self._whole = 0
        self._singly = False
        self._reason: str | None = "no step was taken"
        self._continued: tuple[int, int | None] | None = None
        self.seed: int | None = None  # of what the latest epoch dropped; None where nothing can be
        self.stopped_in_time = False  # a loss was not finite, and the parameters are as before that step

    @property
    def explanation(self) -> str:
        """How the steps were taken so far, and why."""
        if not self._whole:
            return f"step by step: {self._reason}"
        after = "" if self._reason is None else f"; now step by step: {self._reason}"
        singly = ", one a call for callbacks inside the epoch" if self._singly else ""
        return f"{self._whole:,} of {self._taken:,} steps were taken whole, by the C++ engine{singly}{after}"

    def train(
        self,
        model: nn.Module,
        loss: LossFunction,
        update: Update,
        order: Tensor | None,
        after_step: AfterStep | None = None,
        before_step: BeforeStep | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One epoch, or what `continue_at` has left of it; arguments and result as `train_rows`.

        With `before_step` there must be an `after_step`.
        """
        rows, batch_size = self._rows, self._batch_size
        self.stopped_in_time = False
        first_step, seed = self._continued or (0, None)
        self._continued = None
        self._singly = after_step is not None
        if self._engine is None or self._watchful:
            self._look(model, loss, update, after_step is not None)
        if self._engine is None:
            result = train_rows(model, loss, update, rows, order, batch_size, after_step, before_step)
            self._taken += len(result[0])
            return result
        order = torch.arange(len(rows), device="cpu") if order is None else order.contiguous()
        steps = -(-len(order) // batch_size)
        counts = torch.full((steps,), batch_size, device="cpu")
        counts[-1] = len(order) - (steps - 1) * batch_size
        losses = torch.full((steps,), torch.nan, dtype=torch.float64, device="cpu")
        self.seed = seed if seed is not None else int(torch.randint(2**62, (), device="cpu")) if self._drops else None
        done = 0
        while done < steps:
            if before_step is not None:
                before_step(done)
            if after_step is not None and (done > 0 or before_step is not None):
                self._look(model, loss, update, True)
            if self._engine is None:  # a listener has changed something
                first = done

                def shifted(step: int, value: Tensor, first: int = first) -> bool:
                    return after_step is not None and after_step(first + step, value)

                def announced(step: int, first: int = first) -> None:
                    if before_step is not None and step > 0:  # the first has been
                        before_step(first + step)

                part = order[done * batch_size :]
                rest, _ = train_rows(model, loss, update, rows, part, batch_size, shifted, announced)
                losses[done : done + len(rest)] = rest.double()
                self._taken += len(rest)
                done += len(rest)
                break
            count = 1 if after_step is not None else min(self._call_steps, steps - done)
            taken = self._run(update, order, losses, done, count, first_step)
            done += taken
            if taken < count:
                self.stopped_in_time = True
                done += 1  # whose loss is told
                break
            if after_step is not None and after_step(done - 1, losses[done - 1]):
                break
        return losses[:done], counts[:done]

    def close(self) -> None:
        """Drop the engine and its memory."""
        self._engine = self._signature = None
        self._held = []

    def continue_at(self, first_step: int, seed: int | None) -> None:
        """Let the next `train` be the rest of an epoch: from `first_step` on, with its `seed` of what is dropped."""
        self._continued = (first_step, seed)

    def _run(self, update: Update, order: Tensor, losses: Tensor, done: int, count: int, first_step: int) -> int:
        """`count` steps from step `done` of `order` on; how many were taken. `first_step`: where the order starts."""
        x, target, weight = self._rows.x, self._rows.target, self._rows.weight
        labels = not target.is_floating_point()
        part = order[done * self._batch_size : (done + count) * self._batch_size]
        rates = update.rates(count)
        for parameter in self._trained:
            if parameter.grad is not (gradient := self._gradients.get(parameter)):
                parameter.grad = gradient
        start = time.perf_counter()
        taken = None
        try:
            taken = self._engine.run(
                x=x.data_ptr(),
                x_stride=x.stride(0),
                target=0 if labels else target.data_ptr(),
                target_stride=target.stride(0),
                labels=target.data_ptr() if labels else 0,
                weights=0 if weight is None else weight.data_ptr(),
                order=part.data_ptr(),
                rows=len(part),
                rates=rates.data_ptr(),
                seed=self.seed or 0,
                first_step=first_step + done,
                losses=losses[done:].data_ptr(),
            )
        finally:  # Ctrl-C is raised where the call returns, and its result is lost: the losses tell how far it came
            if taken is None:
                taken = int(losses[done : done + count].isfinite().cumprod(0).sum())
            update.advance(taken)
            increment_version(self._trained)  # or autograd would take a graph of the old weights for a good one
            torch.clear_autocast_cache()  # which may hold casts of the old weights
            self._taken += taken
            self._whole += taken
        seconds = (time.perf_counter() - start) / count
        self._call_steps = max(1, int(CALL_S / max(seconds, 1e-9)))
        return taken

    def _look(self, model: nn.Module, loss: LossFunction, update: Update, leaves_gradients: bool) -> None:
        """See what the user may have changed, and make the engine anew if it has to be."""
        stack, name = plain_stack(model), loss_name(loss)
        self._reason = self._why_not(model, stack, name, update)
        if self._reason is not None or stack is None or name is None:  # None is a reason, too
            self.close()
            return
        _fill_state(update.optimizer)
        now = [*signature(model, loss, update), torch.is_autocast_enabled("cpu"), leaves_gradients]
        if self._engine is None or now != self._signature:
            self._signature = now
            self._make(model, stack, name, update, leaves_gradients)

    def _why_not(self, model: nn.Module, stack: Stack | None, name: str | None, update: Update) -> str | None:
        """Why the engine cannot take the steps of a model and loss known as these, in words; None if it can."""
        if self._rows.x.device.type != "cpu":
            return self._elsewhere
        if reason := cpu.why_unavailable():
            return reason
        if forced_backend() not in ("auto", cpu.NAME):
            return f"use_backend({forced_backend()!r}) asks for that"
        if stack is None:
            return (
                f"the model is not a plain FusedDense, Encoder, AutoEncoder, Classifier or Regressor: {_other(model)}"
            )
        if name not in LOSS_CODES:
            if name is None:
                return "the loss is a function that the engine does not know"
            return f"the loss is {name}, which compares the rows of a batch with each other"
        if reason := hook_reason(model, update.optimizer):
            return reason
        if reason := _optimizer_reason(model, update.optimizer):
            return reason
        if not torch.is_grad_enabled():
            return "gradients are switched off"
        if torch.is_anomaly_enabled():
            return "anomaly detection is on"
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            if dtype != torch.bfloat16 or name == "bce":
                return f"autocast to {dtype} is on, which the engine cannot follow for this loss"
        elif forced_backend() == "auto":
            for layer in stack[0]:
                if cpu.leaves_steps(self._batch_size, layer.weight):
                    size = f"{layer.in_features} to {layer.out_features} features"
                    return f"without AVX-512 PyTorch's products are faster for a layer of {size}"
        if name not in self._target_reason:
            self._target_reason[name] = _data_reason(self._rows, name, stack[0][-1].out_features)
        return self._target_reason[name]

    def _make(self, model: nn.Module, stack: Stack, name: str, update: Update, leaves_gradients: bool) -> None:
        _C = _extension()
        optimizer = update.optimizer
        groups = {parameter: i for i, group in enumerate(optimizer.param_groups) for parameter in group["params"]}
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._gradients = {p: torch.zeros_like(p) for p in self._trained} if leaves_gradients else {}

        def described(parameter: nn.Parameter | None) -> Any:
            if parameter is None:
                return _C.Parameter()
            if not parameter.requires_grad:
                return _C.Parameter(value=parameter.data_ptr())
            state = optimizer.state.get(parameter, {})
            moments = [state[key] for key in _moments(optimizer, optimizer.param_groups[groups[parameter]])]
            gradient = self._gradients.get(parameter)
            self._held.append((parameter, state.get("step"), moments, gradient))
            return _C.Parameter(
                value=parameter.data_ptr(),
                trained=True,
                group=groups[parameter],
                moments=[moment.data_ptr() for moment in moments],
                steps=state["step"].data_ptr() if "step" in state else 0,
                grad=0 if gradient is None else gradient.data_ptr(),
            )

        self._held = []
        layers, dropouts = stack
        self._drops = any(dropouts)
        self._engine = _C.TrainingEngine(
            layers=[
                _C.Layer(
                    in_features=layer.in_features,
                    out_features=layer.out_features,
                    activation=activation_code(layer.activation),
                    dropout=dropout,
                    weight=described(layer.weight),
                    bias=described(layer.bias),
                )
                for layer, dropout in zip(layers, dropouts, strict=True)
            ],
            groups=[_group(_C, group) for group in optimizer.param_groups],
            bfloat16=torch.is_autocast_enabled("cpu"),
            batch_size=min(self._batch_size, len(self._rows)),
            loss=LOSS_CODES.index(name),
            optimizer=OPTIMIZER_CODES.index(_rule(optimizer)),
            l1=float(update.l1),
            clip_norm=float(update.clip_norm or 0.0),
            clip_value=float(update.clip_value or 0.0),
        )


def _other(model: nn.Module) -> str:
    """What keeps a model from being a stack that the engine knows, in words."""
    for name, module in model.named_modules():
        if type(module) not in (FusedDense, Encoder, AutoEncoder, Classifier, Regressor, nn.ModuleList):
            return f"{name or 'it'} is a {type(module).__name__}"
    return "it has hooks, or parts of it were replaced"


def _extension() -> Any:
    return importlib.import_module("fastenc._C")


def _rule(optimizer: Optimizer) -> str:
    """The update rule, of OPTIMIZER_CODES."""
    if isinstance(optimizer, SGD):
        return "sgd"
    decoupled = isinstance(optimizer, AdamW) or optimizer.param_groups[0].get("decoupled_weight_decay")
    return "adamw" if decoupled else "adam"


def _group(_C: Any, group: dict[str, Any]) -> Any:
    beta1, beta2 = group.get("betas", (0.0, 0.0))
    return _C.Group(
        beta1=float(beta1),
        beta2=float(beta2),
        eps=group.get("eps", 0.0),
        momentum=group.get("momentum", 0.0),
        weight_decay=group["weight_decay"],
        nesterov=group.get("nesterov", False),
    )


def _fill_state(optimizer: Optimizer) -> None:
    """Give parameters that were never updated the state that the optimiser's first step would."""
    for group in optimizer.param_groups:
        moments = _moments(optimizer, group)
        for parameter in group["params"] if moments else ():
            if not parameter.requires_grad:
                continue
            state = optimizer.state[parameter]
            if not isinstance(optimizer, SGD) and "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            for moment in moments:
                if state.get(moment) is None:
                    state[moment] = torch.zeros_like(parameter)


def _moments(optimizer: Optimizer, group: dict[str, Any]) -> tuple[str, ...]:
    """What the optimiser keeps of each parameter of a group, by its names in `optimizer.state`."""
    if isinstance(optimizer, SGD):
        return ("momentum_buffer",) if group["momentum"] else ()
    return ("exp_avg", "exp_avg_sq")


def _optimizer_reason(model: nn.Module, optimizer: Optimizer) -> str | None:
    if type(optimizer) not in (SGD, Adam, AdamW):
        return "the optimiser is not PyTorch's SGD, Adam or AdamW"
    for group in optimizer.param_groups:
        if option := next((option for option in _UNKNOWN_OPTIONS if group.get(option)), None):
            return f"the optimiser has the option {option}"
    if len({bool(group.get("decoupled_weight_decay")) for group in optimizer.param_groups}) > 1:
        return "the optimiser's groups decay weights in two ways"
    parameters = [*model.parameters()]
    if any(p.dtype != torch.float32 or not p.is_cpu or not p.is_contiguous() for p in parameters):
        return "a parameter is not float32, contiguous and on the CPU"
    if len({parameter.data_ptr() for parameter in parameters}) < len(parameters):
        return "layers share a parameter"
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not held <= {id(parameter) for parameter in parameters}:
        return "the optimiser holds parameters of something else, too"
    if any(parameter.requires_grad and id(parameter) not in held for parameter in parameters):
        return "the optimiser does not hold all that requires gradients"
    for parameter in parameters:
        for key, value in optimizer.state.get(parameter, {}).items():
            shape = () if key == "step" else parameter.shape
            if value is None:
                continue
            if not isinstance(value, Tensor) or value.dtype != torch.float32 or value.shape != shape:
                return f"the optimiser's {key} is not a float32 tensor of its parameter's shape"
            if not value.is_cpu or not value.is_contiguous():
                return f"the optimiser's {key} is not contiguous and on the CPU"
    return None


def _data_reason(rows: Rows, loss: str, outputs: int) -> str | None:
    x, target = rows.x, rows.target
    if x.dtype != torch.float32 or x.ndim != 2 or (x.shape[1] > 1 and x.stride(1) != 1):
        return "x is not float32 rows"
    if loss == "cross_entropy" and target.dtype == torch.int64 and target.ndim == 1 and target.is_contiguous():
        inside = len(target) == 0 or (int(target.min()) >= 0 and int(target.max()) < outputs)
        return None if inside else f"there are labels outside of 0 to {outputs - 1}"
    if target.dtype != torch.float32 or target.shape != (len(x), outputs):
        return f"the target is not float32 [{len(x)}, {outputs}]"
    return "the target is not rows in memory" if outputs > 1 and target.stride(1) != 1 else None
