"""Random launches of the CUDA kernels, emulated under AddressSanitizer and UBSan, against loops in double precision.

The emulator refuses a launch with more threads or shared memory than every supported GPU has. Outputs begin as NaN, so
that a grid which leaves something out is seen.
"""

import itertools
import random
import time

import pytest
from cuda_cases import random_cases
from cuda_native import run, schedules

BATCH = 25  # launches of a process


def fuzz(seconds: float) -> None:
    seed = random.SystemRandom().randrange(1 << 31)
    generator = random.Random(seed)
    cases = (generator.choice(schedules(case)[:1] * 2 + schedules(case)) for case in random_cases(seed))
    end, launches = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        for outcome in run("address", itertools.islice(cases, BATCH)):
            line = f"seed {seed}, launch {launches}: {outcome.case.line()}\n{outcome.verdict} {outcome.detail}"
            assert outcome.verdict == "ok", line
            launches += 1
    print(f"{launches} launches, seed {seed}")
    assert launches


@pytest.mark.brief
def test_random_launches():
    fuzz(seconds=30)


@pytest.mark.full
def test_many_random_launches():
    fuzz(seconds=120)
