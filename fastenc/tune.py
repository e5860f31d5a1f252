"""tune(): measure the GPU backends on the user's own shapes, and keep what is fastest in the cache on disk."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import ops
from .activation import get_activation
from .backends import BACKENDS, choice, triton
from .explain import explain
from .functional import encoder

ROUNDS = 3  # of each side, in turns; the median counts

Call = Callable[[], object]
Timer = Callable[[Call], float]  # milliseconds of one call


def wall_time(call: Call) -> float:
    """Milliseconds that a call takes, launches on the host included, when many follow each other."""
    call()
    count = 1
    samples: list[float] = []
    while len(samples) < 10:
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(count):
            call()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        if seconds < 0.005 and count < 10_000:
            count *= 2
        else:
            samples.append(seconds / count)
    return 1000 * statistics.median(samples)


def graph_time(call: Call) -> float:
    """Milliseconds of a call in a CUDA graph."""
    from triton.testing import do_bench_cudagraph

    return do_bench_cudagraph(call, rep=20, return_mode="median")


def device_time(call: Call) -> float:
    """Milliseconds of a launch on the device, for choosing between configurations."""
    return triton.tuning().device_time(call)


class Timers(NamedTuple):
    """How calls are timed."""

    launch: Timer = device_time  # one launch, of one configuration
    plain: Timer = wall_time  # a step
    captured: Timer = graph_time  # a step in a CUDA graph


class Comparison(NamedTuple):
    """A step of some layers, measured on all sides."""

    problem: str  # for people
    microseconds: dict[str, float]  # by "eager" and the names of backends

    @property
    def choice(self) -> str:
        """The fastest; of equals, the first."""
        return min(self.microseconds, key=self.microseconds.__getitem__)


@dataclass(frozen=True)
class Tuning:
    """What `tune` measured. `str()` of it is a table for people."""

    comparisons: tuple[Comparison, ...]
    skipped: tuple[str, ...]  # layers that the kernels do not take, and why
    unwritten: str | None  # why it holds in this process only

    def __str__(self) -> str:
        width = max((len(comparison.problem) for comparison in self.comparisons), default=0)
        lines = []
        for comparison in self.comparisons[:1]:
            sides = "".join(f"{name + ' us':>11}" for name in comparison.microseconds)
            lines.append(f"{'':{width}}{sides}  choice")
        for comparison in self.comparisons:
            times = "".join(f"{time:11.1f}" for time in comparison.microseconds.values())
            lines.append(f"{comparison.problem:{width}}{times}  {comparison.choice}")
        lines += [f"not measured: {reason}" for reason in self.skipped]
        if self.unwritten:
            lines.append(f"kept for this process only, as the cache cannot be written: {self.unwritten}")
        return "\n".join(lines)


def tune(model: nn.Module, x: Tensor, timers: Timers = Timers()) -> Tuning:  # noqa: B008 - a tuple
    """Measure the fused layers of a model on x's shape, dtype and GPU, and keep the choices.

    For each layer or stack that `model(x)` runs: first the configurations of Triton's kernels, forward and backward,
    then eager PyTorch and every GPU backend that is usable here, in inference and in training, by themselves and in a
    CUDA graph. From then on `auto` chooses what was fastest, here and in later processes, for as many rows up to the
    next power of two. This takes from seconds to a few minutes for each layer. The model is left as it was.

    Args:
        model: any module, on a GPU, with FusedDense layers or fastenc's models in it.
        x: an input of the model.

    Raises:
        RuntimeError: the Triton kernels cannot run in this process; the message says why.
    """
    with ops.use_backend("triton"):
        decisions = explain(model, x).decisions
    results = [tune_stack(decision, x.device, timers) for decision in dict.fromkeys(decisions)]
    return Tuning(
        tuple(comparison for result in results for comparison in result.comparisons),
        tuple(skipped for result in results for skipped in result.skipped),
        next((result.unwritten for result in results if result.unwritten), None),
    )


def tune_stack(decision: ops.Decision, device: torch.device, timers: Timers) -> Tuning:
    """As `tune`, for random numbers through layers as in `decision`, made with the backend forced."""
    if decision.backend != triton.NAME:
        return Tuning((), (str(decision),), None)
    step = _Step(decision, device)
    unwritten = None
    with ops.use_backend("triton"), triton.tuning().searching(timers.launch) as search:
        for training in (False, True):
            step.run(encoder, training)
    measured = [name for name in choice.KERNELS if BACKENDS[name].why_unavailable() is None]
    comparisons = []
    for timer, captured in ((timers.plain, False), (timers.captured, True)):
        for training in (False, True):
            problem = choice.problem_of(step.x, step.weights, decision.activations, training)
            problem = problem._replace(captured=captured)
            microseconds = step.compare(timer, training, measured)
            unwritten = choice.choose(problem, device, microseconds) or unwritten
            comparisons.append(Comparison(str(problem), microseconds))
    return Tuning(tuple(comparisons), (), search.unwritten or unwritten)


class _Step:
    """Random numbers through some layers, forward or forward and backward."""

    def __init__(self, decision: ops.Decision, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(decision.dtype)

        pairs = list(zip(decision.widths, decision.widths[1:], strict=False))
        self.activations = decision.activations
        self.x = normal(decision.rows, decision.widths[0])
        self.weights = [(normal(N, K) / max(K, 1) ** 0.5).requires_grad_() for K, N in pairs]
        self.biases = [
            normal(N).requires_grad_() if bias else None for (_, N), bias in zip(pairs, decision.biases, strict=True)
        ]
        self.grad_out = normal(decision.rows, decision.widths[-1])
        # A single layer is most often one of several, and passes a gradient on; a stack begins with the data.
        self.leaves = [*self.weights, *(bias for bias in self.biases if bias is not None)]
        if len(pairs) == 1:
            self.leaves.append(self.x.requires_grad_())

    def run(self, forward: Callable[..., Tensor], training: bool) -> None:
        with torch.set_grad_enabled(training):
            out = forward(self.x, self.weights, self.biases, self.activations)
            if training:
                torch.autograd.grad(out, self.leaves, self.grad_out)

    def compare(self, timer: Timer, training: bool, backends: Sequence[str]) -> dict[str, float]:
        """Microseconds of eager PyTorch and of each backend."""
        times: dict[str, list[float]] = {name: [] for name in ("eager", *backends)}
        for _ in range(ROUNDS):
            times["eager"].append(timer(lambda: self.run(_eager, training)))
            for name in backends:
                with ops.use_backend(name):
                    times[name].append(timer(lambda: self.run(encoder, training)))
        return {name: 1000 * statistics.median(samples) for name, samples in times.items()}


def _eager(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], names: Sequence[str]) -> Tensor:
    for weight, bias, name in zip(weights, biases, names, strict=True):
        x = get_activation(name).forward(F.linear(x, weight, bias))
    return x
