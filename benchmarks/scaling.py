"""How does cost grow with batch, width, depth, rows and threads?"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from .command import Options, Place, Question
from .cuda import CALLS
from .fit import FUSED_ADAM, HIDDEN, Plan, Problem, Widths, training_case
from .harness import Call, Case, Results, Sides
from .stacks import FORWARD, encoder_sides, stack_bytes, stack_flops

BY_BATCH, BY_WIDTH, BY_DEPTH, BY_THREADS = (f"training by {name}" for name in ("batch", "width", "depth", "threads"))
BY_ROWS = "an epoch of a .npy map that is read from the disk"
IN, BATCH = 100, 256
BATCHES = (1, 16, 256, 4096, 65536, 2**20)
WIDTHS = (16, 32, 64, 128, 256, 512, 1024)
DEPTHS = (1, 2, 3, 4, 6, 8)
DATA = (1_000, 10_000, 100_000, 1_000_000)


def cases(options: Options) -> Iterator[Case]:
    """Each curve has the size that varies as its only one."""
    if torch.float32 not in options.dtypes:
        return
    places = [place for place in options.places() if place.way == CALLS]
    batches, widths, depths, data = (
        values[:3] if options.quick else values for values in (BATCHES, WIDTHS, DEPTHS, DATA)
    )
    for place in places:
        for batch in batches:
            yield inference_case(place, batch)
        for batch in batches:
            yield train_case(BY_BATCH, "batch", batch, (IN, *HIDDEN), place, batch)
        for width in widths:
            yield train_case(BY_WIDTH, "width", width, (width,) * 4, place)
        for depth in depths:
            yield train_case(BY_DEPTH, "depth", depth, (128,) * (depth + 1), place)
    if options.device == "cpu":
        most = max(options.threads)
        for threads in sorted({2**n for n in range(most.bit_length())} | {most}):
            yield train_case(BY_THREADS, "threads", threads, (784, *HIDDEN), Place(threads))
        for rows in data:
            plan = Plan((IN, *HIDDEN), rows, BATCH, 1)
            yield training_case(BY_ROWS, {"rows": rows}, plan, torch.float32, Place(most), partial(from_map, plan=plan))


def inference_case(place: Place, batch: int) -> Case:
    widths = (IN, *HIDDEN)
    flops, moved = stack_flops(batch, widths, FORWARD), stack_bytes(batch, widths, FORWARD, 4)
    sizes = {"batch": batch}
    return Case(FORWARD, sizes, torch.float32, place.threads, flops, moved, infer, device=place.device, way=place.way)


def infer(case: Case) -> Sides:
    return encoder_sides(case, case.sizes["batch"], (IN, *HIDDEN))


def train_case(mode: str, varies: str, value: int, widths: Widths, place: Place, batch: int = BATCH) -> Case:
    """About 4,096 rows or, of a larger batch, one step."""
    plan = Plan(widths, min(max(batch, 4096), 512 * batch), batch, 1)
    return training_case(mode, {varies: value}, plan, torch.float32, place, partial(train, plan=plan))


def train(case: Case, plan: Plan) -> Sides:
    return Problem(case, plan).trainer_against(FUSED_ADAM)


def from_map(case: Case, plan: Plan) -> Sides:
    """Rows from a file that is read from the disk each time: its pages are put out of memory before each call."""
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "rows.npy"
    np.save(path, torch.rand(plan.rows, plan.widths[0]).numpy())
    rows = np.load(path, mmap_mode="c")  # torch warns of arrays that cannot be written to
    sides = Problem(case, plan, torch.from_numpy(rows)).trainer_against(FUSED_ADAM)

    def cold(call: Call) -> Call:
        def run() -> Results:
            rows._mmap.madvise(mmap.MADV_DONTNEED)  # pages in use would stay
            with path.open("rb") as file:
                os.fsync(file)
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return call()

        return run

    peers = {name: replace(side, call=cold(side.call)) for name, side in sides.present().items()}
    return replace(sides, ours=replace(sides.ours, call=cold(sides.ours.call), close=folder.cleanup), peers=peers)


QUESTION = Question(
    name="scaling",
    title="How cost grows: inference and training steps of 100-128-64-32-16 and others",
    cases=cases,
    budget_s=2.0,
)
