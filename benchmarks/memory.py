"""How much memory does a fit take, and inference, beside eager PyTorch?"""

from __future__ import annotations

import ctypes
import gc
import itertools
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from .command import Options, Place, Question
from .cuda import CALLS
from .fit import EAGER, HIDDEN, Plan, Problem, training_case
from .harness import EVERY, Case, Outcome, Samples, Sides, describe_error, find_errors, set_up, threads
from .stacks import FORWARD, encoder_sides, stack_bytes, stack_flops

TRAINING, INFERENCE = "fit, autoencoder", "encoder 784-128-64-32-16, forward, inference"
BATCHES, ROWS = (256, 4096), 16384
INFERENCE_ROWS = 65536
QUICK_ROWS = 512
WIDTHS = (784, *HIDDEN)
MIB = 2**20


def cases(options: Options) -> Iterator[Case]:
    place = next(place for place in list(options.places())[::-1] if place.way == CALLS)  # all threads
    batches, rows = (BATCHES[:1], QUICK_ROWS) if options.quick else (BATCHES, ROWS)
    for dtype, batch in itertools.product(options.dtypes, batches):
        plan = Plan(WIDTHS, rows, batch, 1)
        sizes = {"rows": rows, "batch": batch}
        yield training_case(TRAINING, sizes, plan, dtype, place, partial(train, plan=plan))
    if torch.float32 in options.dtypes:
        yield inference_case(place, QUICK_ROWS if options.quick else INFERENCE_ROWS)


def inference_case(place: Place, rows: int) -> Case:
    flops, moved = stack_flops(rows, WIDTHS, FORWARD), stack_bytes(rows, WIDTHS, FORWARD, 4)
    sizes = {"rows": rows, "batch": rows}
    return Case(INFERENCE, sizes, torch.float32, place.threads, flops, moved, infer, device=place.device, way=place.way)


def train(case: Case, plan: Plan) -> Sides:
    return Problem(case, plan).trainer_against(*EAGER)


def infer(case: Case) -> Sides:
    # By the mode stack_sides knows what to do.
    return encoder_sides(replace(case, mode=FORWARD), case.sizes["rows"], WIDTHS)


def measure(case: Case, _budget_s: float, rounds: int, seed: int) -> Outcome:
    """MiB that a call takes at its peak beside what there was before, each side of a round in a process of its own."""
    try:
        sides = set_up(case, seed)
        with sides.context(), threads(case.threads):
            errors = find_errors(sides, case.device)
        if errors:
            return Outcome(errors=errors)
        taken = take_all(case, [seed + i for i in range(rounds)], [None, *sides.peers])
    except Exception as error:  # as run_case has it
        return Outcome(errors={EVERY: describe_error(error)})
    ours = taken.pop(None)
    return Outcome(
        {
            name: Samples(ours, values, [theirs / own for theirs, own in zip(values, ours, strict=True)])
            for name, values in taken.items()
            if name is not None
        }
    )


def take_all(case: Case, seeds: Sequence[int], names: Sequence[str | None]) -> dict[str | None, list[float]]:
    """By side, what each seed's process takes; as many at once as there are processors, memory being no race."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        started = {name: [pool.submit(in_fresh_process, case, seed, name) for seed in seeds] for name in names}
        return {name: [process.result() for process in each] for name, each in started.items()}


def in_fresh_process(case: Case, seed: int, peer: str | None) -> float:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak_of_call, case, seed, peer).result()


def peak_of_call(case: Case, seed: int, peer: str | None) -> float:
    """MiB of the call of `peer`, or of ours: what it holds at its peak that was not held before.

    What is loaded once, libraries and pools of threads, is there already: the check has run.
    """
    sides = set_up(case, seed)
    side = sides.ours if peer is None else sides.present()[peer]
    with sides.context(), threads(case.threads):
        side.results()
        if case.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            side.call()
            return (torch.cuda.max_memory_allocated() - before) / MIB
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # or freed memory would be taken again unseen
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = resident("VmRSS")
        side.call()
        return max(resident("VmHWM") - before, 4096) / MIB  # a page at least, to divide by


def resident(name: str) -> int:
    """Bytes, as Linux tells them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


QUESTION = Question(
    name="memory",
    title="Memory that a call takes beside its model and data, MiB at the peak",
    cases=cases,
    budget_s=0.0,
    unit="MiB",
    measure=measure,
)
