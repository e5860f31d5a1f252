"""Compile every kernel ahead of time, as the launchers launch it, and read what it needs from the machine code.

    python tests/gpu/compile.py                the report on the cases in cases.py, as JSON, to stdout
    python tests/gpu/compile.py --write        the same, into resources.json
    python tests/gpu/compile.py --cases NAME   on the cases in NAME.py
    python tests/gpu/compile.py --candidates   on the largest configurations that a search would measure

Needs neither GPU nor driver. It is a process of its own: whether `@triton.jit` compiles or interprets is settled when
the kernels are imported. Each case calls launchers on meta tensors; launches compile and do not run.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import importlib
import json
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton

RESOURCES = Path(__file__).parent / "resources.json"
PROCESSES = 2

Record = dict[str, Any]


def compile_cases(cases: str, candidates: bool, arch: int | str, dtype: str) -> list[Record]:
    """The records of all cases in this dtype for this architecture. Runs in a process of the pool."""
    import launching  # imports the kernels

    launched = launching.candidate_launches if candidates else launching.launches
    recorded: set[str] = set()
    return [
        record
        for case in importlib.import_module(cases).CASES
        if dtype in case.dtypes and arch in case.archs and (case.searched or not candidates)
        for record in launching.records(case, arch, dtype, launched(case, arch, dtype), recorded)
    ]


def compile_all(cases: str, candidates: bool) -> list[Record]:
    """The records of all cases, sorted. A kernel that several cases launch alike is there once, under the first."""
    import launching

    tasks = [(arch, dtype) for arch in (*launching.ARCHS, *launching.AMD) for dtype in launching.DTYPES]
    if candidates:
        tasks = [(arch, "bf16") for arch in launching.CANDIDATE_ARCHS]
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(PROCESSES, mp_context=spawn) as pool:
        found = pool.map(functools.partial(compile_cases, cases, candidates), *zip(*tasks, strict=True))
        records = [record for of_task in found for record in of_task]
    return sorted(records, key=lambda record: [str(record[key]) for key in ("kernel", "case", "dtype", "arch")])


def report(records: list[Record]) -> str:
    """JSON with one line per record, so that a change shows as a line of a diff."""
    lines = ",\n".join(json.dumps(record) for record in records)
    return f'{{"triton": "{triton.__version__}", "records": [\n{lines}\n]}}\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--cases", default="cases")
    parser.add_argument("--candidates", action="store_true")
    options = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryDirectory() as cache:  # neither kernels compiled before nor configurations measured before
        os.environ["TRITON_CACHE_DIR"] = os.environ["XDG_CACHE_HOME"] = cache
        text = report(compile_all(options.cases, options.candidates))
    if options.write:
        RESOURCES.write_text(text)
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
