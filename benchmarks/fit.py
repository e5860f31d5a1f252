"""How long does Trainer.fit take, a step, beside a loop written by hand and other frameworks' own fit?"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastenc import AutoEncoder, Encoder
from fastenc.training import Trainer
from fastenc.training.recorder import CudaRecorder

from .command import Options, Place, Question
from .cuda import CALLS, WARM_UP
from .harness import Call, Case, Results, Side, Sides
from .peers import remote

Widths = tuple[int, ...]  # the input's, then each layer's of the encoder
Precision = Callable[[], AbstractContextManager]

HIDDEN = (128, 64, 32, 16)
MODE = "fit, autoencoder"
LR = 1e-3
CHECKED_EPOCHS, CHECKED_BATCH, CHECKED_ROWS = 2, 32, 3 * 32 + 8  # the last batch is short, as in what is timed
ROUNDED_PROBLEMS = 16
MARGIN = 1e-6  # some ten times float32's rounding error
FUSED_ADAM = "eager, Adam(fused=True)"
EAGER: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "eager, Adam": torch.optim.Adam,
    FUSED_ADAM: partial(torch.optim.Adam, fused=True),
}
COMPILED = {"torch.compile, Adam(fused=True)": "default", "torch.compile(max-autotune), the same": "max-autotune"}
IN_GRAPH = f"{FUSED_ADAM}, in a CUDA graph"
# in, rows, batch, epochs of one call, which share what a fit costs beside its steps
PROBLEMS = ((100, 1000, 32, 4), (784, 2560, 256, 2), (784, 16384, 4096, 1))
QUICK_PROBLEMS = ((100, 1000, 32, 1),)


def cases(options: Options) -> Iterator[Case]:
    problems = QUICK_PROBLEMS if options.quick else PROBLEMS
    for place, dtype, (width, rows, batch, epochs) in itertools.product(options.places(), options.dtypes, problems):
        if place.way == CALLS:  # a fit is more than kernels, and records its own graph
            sizes = {"in": width, "rows": rows, "batch": batch, "epochs": epochs}
            plan = Plan((width, *HIDDEN), rows, batch, epochs)
            yield training_case(MODE, sizes, plan, dtype, place, partial(setup, plan=plan, options=options))


@dataclass(frozen=True)
class Plan:
    """An autoencoder, and how it is trained: its first `frozen` layers are not."""

    widths: Widths
    rows: int
    batch: int
    epochs: int
    frozen: int = 0

    @property
    def steps(self) -> int:
        return self.epochs * -(-self.rows // self.batch)


def training_case(
    mode: str,
    sizes: dict[str, int],
    plan: Plan,
    dtype: torch.dtype,
    place: Place,
    setup: Callable[[Case], Sides],
) -> Case:
    rows = plan.epochs * plan.rows / plan.steps
    flops, moved = step_flops(rows, plan.widths, plan.frozen), step_bytes(rows, plan.widths, plan.frozen)
    return Case(mode, sizes, dtype, place.threads, flops, moved, setup, plan.steps, device=place.device, way=place.way)


def layer_sizes(widths: Widths) -> list[tuple[int, int]]:
    """(in, out) of each layer of the autoencoder."""
    return list(itertools.pairwise((*widths, *widths[-2::-1])))


def step_flops(rows: float, widths: Widths, frozen: int = 0) -> int:
    """Products of a step of `rows` rows: forward; grad_weight of what is trained, grad_x of all but the first of it."""
    products = [K * N for K, N in layer_sizes(widths)]
    return round(2 * rows * (sum(products) + sum(products[frozen:]) + sum(products[frozen + 1 :])))


def step_bytes(rows: float, widths: Widths, frozen: int = 0) -> int:
    """The rows, frozen parameters read, and each other one with Adam's two moments read and written, in float32."""
    parameters = [K * N + N for K, N in layer_sizes(widths)]
    return round(4 * (rows * widths[0] + sum(parameters[:frozen]) + 6 * sum(parameters[frozen:])))


def setup(case: Case, plan: Plan, options: Options) -> Sides:
    """Trainer.fit as a user calls it, against loops and other frameworks' fit."""
    problem = Problem(case, plan)
    peers = problem.eager(*EAGER)
    if case.device == "cuda":
        peers[IN_GRAPH] = problem.side(make_eager, graph_call)
    if case.dtype == torch.float32 and not options.quick:
        for name, mode in COMPILED.items():
            peers[name] = problem.side(make_eager, loop_call, adam=EAGER[FUSED_ADAM], mode=mode)
    if case.dtype == torch.float32 and case.device == "cpu":
        task = remote.Task(
            problem.drawn[0].weights,
            problem.data,
            problem.drawn[0].x,
            plan.epochs,
            plan.batch,
            CHECKED_EPOCHS,
            CHECKED_BATCH,
            LR,
            case.threads,
            train_exactly(plan.widths, problem.drawn[0].weights, problem.drawn[0].x, EpsilonFirst)[0],
        )
        peers |= remote.sides(options.peers, task)
    return problem.sides(problem.side(make_fused, fused_call), peers)


@dataclass(frozen=True)
class Drawn:
    """First weights, rows to check the training on, and what training gives in float64: losses and output."""

    weights: list[Tensor]
    x: Tensor
    exact: Results


class Problem:
    """What all sides train. Timed: epochs over `data`. Checked: short trainings from fresh weights in a fixed order.

    What is checked is the loss of each epoch and, after the last, the output on the rows. bfloat16 is training of
    float32 weights under autocast, and of several runs the outputs alone are checked: a loss, being one number, may
    be right by luck.
    """

    def __init__(self, case: Case, plan: Plan, data: Tensor | None = None) -> None:
        self.plan = plan
        self.rounded = case.dtype != torch.float32
        self.precision: Precision = partial(torch.autocast, case.device, case.dtype) if self.rounded else nullcontext
        count = ROUNDED_PROBLEMS if self.rounded else 1
        self.drawn = [draw_problem(plan.widths, plan.frozen) for _ in range(count)]
        self.data = torch.rand(plan.rows, plan.widths[0]) if data is None else data

    def side(self, make: Callable[[Widths], nn.Module], call: Callable[..., Call], **chosen: Any) -> Side:
        def verify() -> Results:
            losses, outputs = [], []
            for drawn in self.drawn:
                model = freeze(make(self.plan.widths), self.plan.frozen)
                train = call(
                    model,
                    drawn.weights,
                    drawn.x,
                    CHECKED_EPOCHS,
                    CHECKED_BATCH,
                    self.precision,
                    shuffle=False,
                    **chosen,
                )
                losses += train()
                outputs.append(model(drawn.x).detach())
            return tuple(outputs) if self.rounded else (*losses, *outputs)

        timed = call(
            freeze(make(self.plan.widths), self.plan.frozen),
            self.drawn[0].weights,
            self.data,
            self.plan.epochs,
            self.plan.batch,
            self.precision,
            shuffle=True,
            **chosen,
        )
        return Side(timed, verify)

    def eager(self, *names: str) -> dict[str, Side | str]:
        """The loop of PyTorch's tutorials with these optimisers, keys of EAGER."""
        return {name: self.side(make_eager, loop_call, adam=EAGER[name]) for name in names}

    def trainer_against(self, *names: str) -> Sides:
        return self.sides(self.side(make_fused, fused_call), self.eager(*names))

    @property
    def exact(self) -> Results:
        return tuple(drawn.exact[-1] for drawn in self.drawn) if self.rounded else self.drawn[0].exact

    def sides(self, ours: Side, peers: dict[str, Side | str]) -> Sides:
        if self.rounded:
            return Sides(ours, peers, self.exact, ("output",) * len(self.exact), rounded=True)
        losses = (f"loss of epoch {epoch + 1}" for epoch in range(CHECKED_EPOCHS))
        return Sides(ours, peers, self.exact, (*losses, "output"))


def draw_problem(widths: Widths, frozen: int = 0) -> Drawn:
    """Drawn again while training meets a value so near to zero before a relu that rounding decides which way a gradient
    goes: from there two right answers part.
    """
    while True:
        weights = [parameter.detach().clone() for parameter in make_eager(widths).parameters()]
        x = torch.rand(CHECKED_ROWS, widths[0])
        exact, nearest = train_exactly(widths, weights, x, frozen=frozen)
        if nearest > MARGIN:
            return Drawn(weights, x, exact)


class EpsilonFirst(torch.optim.Adam):
    """Adam as Keras and scikit-learn have it: epsilon is added to sqrt(v) before that is corrected."""

    def step(self, closure: Any = None) -> Any:
        (group,) = self.param_groups
        taken = next((int(state["step"]) for state in self.state.values()), 0)
        group["eps"] = 1e-8 / (1 - group["betas"][1] ** (taken + 1)) ** 0.5
        return super().step(closure)


def train_exactly(
    widths: Widths,
    weights: list[Tensor],
    x: Tensor,
    optimizer: type[torch.optim.Adam] = torch.optim.Adam,
    frozen: int = 0,
) -> tuple[Results, float]:
    """What the check compares, in float64, and the value before a relu that is nearest to 0, in the layer's largest."""
    model = freeze(make_eager(widths).double(), frozen)
    nearest: list[float] = []

    def note(_module: nn.Module, _x: tuple, preact: Tensor) -> None:
        size = preact.detach().abs()
        nearest.append((size.min() / size.max()).item())

    hooks = [layer.register_forward_hook(note) for layer in model[:-1:2]]
    run = loop_call(
        model, weights, x.double(), CHECKED_EPOCHS, CHECKED_BATCH, nullcontext, shuffle=False, adam=optimizer
    )
    losses = run()
    for hook in hooks:
        hook.remove()
    return (*losses, model(x.double()).detach()), min(nearest)


def make_fused(widths: Widths) -> nn.Module:
    return AutoEncoder(Encoder(widths[0], widths[1:]))


def make_eager(widths: Widths) -> nn.Module:
    layers = [nn.Linear(K, N) for K, N in layer_sizes(widths)]
    modules = [module for layer in layers for module in (layer, nn.ReLU())]
    return nn.Sequential(*modules[:-1])


def freeze(model: nn.Module, layers: int) -> nn.Module:
    """The model, whose first `layers` layers are not trained."""
    for parameter in [*model.parameters()][: 2 * layers]:  # a weight and a bias each
        parameter.requires_grad_(False)
    return model


@torch.no_grad()
def set_weights(model: nn.Module, weights: list[Tensor]) -> None:
    for parameter, weight in zip(model.parameters(), weights, strict=True):
        parameter.copy_(weight)


def fused_call(
    model: nn.Module, weights: list[Tensor], x: Tensor, epochs: int, batch: int, precision: Precision, *, shuffle: bool
) -> Call:
    set_weights(model, weights)
    trainer = Trainer(model, optimizer="adam", lr=LR, loss="mse")

    def call() -> Results:
        with precision():
            history = trainer.fit(x, epochs=epochs, batch_size=batch, shuffle=shuffle, verbose=False)
        return tuple(torch.tensor(loss) for loss in history.history["loss"])

    return call


def loop_call(
    model: nn.Module,
    weights: list[Tensor],
    x: Tensor,
    epochs: int,
    batch: int,
    precision: Precision,
    *,
    shuffle: bool,
    adam: Callable[..., torch.optim.Optimizer],
    mode: str | None = None,
) -> Call:
    """The loop that PyTorch's tutorials have. mode: of torch.compile, which then compiles the model."""
    set_weights(model, weights)
    optimizer = adam(model.parameters(), lr=LR)
    forward = model if mode is None else torch.compile(model, mode=mode)

    def call() -> Results:
        losses = []
        for _ in range(epochs):
            order = torch.randperm(len(x), device=x.device) if shuffle else torch.arange(len(x), device=x.device)
            total = x.new_zeros(())  # summed as a tensor: .item() in every step would slow eager down
            for rows in order.split(batch):
                chosen = x[rows]
                optimizer.zero_grad()
                with precision():
                    loss = F.mse_loss(forward(chosen), chosen)
                loss.backward()
                optimizer.step()
                total += loss.detach() * len(chosen)
            losses.append(total / len(x))
        return tuple(losses)

    return call


def graph_call(
    model: nn.Module, weights: list[Tensor], x: Tensor, epochs: int, batch: int, precision: Precision, *, shuffle: bool
) -> Call:
    """The loop as PyTorch's notes on CUDA graphs have it: full batches replayed, the last one of an epoch outside."""
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=True)
    rows, total = torch.arange(batch, device=x.device), x.new_zeros(())

    def step(chosen: Tensor) -> None:
        optimizer.zero_grad()
        with precision():
            loss = F.mse_loss(model(chosen), chosen)
        loss.backward()
        optimizer.step()
        total.add_(loss.detach() * len(chosen))

    recorder = CudaRecorder()
    with recorder.stream(x.device):
        for _ in range(WARM_UP):
            step(x[rows])
        set_weights(model, weights)
        for state in optimizer.state.values():  # training starts after the warm-up
            for tensor in state.values():
                tensor.zero_()
        optimizer.zero_grad()
        optimizer.param_groups[0]["capturable"] = True
        replay = recorder.record(lambda: step(x[rows]))
        optimizer.param_groups[0]["capturable"] = False  # or the step outside would warn

    def call() -> Results:
        losses = []
        for _ in range(epochs):
            order = torch.randperm(len(x), device=x.device) if shuffle else torch.arange(len(x), device=x.device)
            total.zero_()
            for chosen in order.split(batch):
                if len(chosen) == batch:
                    rows.copy_(chosen)
                    replay()
                else:
                    step(x[chosen])
            losses.append(total / len(x))
        return tuple(losses)

    return call


QUESTION = Question(
    name="fit",
    title="Trainer.fit: autoencoder in-128-64-32-16 and back, mse, Adam; times per step",
    cases=cases,
    budget_s=15.0,
)
