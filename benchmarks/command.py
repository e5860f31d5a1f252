"""What to measure, and measuring it: each question in several processes, all figures of one run in one list of rows."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from . import cuda
from .harness import EVERY, Case, Outcome, run_case
from .machine import Peaks, measure_peaks
from .report import Measured, make_records
from .stats import FEWEST

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PEERS = Path(".venv-peers")
QUICK_BUDGET_S = 0.05


@dataclass(frozen=True)
class Options:
    """What to measure: numbers of threads, dtypes, whether only a few cases for a few milliseconds, and where.

    peers: the folder of the environment that holds the peers of other frameworks; None where there is none.
    processes: fresh processes that measure each case.
    """

    threads: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    quick: bool
    seed: int
    device: str = "cpu"
    peers: Path | None = None
    processes: int = 1

    def places(self) -> Iterator[Place]:
        """Each number of threads on the CPU; each way of timing on a GPU."""
        if self.device == "cpu":
            yield from (Place(threads) for threads in self.threads)
        else:
            yield from (Place(torch.get_num_threads(), self.device, way) for way in cuda.WAYS)


class Place(NamedTuple):
    """Where and how a case is timed: the fields of `Case` of these names."""

    threads: int
    device: str = "cpu"
    way: str = cuda.CALLS


@dataclass(frozen=True)
class Question:
    """A table: the cases that answer one question.

    budget_s: seconds spent on measuring one case, in all processes together.
    unit: "us", or that of the values which `measure` gives instead of times.
    measure: measures one case in the process that calls it, from a budget in seconds, the fewest rounds and a seed.
    """

    name: str
    title: str
    cases: Callable[[Options], Iterable[Case]]
    budget_s: float
    unit: str = "us"
    measure: Callable[[Case, float, int, int], Outcome] = run_case


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a few cases for a few milliseconds each: a smoke test")
    parser.add_argument("--threads", type=positive, nargs="+", help="numbers of threads; by default 1 and all")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES), help="by default all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="by default cpu")
    parser.add_argument("--tf32", action="store_true", help="let all sides multiply float32 as TF32 on a GPU")
    parser.add_argument("--seed", type=int, help="of weights and inputs; by default fresh ones in every run")
    parser.add_argument("--processes", type=positive, help="that measure each case; by default 3, with --quick 1")
    parser.add_argument("--peers", type=Path, metavar="DIR", help=f"by default {PEERS}, as `make bench-peers` makes it")


def positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number; give 1 or more")
    return int(text)


def parse_options(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> Options:
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here; run it on a machine with one, or leave --device out")
    if arguments.peers is not None and not (arguments.peers / "bin" / "python").exists():
        parser.error(f"--peers {arguments.peers}: no environment is there; make one by `make bench-peers`")
    threads = arguments.threads or [1, torch.get_num_threads()]
    return Options(
        tuple(dict.fromkeys(threads)),
        tuple(DTYPES[name] for name in dict.fromkeys(arguments.dtype)),
        arguments.quick,
        torch.seed() % 2**32 if arguments.seed is None else arguments.seed,
        arguments.device,
        arguments.peers or (PEERS if (PEERS / "bin" / "python").exists() else None),
        arguments.processes or (1 if arguments.quick else 3),
    )


@dataclass
class Answer:
    """What has been measured of a question so far; a run that is cut short keeps it."""

    question: Question
    options: Options
    machine: dict[str, Any]
    tf32: bool
    peaks: Peaks = field(default_factory=Peaks)
    measured: dict[str, Measured] = field(default_factory=dict)

    def run(self) -> None:
        """Measure every case in each process. Progress goes to stderr, one line a case and process.

        The peaks are measured before and after: one of a bad moment would flatter every share of it.
        """
        cases = list(self.question.cases(self.options))
        self.measured = {case.name: Measured(case) for case in cases}
        budget_s = QUICK_BUDGET_S if self.options.quick else self.question.budget_s / self.options.processes
        rounds = -(-FEWEST // self.options.processes)
        self.peaks = self.in_process(measure_peaks, cases, self.options.quick)
        for process in range(self.options.processes):
            with Worker(self.tf32) as worker:
                for case in cases:
                    outcome = worker.run(self.question.measure, case, budget_s, rounds, self.options.seed + process)
                    self.measured[case.name].outcomes.append(outcome)
                    print(f"{self.question.name}: {case.name}: {in_words(outcome)}", file=sys.stderr)
        try:
            self.peaks = self.peaks.raised_to(self.in_process(measure_peaks, cases, self.options.quick))
        except BrokenProcessPool:  # what has been measured is not to be lost
            print("The process that measured the peaks again died: shares are of those of before.", file=sys.stderr)

    def in_process(self, function: Callable[..., Any], *arguments: Any) -> Any:
        with Worker(self.tf32) as worker:
            return worker.submit(function, *arguments)

    def records(self) -> list[dict[str, Any]]:
        """The rows of the report."""
        question = self.question
        about = {"question": question.name, "title": question.title, "unit": question.unit, "seed": self.options.seed}
        measured = [case for case in self.measured.values() if case.complete()]
        return make_records(about, measured, self.peaks, self.machine)


class Worker:
    """A fresh process that measures; another takes its place if it dies."""

    def __init__(self, tf32: bool) -> None:
        self.tf32 = tf32

    def __enter__(self) -> Worker:
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), set_precision, (self.tf32,))
        return self

    def __exit__(self, *_error: object) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return self.pool.submit(function, *arguments).result()
        except KeyboardInterrupt:  # nobody waits for what it measures, which may be minutes
            for process in multiprocessing.active_children():
                process.terminate()
            raise

    def run(self, measure: Callable[..., Outcome], *arguments: Any) -> Outcome:
        try:
            return self.submit(measure, *arguments)
        except BrokenProcessPool:
            self.__exit__()
            self.__enter__()
            return Outcome(errors={EVERY: "the process that measured it died; is there enough memory?"})


def set_precision(tf32: bool) -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"


def in_words(outcome: Outcome) -> str:
    taken = [f"{median(samples.ratios):.2f} {name}" for name, samples in outcome.samples.items()]
    wrong = [f"ERROR {name}: {error}" for name, error in outcome.errors.items()]
    return "; ".join([*taken, *wrong])
