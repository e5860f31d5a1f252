"""The command line that every question shares."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import cuda
from .harness import Case, Row, run_case
from .machine import QUICK_SIZES, SIZES, Peak, describe_machine, measure_peak, peak_name
from .report import build_report, to_markdown

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
QUICK_BUDGET_S = 0.05


@dataclass(frozen=True)
class Options:
    """What to measure: numbers of threads, dtypes, whether only a few cases for a few milliseconds, and where."""

    threads: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    quick: bool
    seed: int
    device: str = "cpu"

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
    """A table: the cases that answer one question. `budget_s` is the seconds spent on timing one case."""

    name: str
    title: str
    cases: Callable[[Options], Iterable[Case]]
    dtypes: tuple[torch.dtype, ...]
    budget_s: float


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a few cases for a few milliseconds each: a smoke test")
    parser.add_argument("--threads", type=positive, nargs="+", help="numbers of threads; by default 1 and all")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES), help="by default all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="by default cpu")
    parser.add_argument("--tf32", action="store_true", help="let both sides multiply float32 as TF32 on a GPU")
    parser.add_argument("--seed", type=int, help="of weights and inputs; by default fresh ones in every run")


def positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number of threads; give 1 or more")
    return int(text)


def parse_options(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> Options:
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here; run it on a machine with one, or leave --device out")
    torch.backends.cuda.matmul.fp32_precision = "tf32" if arguments.tf32 else "ieee"
    threads = arguments.threads or [1, torch.get_num_threads()]
    seed = torch.seed() % 2**32 if arguments.seed is None else arguments.seed
    dtypes = tuple(DTYPES[name] for name in dict.fromkeys(arguments.dtype))
    return Options(tuple(dict.fromkeys(threads)), dtypes, arguments.quick, seed, arguments.device)


def main(question: Question, arguments: Sequence[str] | None = None) -> int:
    """Answer one question from the command line. Exit code 1 if a case failed, 2 for bad arguments."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{question.name}", description=question.title)
    add_options(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    parsed = parser.parse_args(arguments)
    if parsed.json is not None and not parsed.json.parent.is_dir():
        parser.error(f"--json {parsed.json}: there is no folder {parsed.json.parent}; make it first")
    report = answer(question, parse_options(parser, parsed), describe_machine(parsed.device))
    if parsed.json is not None:
        write_json(report, parsed.json)
    print(to_markdown(report))
    return exit_code(report)


def answer(question: Question, options: Options, machine: dict[str, Any]) -> dict[str, Any]:
    """Measure every case and return the report. Progress goes to stderr, one line a case."""
    cases = list(question.cases(options))
    peaks = measure_peaks(cases, options.quick)
    rows: list[Row] = []
    for case in cases:
        row = run_case(case, QUICK_BUDGET_S if options.quick else question.budget_s, options.seed)
        outcome = f"{row.timing.ratio:.2f}" if row.timing is not None else f"ERROR {row.error}"
        print(f"{question.name}: {case.name}: {outcome}", file=sys.stderr)
        rows.append(row)
    # A peak that was measured in a bad moment would flatter every share of it: the higher of before and after counts.
    for name, peak in measure_peaks(cases, options.quick).items():
        peaks[name] = peaks[name].raised_to(peak.gflops, peak.source)
    return build_report(question.name, question.title, rows, peaks, machine, options.seed)


def measure_peaks(cases: Sequence[Case], quick: bool) -> dict[str, Peak]:
    """The peak for each dtype and number of threads, or GPU, among the cases."""
    sizes = QUICK_SIZES if quick else SIZES
    kinds = {peak_name(case): (case.dtype, case.threads, sizes[case.device], case.device) for case in cases}
    return {name: measure_peak(*kind) for name, kind in kinds.items()}


def write_json(report: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(report, indent=1) + "\n")


def exit_code(report: dict[str, Any]) -> int:
    return 1 if any(row["error"] is not None for row in report["rows"]) else 0
