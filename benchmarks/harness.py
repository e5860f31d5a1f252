"""Times one thing several ways, after checking that each gives the right answer.

A `Case` is data; its `setup` makes `Sides`: ours and those of its peers on the same fresh random inputs, and the answer
in float64. All sides are checked, timed in turns and checked again; a side that fails is a row that says so, never a
figure.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from statistics import median

import torch
import torch._dynamo
from torch import Tensor

from . import cuda

SAMPLE_NS = 1_000_000  # a sample is as many calls as last this long, so that the clock's own cost does not count
SLOW_BFLOAT16_FLOPS = 10**10  # of a call: PyTorch's bfloat16 products reach some 7 GFLOP/s with AVX2

Results = tuple[Tensor, ...]
Call = Callable[[], Results]
Sample = Callable[[Callable[[], object], int, Callable[[], int]], float]


@dataclass(frozen=True)
class Case:
    """What is measured, in one place.

    mode: what is computed, in words.
    sizes: the sizes by name, as the table shows them; a curve is drawn over the one that varies.
    dtype, threads: that all sides use.
    flops: floating-point operations of the matrix products that one step cannot do without, 2 * M * N * K each.
    bytes: the least that one step moves: what it reads and what it leaves behind, each once.
    setup: makes the sides; random numbers come from torch's global generator. It travels to another process by pickle.
    steps: training steps in one call; times are reported per step.
    device, way: "cpu", or "cuda" and one of `cuda.WAYS` to time there.
    """

    mode: str
    sizes: dict[str, int]
    dtype: torch.dtype
    threads: int
    flops: int
    bytes: int
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
class Side:
    """One way of doing it.

    call: what is timed.
    verify: the call to check, where a timed call changes the state that it starts from and so does not give the same
        answer twice. None: the timed call itself is checked.
    sample: nanoseconds per call over so many calls in a row, for a side that takes the time itself, in another process.
    close: ends what the side has started.
    exact: the answer of this side where it rightly is another than that of the others.
    """

    call: Call
    verify: Call | None = None
    sample: Callable[[int], float] | None = None
    close: Callable[[], None] = lambda: None
    exact: Results | None = None

    def results(self) -> Results:
        return (self.verify or self.call)()


@dataclass(frozen=True)
class Sides:
    """What is compared, and the answer.

    ours: our side.
    peers: the others by name, eager PyTorch first: its error is the measure of ours. A string says why one is missing.
    exact: what each side should return, computed in float64; `names` are for messages.
    context: entered around every run of calls, as a user would around a loop.
    rounded: whether it makes products lose digits of float32, as autocast does, though results are float32. Training
        then has a chance of its own to part from the answer, so the results are those of several runs, and the median
        of their errors is compared.
    """

    ours: Side
    peers: dict[str, Side | str]
    exact: Results
    names: tuple[str, ...]
    context: Callable[[], AbstractContextManager] = nullcontext
    rounded: bool = False

    def present(self) -> dict[str, Side]:
        return {name: side for name, side in self.peers.items() if isinstance(side, Side)}

    def missing(self) -> dict[str, str]:
        return {name: side for name, side in self.peers.items() if isinstance(side, str)}


@dataclass(frozen=True)
class Samples:
    """One process's timings of ours against one peer: nanoseconds per call, and peer / ours of each round."""

    ours: list[float]
    peer: list[float]
    ratios: list[float]


@dataclass(frozen=True)
class Outcome:
    """What one process has to say of a case, by peer: timings, why the peer is missing, or what is wrong in words."""

    samples: dict[str, Samples] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


EVERY = "every peer"  # of an error that is not one peer's


def run_case(case: Case, budget_s: float, rounds: int, seed: int) -> Outcome:
    """Check `case`, time it for about `budget_s` seconds and at least `rounds` rounds, check it again.

    Whatever goes wrong is the outcome's: one broken case must not take the others along.
    """
    if reason := why_left_out(case):
        return Outcome(missing={EVERY: reason})
    sides: Sides | None = None
    try:
        with threads(case.threads):
            sides = set_up(case, seed)
            return measure(case, sides, budget_s, rounds)
    except Exception as error:
        return Outcome(errors={EVERY: describe_error(error)})
    finally:
        if sides is not None:
            for side in (sides.ours, *sides.present().values()):
                side.close()


def why_left_out(case: Case) -> str | None:
    """Why a case is not measured, where one call of eager PyTorch would take seconds; None where it is."""
    slow = case.device == "cpu" and case.dtype == torch.bfloat16 and torch.backends.cpu.get_cpu_capability() == "AVX2"
    if not slow or case.flops * case.steps <= SLOW_BFLOAT16_FLOPS:
        return None
    return f"{case.name}: without AVX-512 a call of PyTorch's bfloat16 products takes seconds"


def set_up(case: Case, seed: int) -> Sides:
    # Each case compiles anew: after eight models of one class torch.compile would run the next ones as eager PyTorch.
    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch.manual_seed(seed)
    with torch.device(case.device):
        return case.setup(case)


def measure(case: Case, sides: Sides, budget_s: float, rounds: int) -> Outcome:
    with sides.context():
        if case.device == "cuda" and case.way == cuda.GRAPHS:
            sides = in_graphs(sides)
        missing = sides.missing()
        take = sample if case.device == "cpu" else cuda.SAMPLES[case.way]
        errors = find_errors(sides, case.device)
        if EVERY in errors:
            return Outcome({}, missing, errors)
        right = {name: side for name, side in sides.present().items() if name not in errors}
        samples = time_sides(sides.ours, right, budget_s, rounds, take=take)
        for name, error in find_errors(sides, case.device).items():
            errors.setdefault(name, f"after timing: {error}")
    if EVERY in errors:
        samples = {}
    return Outcome({name: taken for name, taken in samples.items() if name not in errors}, missing, errors)


def in_graphs(sides: Sides) -> Sides:
    """The sides with each call recorded in a CUDA graph. A peer other than the first that cannot be is missing."""
    peers = dict(sides.peers)
    for number, (name, side) in enumerate(sides.present().items()):
        try:
            peers[name] = replace(side, call=cuda.recorded(side.call))
        except Exception as error:
            if number == 0:
                raise
            peers[name] = f"it cannot be recorded in a CUDA graph: {describe_error(error)}"
    return replace(sides, ours=replace(sides.ours, call=cuda.recorded(sides.ours.call)), peers=peers)


def find_errors(sides: Sides, device: str = "cpu") -> dict[str, str]:
    """What is wrong with the answers, in words, by peer; what is wrong with ours, or with all, stands at EVERY.

    ours: for each tensor, |ours - exact| <= 2 * |eager - exact| + 1e-6 * |exact|, each the largest in the tensor, eager
    being the first peer. A peer: a wrong eager side would excuse a wrong one of ours. In float32 (without TF32) it must
    have half of the digits right, in any dtype it must be finite. (In bfloat16 rounding alone flips a relu here and
    there, which is an error as large as a gradient; the same code is held to more in float32.)
    """
    present = sides.present()
    if not present:
        return {EVERY: "there is no peer to compare with"}
    errors: dict[str, str] = {}
    with torch.device(device):
        ours = sides.ours.results()
        for number, (name, side) in enumerate(present.items()):
            try:
                theirs = side.results()
                error = find_peer_error(sides, theirs, side.exact or sides.exact, device)
            except Exception as raised:
                error = describe_error(raised)
            if error is not None:
                errors[name] = error
            if number == 0:
                wrong = error or find_own_error(sides, ours, theirs)
                if wrong is not None:
                    return {EVERY: wrong}
    return errors


def find_own_error(sides: Sides, ours: Results, eager: Results) -> str | None:
    errors = []
    for name, own, other, exact in zip(sides.names, ours, eager, sides.exact, strict=True):
        if (own.shape, own.dtype) != (other.shape, other.dtype):
            return f"{name} of ours is {describe(own)} and of eager {describe(other)}"
        error, limit = distance(own, exact), 2 * distance(other, exact) + 1e-6 * largest_value(exact)
        errors.append((name, error, limit))
    if sides.rounded:
        name = f"the median of {', '.join(dict.fromkeys(sides.names))}"
        errors = [(name, median(error for _, error, _ in errors), median(limit for *_, limit in errors))]
    for name, error, limit in errors:
        if not error <= limit:  # written so that NaN fails
            return f"{name} of ours is off by {error:.3g}; eager's error allows {limit:.3g}"
    return None


def find_peer_error(sides: Sides, theirs: Results, answer: Results, device: str) -> str | None:
    tf32 = device != "cpu" and torch.backends.cuda.matmul.fp32_precision == "tf32"
    for name, other, exact in zip(sides.names, theirs, answer, strict=True):
        if other.shape != exact.shape:
            return f"{name} is {describe(other)} and should be {list(exact.shape)}"
        error, largest = distance(other, exact), largest_value(exact)
        half = other.dtype == torch.float32 and not (tf32 or sides.rounded)
        limit = largest * torch.finfo(torch.float32).eps ** 0.5 if half else float("inf")
        if not (error <= limit and error < float("inf")):
            return f"{name} is off by {error:.3g}, and its largest value is {largest:.3g}"
    return None


def sample(call: Callable[[], object], calls: int, clock: Callable[[], int] = time.perf_counter_ns) -> float:
    """Nanoseconds per call over `calls` calls in a row."""
    start = clock()
    for _ in itertools.repeat(None, calls):
        call()
    return (clock() - start) / calls


def time_sides(
    ours: Side,
    peers: dict[str, Side],
    budget_s: float,
    rounds: int,
    clock: Callable[[], int] = time.perf_counter_ns,
    take: Sample = sample,
) -> dict[str, Samples]:
    """Time the sides against each other for `budget_s` seconds, or for `rounds` rounds if that takes longer.

    A round is ours, each peer, each peer backwards, ours: a machine that speeds up or slows down steadily favours none.
    A peer's ratio of a round is one value; the first round is warm-up. `clock` returns nanoseconds, `take` those of a
    call.
    """
    order = [ours, *peers.values()]

    def timed(side: Side, calls: int) -> float:
        return side.sample(calls) if side.sample is not None else take(side.call, calls, clock)

    with no_garbage_collection():
        counts = [calls_per_sample(side, timed) for side in order]
        taken: list[list[float]] = []
        deadline = clock() + budget_s * 1e9
        for round_number in itertools.count():
            if len(taken) >= rounds and clock() >= deadline:
                break
            there = [timed(side, calls) for side, calls in zip(order, counts, strict=True)]
            back = [timed(side, calls) for side, calls in zip(order[::-1], counts[::-1], strict=True)]
            if round_number > 0:
                taken.append([*there, *back])
    last = 2 * len(order) - 1
    return {
        name: Samples(
            [times[i] for times in taken for i in (0, last)],
            [times[i] for times in taken for i in (place, last - place)],
            [(times[place] + times[last - place]) / (times[0] + times[last]) for times in taken],
        )
        for place, name in enumerate(peers, start=1)
    }


def calls_per_sample(side: Side, timed: Callable[[Side, int], float]) -> int:
    """How many calls last SAMPLE_NS. They also warm the call up."""
    timed(side, 1)
    calls = 1
    while timed(side, calls) * calls < SAMPLE_NS:
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


def describe_error(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
