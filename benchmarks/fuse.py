"""What does the one line `fastenc.fuse(model)` give on models as people have them?"""

from __future__ import annotations

import copy
import functools
import importlib.util
import itertools
import sys
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastenc

from .command import Options, Question
from .cuda import CALLS
from .harness import Call, Case, Results, Side, Sides, largest_value
from .models import MODELS
from .stacks import EAGER, MARGIN

INFERENCE, TRAINING = "inference", "forward + backward"
QUICK_MODELS = ("recommender MLP (DLRM)",)
COMPILED, BOTH, BACKEND = "torch.compile", "fuse, then torch.compile", "torch.compile, backend fastenc"


def cases(options: Options) -> Iterator[Case]:
    names = [name for name in (QUICK_MODELS if options.quick else MODELS) if is_installed(name)]
    for place, mode, name in itertools.product(options.places(), (INFERENCE, TRAINING), names):
        if place.way == CALLS:
            compiles = not options.quick and place.threads == max(options.threads)
            yield Case(
                f"{name}, {mode}",
                {"batch": MODELS[name].batch},
                torch.float32,
                place.threads,
                *work_of(name, training=mode == TRAINING),
                partial(setup, name=name, compiles=compiles),
                device=place.device,
            )


def is_installed(name: str) -> bool:
    """Whether what the model needs is; a line on stderr says what is not."""
    missing = [package for package in MODELS[name].needs if importlib.util.find_spec(package) is None]
    if missing:
        packages = " and ".join(missing)
        print(f'fuse: {name}: left out without {packages}; run: pip install "fastenc[tools]"', file=sys.stderr)
    return not missing


@functools.cache
def work_of(name: str, training: bool) -> tuple[int, int]:
    """(floating-point operations of all products, the least bytes moved) of one call, as `Case` has them."""
    make, draw, batch, needs = MODELS[name]
    with torch.device("cpu" if needs else "meta"), FlopCounterMode(display=False) as counter:
        model, x = make().train(training), draw(batch)
        out = model(x)
        if training:
            out.sum().backward()
    weights = sum(parameter.numel() for parameter in model.parameters()) * 4
    ends = x.numel() * x.itemsize + out.numel() * out.itemsize
    # A training step reads the weights again and writes their gradients.
    return counter.get_total_flops(), 3 * weights + 2 * ends if training else weights + ends


def setup(case: Case, name: str, compiles: bool) -> Sides:
    """The same weights on all sides. Results are the output and, of training, the gradients of all parameters."""
    training = case.mode.endswith(TRAINING)
    model = MODELS[name].make().train(training)
    exact_model = copy.deepcopy(model).double()
    x = away_from_kinks(exact_model, MODELS[name].draw(case.sizes["batch"]))
    fused = fastenc.fuse(model, verbose=False)
    sides = {EAGER: model}
    if compiles:
        sides |= {
            COMPILED: torch.compile(model),
            BOTH: torch.compile(fused),
            BACKEND: torch.compile(model, backend="fastenc"),
        }
    if not training:
        with torch.inference_mode():
            exact: Results = (exact_model(widened(x)),)
        peers: dict[str, Side | str] = {key: Side(inference(side, x)) for key, side in sides.items()}
        return Sides(Side(inference(fused, x)), peers, exact, ("out",), torch.inference_mode)
    with torch.no_grad():
        grad_out = torch.randn_like(model(x))
    exact_grads = gradients_of(exact_model, widened(x), grad_out.double())[1]
    # Some are zero but for rounding, as that of a key's bias, which softmax does not see: there is nothing to compare.
    sizes = [largest_value(grad) for grad in exact_grads]
    scales = [1 / size if size > 1e-9 * max(sizes) else 0.0 for size in sizes]
    training_side = partial(as_side, x=x, grad_out=grad_out, scales=scales)
    exact = as_side(exact_model, widened(x), grad_out.double(), scales).results()
    peers = {key: training_side(side) for key, side in sides.items()}
    return Sides(training_side(fused), peers, exact, ("out", "the gradients, each divided by its largest value"))


def inference(model: nn.Module, x: Tensor) -> Call:
    return lambda: (model(x),)


def gradients_of(model: nn.Module, x: Tensor, grad_out: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Forward and backward: the output, and the gradients of all parameters; zero where a parameter takes no part."""
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = None
    out = model(x)
    out.backward(grad_out)
    return out.detach(), [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


def as_side(model: nn.Module, x: Tensor, grad_out: Tensor, scales: Sequence[float]) -> Side:
    """Timed is forward and backward. Compared are the output and all gradients, each of them scaled."""

    def results() -> Results:
        out, grads = gradients_of(model, x, grad_out)
        return out, torch.cat([grad.flatten() * scale for grad, scale in zip(grads, scales, strict=True)])

    return Side(lambda: (gradients_of(model, x, grad_out)[0],), verify=results)


def widened(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


class _NearZero(TorchDispatchMode):
    """Notes for which rows of the batch some value before a relu is nearly zero."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = torch.zeros(rows, dtype=torch.bool)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.relu.default:
            size = args[0].abs().reshape(len(self.rows), -1)
            self.rows |= (size < MARGIN * size.amax()).any(1)
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def away_from_kinks(model: nn.Module, x: Tensor) -> Tensor:
    """x with rows drawn again until no value before a relu is so near zero that rounding decides its gradient."""
    if not x.is_floating_point():
        return x
    doubtful = torch.arange(len(x))
    while len(doubtful):
        with _NearZero(len(doubtful)) as near:
            model(x[doubtful].double())
        doubtful = doubtful[near.rows]
        x[doubtful] = torch.randn_like(x[doubtful]) * x.std()
    return x


QUESTION = Question(
    name="fuse",
    title="fuse(model) against the model as it is",
    cases=cases,
    budget_s=3.0,
)
