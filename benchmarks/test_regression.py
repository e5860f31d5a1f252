"""The benchmark's cases under pytest-benchmark, for those who keep its history: all sides of each, at 1 thread.

    python -m pytest benchmarks/test_regression.py --benchmark-only --benchmark-autosave
    python -m pytest benchmarks/test_regression.py --benchmark-only --benchmark-compare

They are skipped unless asked for. Between two runs the machine may have changed too: a ratio to believe is that of
`fastenc bench`, where all sides take turns.
"""

import pytest
import torch

from benchmarks import QUESTIONS
from benchmarks.command import Options
from benchmarks.harness import Case, find_errors, threads

OPTIONS = Options(threads=(1,), dtypes=(torch.float32, torch.bfloat16), quick=True, seed=0)
CASES = [case for question in QUESTIONS if question.unit == "us" for case in question.cases(OPTIONS)]


@pytest.mark.parametrize("side", ["ours", "eager"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_speed(benchmark, case: Case, side: str) -> None:
    benchmark.group = case.name
    torch.manual_seed(OPTIONS.seed)
    sides = case.setup(case)
    eager, *_ = sides.present().values()
    with threads(case.threads), sides.context():
        assert not find_errors(sides)
        benchmark(sides.ours.call if side == "ours" else eager.call)
