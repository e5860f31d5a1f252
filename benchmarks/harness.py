"""Times one thing two ways, after checking that both give the right answer.

A `Case` is data; its `setup` makes `Sides`: two calls on the same fresh random inputs, and the answer in float64. A
case is checked, timed and checked again; a case that fails is a row that says so, never a figure.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import cuda
from .stats import FEWEST, Quartiles, median_interval, quartiles

SAMPLE_NS = 1_000_000  # a sample is as many calls as last this long, so that the clock's own cost does not count

Results = tuple[Tensor, ...]
Call = Callable[[], Results]


@dataclass(frozen=True)
class Case:
    """One row of a table.

    mode: what is computed, in words.
    sizes: the row's sizes by name, as the table shows them.
    dtype, threads: that both sides use.
    flops: floating-point operations of the matrix products that one call cannot do without, 2 * M * N * K each.
    setup: makes the two sides; random numbers come from torch's global generator.
    steps: training steps in one call; times and flops are reported per step.
    device, way: "cpu", or "cuda" and one of `cuda.WAYS` to time there.
    """

    mode: str
    sizes: dict[str, int]
    dtype: torch.dtype
    threads: int
    flops: int
    setup: Callable[[Case], Sides]
    steps: int = 1
    device: str = "cpu"
    way: str = cuda.CALLS

    @property
    def name(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.sizes.items())
        return f"{self.mode}, {sizes}, {dtype_name(self.dtype)}, {self.place}"

    @property
    def processor(self) -> str:
        """What has a peak of its own."""
        return count(self.threads, "thread") if self.device == "cpu" else self.device

    @property
    def place(self) -> str:
        return self.processor if self.device == "cpu" else f"{self.device}, {self.way}"


@dataclass(frozen=True)
class Sides:
    """Two calls that should give the same answer, and the answer.

    fused, eager: what is timed.
    exact: what both should return, computed in float64; `names` are for messages.
    context: entered around every run of calls, as a user would around a loop.
    verify: the calls to check, fused then eager, where a timed call changes the state that it starts from and so does
        not give the same answer twice. None: the timed calls themselves are checked.
    """

    fused: Call
    eager: Call
    exact: Results
    names: tuple[str, ...]
    context: Callable[[], AbstractContextManager] = nullcontext
    verify: tuple[Call, Call] | None = None


@dataclass(frozen=True)
class Timing:
    """Nanoseconds per call, and how many times faster fused is: eager / fused, with its 95% interval."""

    fused: Quartiles
    eager: Quartiles
    ratio: float
    low: float
    high: float
    rounds: int


@dataclass(frozen=True)
class Row:
    """What came of a case: a timing, or an error in words."""

    case: Case
    timing: Timing | None
    error: str | None


def run_case(case: Case, budget_s: float, seed: int) -> Row:
    """Check `case`, time it for about `budget_s` seconds, check it again. Whatever goes wrong is the row's error."""
    try:
        with threads(case.threads):
            torch.manual_seed(seed)
            with torch.device(case.device):
                sides = case.setup(case)
            with sides.context():
                if case.device == "cuda" and case.way == cuda.GRAPHS:
                    sides = replace(sides, fused=cuda.recorded(sides.fused), eager=cuda.recorded(sides.eager))
                take = sample if case.device == "cpu" else cuda.SAMPLES[case.way]
                if error := find_error(sides, case.device):
                    return Row(case, None, error)
                timing = time_pair(sides.fused, sides.eager, budget_s, take=take)
                if error := find_error(sides, case.device):
                    return Row(case, None, f"after timing: {error}")
            return Row(case, timing, None)
    except Exception as error:  # one broken case must not take the other rows along
        return Row(case, None, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


def find_error(sides: Sides, device: str = "cpu") -> str | None:
    """What is wrong with the answer of one of the sides, in words; None if both are right.

    fused: for each tensor, |fused - exact| <= 2 * |eager - exact| + 1e-6 * |exact|, each the largest in the tensor.
    eager: a wrong eager side would excuse a wrong fused one. In float32 (without TF32) it must have half of the digits
    right, in any dtype it must be finite. (In bfloat16 rounding alone flips a relu here and there, which is an error
    as large as a gradient; the same code is held to more in float32.)
    """
    fused_call, eager_call = sides.verify or (sides.fused, sides.eager)
    with torch.device(device):
        results = zip(sides.names, fused_call(), eager_call(), sides.exact, strict=True)
    all_digits = device == "cpu" or torch.backends.cuda.matmul.fp32_precision != "tf32"
    for name, fused, eager, exact in results:
        if (fused.shape, fused.dtype) != (eager.shape, eager.dtype):
            return f"{name} of fused is {describe(fused)} and of eager {describe(eager)}"
        fused_error, eager_error, largest = distance(fused, exact), distance(eager, exact), largest_value(exact)
        half = eager.dtype == torch.float32 and all_digits
        eager_limit = largest * torch.finfo(torch.float32).eps ** 0.5 if half else float("inf")
        # Written so that NaN fails.
        if not (eager_error <= eager_limit and eager_error < float("inf")):
            return f"{name} of eager is off by {eager_error:.3g}, and its largest value is {largest:.3g}"
        limit = 2 * eager_error + 1e-6 * largest
        if not fused_error <= limit:
            return f"{name} of fused is off by {fused_error:.3g}; eager's error allows {limit:.3g}"
    return None


Sample = Callable[[Callable[[], object], int, Callable[[], int]], float]


def sample(call: Callable[[], object], calls: int, clock: Callable[[], int] = time.perf_counter_ns) -> float:
    """Nanoseconds per call over `calls` calls in a row."""
    start = clock()
    for _ in itertools.repeat(None, calls):
        call()
    return (clock() - start) / calls


def time_pair(
    fused: Call,
    eager: Call,
    budget_s: float,
    clock: Callable[[], int] = time.perf_counter_ns,
    take: Sample = sample,
) -> Timing:
    """Time two calls against each other for `budget_s` seconds, or for FEWEST rounds if that takes longer.

    A round is fused, eager, eager, fused: a machine that speeds up or slows down steadily favours neither. Its ratio
    is one value; the first round is warm-up. `clock` returns nanoseconds, `take` those of a call.
    """
    with no_garbage_collection():
        counts = {call: calls_per_sample(call, clock, take) for call in (fused, eager)}
        fused_ns: list[float] = []
        eager_ns: list[float] = []
        ratios: list[float] = []
        deadline = clock() + budget_s * 1e9
        for round_number in itertools.count():
            if len(ratios) >= FEWEST and clock() >= deadline:
                break
            first, second, third, fourth = (take(call, counts[call], clock) for call in (fused, eager, eager, fused))
            if round_number > 0:
                fused_ns += [first, fourth]
                eager_ns += [second, third]
                ratios.append((second + third) / (first + fourth))
    return Timing(
        quartiles(fused_ns), quartiles(eager_ns), quartiles(ratios).median, *median_interval(ratios), len(ratios)
    )


def calls_per_sample(call: Call, clock: Callable[[], int] = time.perf_counter_ns, take: Sample = sample) -> int:
    """How many calls last SAMPLE_NS. They also warm the call up."""
    call()
    calls = 1
    while take(call, calls, clock) * calls < SAMPLE_NS:
        calls *= 2
    return calls


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect now, and not again until the end, so that neither side pays for the other's garbage."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Let torch use this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def distance(actual: Tensor, exact: Tensor) -> float:
    return largest_value(actual.detach().to(exact.device).double() - exact)


def largest_value(tensor: Tensor) -> float:
    return tensor.abs().max().item()


def describe(tensor: Tensor) -> str:
    return f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
