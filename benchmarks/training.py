"""How many training steps per second does Trainer.fit take, beside a loop written by hand?"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastenc import AutoEncoder, Encoder
from fastenc.training import Trainer
from fastenc.training.recorder import CudaRecorder

from .command import Options, Question, main
from .cuda import CALLS, WARM_UP
from .harness import Call, Case, Results, Sides

WIDTHS = (100, 128, 64, 32, 16)
ROWS, BATCH = 1000, 32
LR = 1e-3
CHECKED_EPOCHS, CHECKED_ROWS = 2, 3 * BATCH + ROWS % BATCH  # the last batch is short, as in what is timed
MARGIN = 1e-6  # some ten times float32's rounding error
MODES = {"against Adam": {}, "against Adam(fused=True)": {"fused": True}}
IN_GRAPH = "against Adam(fused=True) in a CUDA graph"


def cases(options: Options) -> Iterator[Case]:
    epochs = 1 if options.quick else 4  # in one call of fit, whose own cost they share
    steps = epochs * -(-ROWS // BATCH)
    sizes = {"in": WIDTHS[0], "rows": ROWS, "batch": BATCH, "epochs": epochs}
    modes = [*MODES, IN_GRAPH] if options.device == "cuda" else MODES
    for place, dtype, mode in itertools.product(options.places(), options.dtypes, modes):
        if dtype in QUESTION.dtypes and place.way == CALLS:  # a fit is more than kernels, and records its own graph
            flops = step_flops(epochs * ROWS / steps)
            yield Case(mode, sizes, dtype, place.threads, flops, setup, steps, device=place.device)


def step_flops(rows: float) -> int:
    """Products of a step of `rows` rows: forward, grad_weight, and a grad_x for each layer but the first."""
    layers = list(itertools.pairwise((*WIDTHS, *WIDTHS[-2::-1])))
    return round(2 * rows * (3 * sum(K * N for K, N in layers) - WIDTHS[0] * WIDTHS[1]))


def setup(case: Case) -> Sides:
    """Timed: fit as a user calls it. Checked: a short one from fresh weights, whose batches are the same on both sides.

    What is checked is the loss of each epoch and, after the last, the output on the rows.
    """
    weights, x, exact = draw_problem(case.dtype)
    data = torch.rand(ROWS, WIDTHS[0]).to(case.dtype)
    epochs = case.sizes["epochs"]
    eager_call = partial(loop_call, adam=MODES[case.mode]) if case.mode in MODES else graph_call

    def verify_fused() -> Results:
        model = make_fused(case.dtype)
        return (*fused_call(model, weights, x, CHECKED_EPOCHS, shuffle=False)(), model(x))

    def verify_eager() -> Results:
        model = make_eager(case.dtype)
        return (*eager_call(model, weights, x, CHECKED_EPOCHS, shuffle=False)(), model(x))

    return Sides(
        fused_call(make_fused(case.dtype), weights, data, epochs, shuffle=True),
        eager_call(make_eager(case.dtype), weights, data, epochs, shuffle=True),
        exact,
        (*(f"loss of epoch {epoch + 1}" for epoch in range(CHECKED_EPOCHS)), "output"),
        verify=(verify_fused, verify_eager),
    )


def draw_problem(dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Results]:
    """First weights, rows to check the training on, and what training gives in float64.

    Drawn again while that run meets a value so near to zero before a relu that rounding decides which way a gradient
    goes: from there two right answers part.
    """
    while True:
        weights = [parameter.detach().clone() for parameter in make_eager(dtype).parameters()]
        x = torch.rand(CHECKED_ROWS, WIDTHS[0]).to(dtype)
        exact, nearest = train_exactly(weights, x)
        if nearest > MARGIN:
            return weights, x, exact


def train_exactly(weights: list[Tensor], x: Tensor) -> tuple[Results, float]:
    """What the check compares, in float64, and the value before a relu that is nearest to 0, in the layer's largest."""
    model = make_eager(torch.float64)
    nearest: list[float] = []

    def note(_module: nn.Module, _x: tuple, preact: Tensor) -> None:
        size = preact.detach().abs()
        nearest.append((size.min() / size.max()).item())

    hooks = [layer.register_forward_hook(note) for layer in model[:-1:2]]
    losses = loop_call(model, weights, x.double(), CHECKED_EPOCHS, {}, shuffle=False)()
    for hook in hooks:
        hook.remove()
    return (*losses, model(x.double()).detach()), min(nearest)


def make_fused(dtype: torch.dtype) -> nn.Module:
    return AutoEncoder(Encoder(WIDTHS[0], WIDTHS[1:], dtype=dtype))


def make_eager(dtype: torch.dtype) -> nn.Module:
    layers = [nn.Linear(K, N, dtype=dtype) for K, N in itertools.pairwise((*WIDTHS, *WIDTHS[-2::-1]))]
    modules = [module for layer in layers for module in (layer, nn.ReLU())]
    return nn.Sequential(*modules[:-1])


@torch.no_grad()
def set_weights(model: nn.Module, weights: list[Tensor]) -> None:
    for parameter, weight in zip(model.parameters(), weights, strict=True):
        parameter.copy_(weight)


def fused_call(model: nn.Module, weights: list[Tensor], x: Tensor, epochs: int, *, shuffle: bool) -> Call:
    set_weights(model, weights)
    trainer = Trainer(model, optimizer="adam", lr=LR, loss="mse")

    def call() -> Results:
        history = trainer.fit(x, epochs=epochs, batch_size=BATCH, shuffle=shuffle, verbose=False)
        return tuple(torch.tensor(loss) for loss in history.history["loss"])

    return call


def loop_call(
    model: nn.Module, weights: list[Tensor], x: Tensor, epochs: int, adam: dict[str, bool], *, shuffle: bool
) -> Call:
    set_weights(model, weights)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, **adam)

    def call() -> Results:
        losses = []
        for _ in range(epochs):
            order = torch.randperm(len(x), device=x.device) if shuffle else torch.arange(len(x), device=x.device)
            total = x.new_zeros(())  # summed as a tensor: .item() in every step would slow eager down
            for rows in order.split(BATCH):
                batch = x[rows]
                optimizer.zero_grad()
                loss = F.mse_loss(model(batch), batch)
                loss.backward()
                optimizer.step()
                total += loss.detach() * len(batch)
            losses.append(total / len(x))
        return tuple(losses)

    return call


def graph_call(model: nn.Module, weights: list[Tensor], x: Tensor, epochs: int, *, shuffle: bool) -> Call:
    """The loop as PyTorch's notes on CUDA graphs have it: full batches replayed, the last one of an epoch outside."""
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=True)
    rows, total = torch.arange(BATCH, device=x.device), x.new_zeros(())

    def step(batch: Tensor) -> None:
        optimizer.zero_grad()
        loss = F.mse_loss(model(batch), batch)
        loss.backward()
        optimizer.step()
        total.add_(loss.detach() * len(batch))

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
            for chosen in order.split(BATCH):
                if len(chosen) == BATCH:
                    rows.copy_(chosen)
                    replay()
                else:
                    step(x[chosen])
            losses.append(total / len(x))
        return tuple(losses)

    return call


QUESTION = Question(
    name="training",
    title="Trainer.fit against a loop in eager PyTorch: autoencoder 100-128-64-32-16, mse, Adam, batch 32; per step",
    cases=cases,
    dtypes=(torch.float32,),
    budget_s=10.0,
)

if __name__ == "__main__":
    sys.exit(main(QUESTION))
