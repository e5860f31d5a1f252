"""The benchmark's cases under pytest-benchmark, for those who keep its history: both sides of each, at 1 thread.

    python -m pytest benchmarks/test_regression.py --benchmark-only --benchmark-autosave
    python -m pytest benchmarks/test_regression.py --benchmark-only --benchmark-compare

They are skipped unless asked for. Between two runs the machine may have changed too: a ratio to believe is that of
`python -m benchmarks`, where both sides take turns.
"""

import pytest
import torch

from benchmarks import dense, encoder, training
from benchmarks.command import Options
from benchmarks.harness import Case, find_error, threads

OPTIONS = Options(threads=(1,), dtypes=(torch.float32, torch.bfloat16), quick=True, seed=0)
CASES = [case for module in (dense, encoder, training) for case in module.QUESTION.cases(OPTIONS)]


@pytest.mark.parametrize("side", ["fused", "eager"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_speed(benchmark, case: Case, side: str) -> None:
    benchmark.group = case.name
    torch.manual_seed(OPTIONS.seed)
    sides = case.setup(case)
    with threads(case.threads), sides.context():
        assert find_error(sides) is None
        benchmark(getattr(sides, side))
