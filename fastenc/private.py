"""Training with differential privacy: DP-SGD (Abadi et al., 2016) on the fused layers, through opacus."""

from __future__ import annotations

import math
import os
import secrets
import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from .data import DataError, as_rows, as_target
from .data.extras import require
from .training import History, Trainer
from .training.inputs import in_features, place_of
from .training.losses import BATCH_LOSSES, fit_target, get_loss, loss_name
from .training.optimizers import make_optimizer
from .training.rng import RandomNumbers
from .training.weights import mode

DELTA, MAX_GRAD_NORM = 1e-5, 1.0
_ACCOUNTANT = "prv"  # Gopi et al., 2021: tighter than Renyi's, and opacus's own default


@dataclass(frozen=True)
class PrivateFit:
    """What `fit_private` did.

    Attributes:
        history: "loss", the mean over the rows of an epoch's batches, and what is measured of validation rows. These
            figures have no noise: the guarantee is not about them.
        epsilon, delta: what was spent, epsilon at most what was asked for.
        noise_multiplier: standard deviation of the noise, in units of max_grad_norm.
        max_grad_norm: what each row's gradient was clipped to.
        sample_rate: the chance with which a row is in a batch.
        steps: how many were taken.
    """

    history: History
    epsilon: float
    delta: float
    noise_multiplier: float
    max_grad_norm: float
    sample_rate: float
    steps: int

    @property
    def validation_history(self) -> dict[str, list[float]]:
        """The history without the training rows' loss: what may lie beside the model."""
        return {name: values for name, values in self.history.history.items() if name != "loss"}

    def to_dict(self) -> dict[str, Any]:
        """All but the history, as JSON can hold it."""
        return {name: value for name, value in self.__dict__.items() if name != "history"}

    def __str__(self) -> str:
        return (
            f"epsilon {self.epsilon:.4g} spent at delta {self.delta:g}: {self.steps} steps with noise of "
            f"{self.noise_multiplier:.4g} x {self.max_grad_norm:g}, each row in a step with chance "
            f"{self.sample_rate:.4g}"
        )


def fit_private(
    model: nn.Module,
    x: Any,
    y: Any = None,
    *,
    epsilon: float,
    delta: float = DELTA,
    max_grad_norm: float = MAX_GRAD_NORM,
    loss: str = "mse",
    optimizer: str = "adam",
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    nesterov: bool = False,
    epochs: int = 1,
    batch_size: int = 32,
    validation_data: Any = None,
    seed: int | None = None,
) -> PrivateFit:
    """Train `model`, in place, so that its weights are (epsilon, delta)-differentially private in the training rows.

    In each step a row takes part with the same chance, independently of the others (Poisson sampling; batches have
    `batch_size` rows on average, and may have none). Its gradient is clipped to `max_grad_norm`, and Gaussian noise is
    added to the sum, as much as epsilon allows for this many steps by opacus's PRV accountant. Two data sets that
    differ by one added or removed row are then told apart by the weights no better than epsilon and delta say.

    The guarantee is about these weights, and nothing else. What was learned from the rows before (means, deviations,
    categories), the losses in the history, and choices made by trying several settings are not covered; nor are
    validation rows, which are measured as they are. The numbers are PyTorch's floating-point ones from a pseudo-random
    generator, which is what opacus has without its secure mode.

    Args:
        model: any module whose output for a row depends on that row alone; encoders and heads of this package run
            their fused layers, one by one.
        x, y: inputs [rows, features] and targets, as of `Trainer.fit`; without y the target is x.
        epsilon: how much may be learned of a row, above 0. Up to 1 is strong; above 10 says little.
        delta: the chance that epsilon does not hold; below 1 / rows.
        max_grad_norm: of a row's gradient, over all parameters.
        loss: a name of Trainer's; none of those that compare the rows of a batch.
        optimizer, lr, weight_decay, momentum, nesterov: as of Trainer, by name.
        epochs, batch_size: in an epoch, rows / batch_size steps are taken, rounded.
        validation_data: x or (x, y), measured after each epoch.
        seed: of batches, noise and dropout, for tests: who knows it can take the noise off again. None draws one from
            the operating system and forgets it.

    Raises:
        ValueError: an option that is wrong, or for which there is no private training; the sentence says why.
        DataError: bad rows or targets.
        ModuleNotFoundError: opacus is missing.
        FloatingPointError: the loss became NaN or Inf. The model is as it was then.
    """
    require("opacus", "private training", "tools")
    _check(model, epsilon, delta, max_grad_norm, loss, optimizer, epochs, batch_size)
    place = place_of(model)
    if place.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the model is in {place.dtype}, too coarse for the noise; make it float32")
    rows, target = _rows_and_target(model, x, y, loss, place)
    if delta >= 1.0 / len(rows):
        raise ValueError(
            f"delta is {delta:g} and there are {len(rows)} rows; give one below 1 / {len(rows)}, or a row could be "
            "given away as a whole"
        )
    sample_rate = min(1.0, batch_size / len(rows))
    per_epoch = max(1, round(len(rows) / batch_size))
    noise = noise_multiplier(epsilon, delta, sample_rate, epochs * per_epoch)
    inner = make_optimizer(optimizer, model.parameters(), lr, weight_decay, momentum, nesterov)
    numbers = RandomNumbers(secrets.randbits(63) if seed is None else seed)
    validation = validation_data if isinstance(validation_data, tuple) else (validation_data,)
    evaluator = Trainer(model, loss=loss)
    if validation_data is not None:
        evaluator.evaluate(*validation)  # before any work, so that bad rows are refused
    history = History()
    with numbers.use(place.device), mode(model, training=True):
        steps = _Steps(model, inner, noise, max_grad_norm, sample_rate, len(rows), loss)
        try:
            for epoch in range(epochs):
                total, count = torch.zeros((), device=place.device), 0
                for _ in range(per_epoch):
                    chosen = (torch.rand(len(rows)) < sample_rate).nonzero()[:, 0]
                    total += steps.take(rows[chosen].to(place.device), target[chosen].to(place.device))
                    count += len(chosen)
                if not math.isfinite(total.item()):
                    raise FloatingPointError(f"the loss became {total.item()} in epoch {epoch}; lower lr")
                logs = {"loss": total.item() / max(1, count)}
                if validation_data is not None:
                    measured = evaluator.evaluate(*validation)
                    logs |= {f"val_{name}": value for name, value in measured.items()}
                history.add(epoch, logs)
        finally:
            steps.end()
    with warnings.catch_warnings():  # of bounds that are right and could be tighter
        warnings.simplefilter("ignore")
        spent = float(steps.accountant.get_epsilon(delta))
    return PrivateFit(history, spent, delta, noise, max_grad_norm, sample_rate, epochs * per_epoch)


@lru_cache(maxsize=64)  # the search takes seconds
def noise_multiplier(epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
    """The least noise, within opacus's search, with which `steps` steps spend no more than epsilon.

    Raises:
        ValueError: no amount of noise that opacus will add does, or its accountant cannot tell.
    """
    search = require("opacus.accountants.utils", "private training", "tools").get_noise_multiplier
    try:
        with warnings.catch_warnings():  # of numbers that overflow where the noise tried is far too little
            warnings.simplefilter("ignore")
            return float(
                search(
                    target_epsilon=epsilon,
                    target_delta=delta,
                    sample_rate=sample_rate,
                    steps=steps,
                    accountant=_ACCOUNTANT,
                    epsilon_tolerance=epsilon / 100,
                )
            )
    except (ValueError, RuntimeError, OverflowError, FloatingPointError, MemoryError) as error:
        raise ValueError(
            f"opacus finds no noise for epsilon {epsilon:g} and delta {delta:g} in {steps} steps ({error}); give an "
            "epsilon between 0.1 and 20, or change the epochs"
        ) from error


class _Steps:
    """opacus's parts around a model: gradients of each row, an optimiser that clips them and adds noise, an accountant.

    Without opacus's PrivacyEngine, which would put a DataLoader between, that takes rows one by one.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        noise: float,
        max_grad_norm: float,
        sample_rate: float,
        rows: int,
        loss: str,
    ) -> None:
        from opacus.accountants import create_accountant
        from opacus.grad_sample import GradSampleModule
        from opacus.optimizers import DPOptimizer

        from .integrations import opacus as integration

        integration.register()
        self.model, self.loss = model, get_loss(loss)
        self.accountant = create_accountant(mechanism=_ACCOUNTANT)
        self.wrapped = GradSampleModule(model)
        self.wrapped.forbid_grad_accumulation()
        self.optimizer = DPOptimizer(
            optimizer,
            noise_multiplier=noise,
            max_grad_norm=max_grad_norm,
            expected_batch_size=sample_rate * rows,
        )
        self.optimizer.attach_step_hook(self.accountant.get_optimizer_hook_fn(sample_rate=sample_rate))

    def take(self, x: Tensor, target: Tensor) -> Tensor:
        """One step on a batch, maybe of no rows: then noise alone. Returns the sum of the rows' losses, before it."""
        self.optimizer.zero_grad(set_to_none=True)
        with warnings.catch_warnings():
            # The first layer's input is data and needs no gradient.
            warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
            output = self.wrapped(x)
            loss = self.loss(output, target) if len(x) else output.sum()
            loss.backward()
        self.optimizer.step()
        return loss.detach() * len(x)

    def end(self) -> None:
        """Take off the model what opacus put there."""
        self.optimizer.zero_grad(set_to_none=True)
        self.wrapped.cleanup()
        for parameter in self.model.parameters():
            parameter.__dict__.pop("summed_grad", None)
        for module in self.model.modules():
            for name in ("activations", "max_batch_len"):
                module.__dict__.pop(name, None)


def _rows_and_target(model: nn.Module, x: Any, y: Any, loss: str, place: Tensor) -> tuple[Tensor, Tensor]:
    """As tensors on the CPU, of which batches go to the model's device."""
    rows = as_rows(x, dtype=place.dtype, features=in_features(model), writable=False)
    if y is None and loss == "cross_entropy":
        raise DataError("loss='cross_entropy' needs labels, and there is no y; give one label for each row")
    target = rows if y is None else as_target(y, len(rows), writable=False)
    with mode(model, training=False), torch.inference_mode():
        output = model(rows[:1].to(place.device)).cpu()
    return rows, fit_target(target, output, loss, "x" if y is None else "y")


def _check(
    model: nn.Module,
    epsilon: float,
    delta: float,
    max_grad_norm: float,
    loss: str,
    optimizer: str,
    epochs: int,
    batch_size: int,
) -> None:
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("private training is of one process, whose noise is drawn once; start it without torchrun")
    for name, value in (("epsilon", epsilon), ("max_grad_norm", max_grad_norm)):
        if not 0.0 < value < math.inf:
            raise ValueError(f"{name} is {value!r}; give a finite number above 0")
    if not 0.0 < delta < 1.0:
        raise ValueError(f"delta is {delta!r}; give a number above 0 and below 1 / rows, such as {DELTA:g}")
    for name, count in (("epochs", epochs), ("batch_size", batch_size)):
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} is {count!r}; it must be a whole number of at least 1")
    if not isinstance(optimizer, str):
        raise ValueError("private training makes its optimiser itself; give its name")
    if not isinstance(loss, str) or loss_name(loss) is None:
        raise ValueError(f"loss is {loss!r}; private training needs one of Trainer's by name, the mean over the rows")
    if loss in BATCH_LOSSES:
        raise ValueError(
            f"loss={loss!r} compares the rows of a batch, so that no gradient is of one row alone; train without "
            "privacy, or use another loss"
        )
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and (
            isinstance(module, nn.modules.batchnorm._BatchNorm) or module.track_running_stats
        ):
            raise ValueError(
                f"layer {name!r} is a {type(module).__name__}, in which rows see the statistics of others; use "
                "nn.GroupNorm or nn.LayerNorm"
            )
