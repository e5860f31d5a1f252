"""How long does Trainer.fit take, a step, beside a loop written by hand and other frameworks' own fit?"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastenc import AutoEncoder, Encoder
from fastenc.training import Trainer
from fastenc.training.recorder import CudaRecorder

from .command import Options, Question
from .cuda import CALLS, WARM_UP
from .harness import Call, Case, Results, Side, Sides
from .peers import remote

HIDDEN = (128, 64, 32, 16)
LR = 1e-3
CHECKED_EPOCHS, CHECKED_BATCH, CHECKED_ROWS = 2, 32, 3 * 32 + 8  # the last batch is short, as in what is timed
MARGIN = 1e-6  # some ten times float32's rounding error
MODE = "fit, autoencoder"
EAGER = {"eager, Adam": {}, "eager, Adam(fused=True)": {"fused": True}}
COMPILED = {"torch.compile, Adam(fused=True)": "default", "torch.compile(max-autotune), the same": "max-autotune"}
IN_GRAPH = "eager, Adam(fused=True), in a CUDA graph"
# in, rows, batch, epochs of one call, which share what a fit costs beside its steps
PROBLEMS = ((100, 1000, 32, 4), (784, 2560, 256, 2), (784, 16384, 4096, 1))
Precision = Callable[[], AbstractContextManager]
QUICK_PROBLEMS = ((100, 1000, 32, 1),)


def cases(options: Options) -> Iterator[Case]:
    problems = QUICK_PROBLEMS if options.quick else PROBLEMS
    for place, dtype, problem in itertools.product(options.places(), options.dtypes, problems):
        if place.way != CALLS:  # a fit is more than kernels, and records its own graph
            continue
        width, rows, batch, epochs = problem
        steps = epochs * -(-rows // batch)
        per_step = epochs * rows / steps
        yield Case(
            MODE,
            {"in": width, "rows": rows, "batch": batch, "epochs": epochs},
            dtype,
            place.threads,
            step_flops(per_step, width),
            step_bytes(per_step, width),
            partial(setup, options=options),
            steps,
            device=place.device,
        )


def layer_sizes(width: int) -> list[tuple[int, int]]:
    """(in, out) of each layer of the autoencoder."""
    return list(itertools.pairwise((width, *HIDDEN, *HIDDEN[-2::-1], width)))


def step_flops(rows: float, width: int) -> int:
    """Products of a step of `rows` rows: forward, grad_weight, and a grad_x for each layer but the first."""
    return round(2 * rows * (3 * sum(K * N for K, N in layer_sizes(width)) - width * HIDDEN[0]))


def step_bytes(rows: float, width: int) -> int:
    """The rows, and each parameter with Adam's two moments read and written, in float32."""
    parameters = sum(K * N + N for K, N in layer_sizes(width))
    return round(4 * (rows * width + 6 * parameters))


def setup(case: Case, options: Options) -> Sides:
    """Timed: fit as a user calls it. Checked: a short one from fresh weights, whose batches are the same on all sides.

    What is checked is the loss of each epoch and, after the last, the output on the rows. bfloat16 is training of
    float32 weights under autocast.
    """
    width, batch, epochs = (case.sizes[name] for name in ("in", "batch", "epochs"))
    weights, x, exact = draw_problem(width)
    data = torch.rand(case.sizes["rows"], width)
    low = case.dtype != torch.float32
    precision = partial(torch.autocast, case.device, case.dtype) if low else nullcontext

    def side(make: Callable[[int], nn.Module], call: Callable[..., Call], **chosen: Any) -> Side:
        def verify() -> Results:
            model = make(width)
            losses = call(model, weights, x, CHECKED_EPOCHS, CHECKED_BATCH, precision, shuffle=False, **chosen)()
            return (*losses, model(x).detach())

        return Side(call(make(width), weights, data, epochs, batch, precision, shuffle=True, **chosen), verify)

    peers: dict[str, Side | str] = {name: side(make_eager, loop_call, adam=adam) for name, adam in EAGER.items()}
    if case.device == "cuda":
        peers[IN_GRAPH] = side(make_eager, graph_call)
    if not low and not options.quick:
        for name, mode in COMPILED.items():
            peers[name] = side(make_eager, loop_call, adam={"fused": True}, mode=mode)
    if not low and case.device == "cpu":
        problem = remote.Problem(weights, data, x, epochs, batch, CHECKED_EPOCHS, CHECKED_BATCH, LR, case.threads)
        peers |= remote.sides(options.peers, problem)
    names = (*(f"loss of epoch {epoch + 1}" for epoch in range(CHECKED_EPOCHS)), "output")
    return Sides(
        side(make_fused, fused_call),
        peers,
        exact,
        names,
        rounded=low,
    )


def draw_problem(width: int) -> tuple[list[Tensor], Tensor, Results]:
    """First weights, rows to check the training on, and what training gives in float64.

    Drawn again while that run meets a value so near to zero before a relu that rounding decides which way a gradient
    goes: from there two right answers part.
    """
    while True:
        weights = [parameter.detach().clone() for parameter in make_eager(width).parameters()]
        x = torch.rand(CHECKED_ROWS, width)
        exact, nearest = train_exactly(weights, x)
        if nearest > MARGIN:
            return weights, x, exact


def train_exactly(weights: list[Tensor], x: Tensor) -> tuple[Results, float]:
    """What the check compares, in float64, and the value before a relu that is nearest to 0, in the layer's largest."""
    model = make_eager(x.shape[1]).double()
    nearest: list[float] = []

    def note(_module: nn.Module, _x: tuple, preact: Tensor) -> None:
        size = preact.detach().abs()
        nearest.append((size.min() / size.max()).item())

    hooks = [layer.register_forward_hook(note) for layer in model[:-1:2]]
    losses = loop_call(model, weights, x.double(), CHECKED_EPOCHS, CHECKED_BATCH, nullcontext, shuffle=False, adam={})()
    for hook in hooks:
        hook.remove()
    return (*losses, model(x.double()).detach()), min(nearest)


def make_fused(width: int) -> nn.Module:
    return AutoEncoder(Encoder(width, HIDDEN))


def make_eager(width: int) -> nn.Module:
    layers = [nn.Linear(K, N) for K, N in layer_sizes(width)]
    modules = [module for layer in layers for module in (layer, nn.ReLU())]
    return nn.Sequential(*modules[:-1])


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
    adam: dict[str, bool],
    mode: str | None = None,
) -> Call:
    """The loop that PyTorch's tutorials have. mode: of torch.compile, which then compiles the model."""
    set_weights(model, weights)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, **adam)
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
    dtypes=(torch.float32, torch.bfloat16),
    budget_s=15.0,
)
