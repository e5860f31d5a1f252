"""The CUDA kernels, emulated: right in every schedule, with the same bits, and clean under the sanitizers."""

import itertools
from collections.abc import Iterable
from dataclasses import replace

import pytest
from cuda_cases import OPS, edges, random_cases
from cuda_native import ARITHMETICS, Case, run, schedules

LONG = list(itertools.islice(random_cases(seed=20), 300))


def clean(kind: str, cases: Iterable[Case]) -> None:
    """The cases run in this build, none is found fault with, and each gives the same bits in all of its schedules."""
    cases = list(cases)
    digests: dict[Case, str] = {}
    for outcome in run(kind, cases):
        case = outcome.case
        assert outcome.verdict == "ok", f"{kind}: {case.line()}\n{outcome.verdict} {outcome.detail}"
        bits = digests.setdefault(replace(case, order="forward", late=True, check=True), outcome.detail)
        assert bits == outcome.detail, f"{kind}: other bits than in the first schedule: {case.line()}"


def in_all_schedules(cases: Iterable[Case]) -> list[Case]:
    return [scheduled for case in cases for scheduled in schedules(case)]


@pytest.mark.brief
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("op", OPS)
def test_right_with_the_same_bits_in_all_schedules(op, arithmetic):
    clean("plain", in_all_schedules(edges(op, arithmetic)))


@pytest.mark.brief
@pytest.mark.parametrize("op", OPS)
def test_nothing_beyond_a_buffer_is_touched(op):
    cases = [case for arithmetic in ARITHMETICS for case in edges(op, arithmetic)]
    clean("address", [case for first in cases for case in (schedules(first)[0], schedules(first)[-1])])


@pytest.mark.brief
@pytest.mark.parametrize("op", OPS)
def test_no_races(op):
    cases = [edges(op, arithmetic)[1 + number % 2] for number, arithmetic in enumerate(ARITHMETICS)]
    clean("thread", in_all_schedules(cases))


@pytest.mark.full
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("kind", ["plain", "address", "thread"])
def test_long_sweep(kind, op):
    edge_cases = [case for arithmetic in ARITHMETICS for case in edges(op, arithmetic)]
    clean(kind, in_all_schedules([*edge_cases, *(case for case in LONG if case.op == op)]))
