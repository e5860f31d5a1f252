"""Mistakes planted in the CUDA kernels: each is caught in an emulated launch, and the kernels without them never are.

No one way of looking catches all: exact results, schedules that must give the same bits, guards, the emulator's own
rules, AddressSanitizer, ThreadSanitizer. The table of all, which `make test-full ARGS=-s` prints, says
what catches what.
"""

import functools
import re
from collections.abc import Iterable
from dataclasses import replace

import pytest
from cuda_native import ROOT, Case, Outcome, run, schedules


def op(name: str, M: int, *widths: int, activation: str = "sigmoid", **more: object) -> Case:
    return Case(name, "bfloat16", M, widths, (activation,) * (len(widths) - 1), **more)


def as_types(case: Case, *names: str) -> list[Case]:
    return [replace(case, arithmetic=name) for name in names]


# Columns that no 16 bytes divide, and some that 8 do; the products of all types.
DENSE = [
    op("dense_forward", 70, 136, 90),
    *as_types(op("dense_forward", 70, 135, 90), "half", "tf32", "ieee"),
]
GRADIENT = [
    *as_types(op("preact_gradient", 70, 1, 24, activation="gelu"), "half", "ieee"),
    *as_types(op("preact_gradient", 170, 1, 137), "bfloat16", "tf32"),
]
PARTIALS = as_types(op("weight_partials", 200, 17, 24), "bfloat16", "ieee")
SUMS = as_types(op("reduce", 7, 130, 5), "half", "ieee")
FORWARD = [
    *as_types(op("encoder_forward", 70, 100, 128, 63, 17), "bfloat16", "tf32", "ieee"),
    *as_types(op("encoder_forward", 33, 72, 66, 33, 300, activation="gelu"), "half", "ieee"),
]
CHAIN = [
    *as_types(op("encoder_backward", 70, 40, 65, 33, 17), "bfloat16", "ieee"),
    replace(op("encoder_backward", 70, 20, 128, 16), activations=("relu", "sigmoid"), arithmetic="half"),
    *as_types(op("encoder_backward", 70, 24, 33, 140, activation="gelu"), "half", "tf32"),
]
# Padding is multiplied by other padding, zeros: what should not be there shows where Inf makes it NaN.
PADDED_COLUMNS = op("encoder_forward", 40, 9, 8, 7, infinite="x")
PADDED_GRADIENTS = op("encoder_backward", 40, 9, 1, 7, infinite="grad_out")
PADDED_ROWS = op("encoder_backward", 1, 9, 8, 7, infinite="weight")

# Each PLANTED(name) of csrc/cuda, and launches that come by it.
MISTAKES = {
    # In products and tiles, which all of these are made of.
    "EarlyWait": DENSE,
    "MissingWait": DENSE,
    "LoadColumnTooFar": DENSE,
    "LoadRowTooFar": DENSE,
    "NoBarrierBeforeOverwrite": DENSE,
    "NoBarrierBeforeStore": DENSE,
    "NoBarrierBeforeUse": DENSE,
    "StoreColumnTooFar": PARTIALS,
    "StoreRowTooFar": PARTIALS,
    "WrongFragment": DENSE,
    # A dense layer.
    "BiasTooFar": DENSE,
    "OutRowTooFar": DENSE,
    "PackColumnTooFar": [*DENSE, *GRADIENT],
    "ArrivalOrder": GRADIENT,
    "EarlyReturn": GRADIENT,
    "NoBarrierBeforeSums": GRADIENT,
    "SumsColumnTooFar": GRADIENT,
    "SumsRowTooMany": GRADIENT,
    "WeightPartialsOneStepTooMany": PARTIALS,
    "ReduceTooFar": SUMS,
    "ReduceTooFew": SUMS,
    # A stack forward.
    "ForwardBiasTooFar": FORWARD,
    "ForwardKeptSums": FORWARD,
    "ForwardNoBarrierAfterSums": FORWARD,
    "ForwardNoBarrierBeforeOutputs": FORWARD,
    "ForwardNoBarrierBeforeSums": FORWARD,
    "ForwardPaddedColumn": [PADDED_COLUMNS],
    "ForwardPreactAfterActivation": FORWARD,
    "ForwardRowTooFar": FORWARD,
    "ForwardStaleWeights": FORWARD,
    "ForwardWideOverInputs": FORWARD,
    # The chain of its backward pass.
    "ChainArrivalOrder": CHAIN,
    "ChainBiasTooFar": CHAIN,
    "ChainEarlyWait": CHAIN,
    "ChainMissingWait": CHAIN,
    "ChainNoBarrierBeforeOverwrite": CHAIN,
    "ChainNoBarrierBeforeStaging": CHAIN,
    "ChainNoBarrierBeforeStore": CHAIN,
    "ChainNoBarrierBeforeSums": CHAIN,
    "ChainNoBarrierBeforeUse": CHAIN,
    "ChainPaddedColumns": [PADDED_GRADIENTS],
    "ChainPaddedRows": [PADDED_ROWS],
    "ChainStoreRowTooFar": CHAIN,
    "ChainSumsRowTooFar": CHAIN,
    "ChainWrongLayer": CHAIN,
}

BUILDS = ("plain", "address", "thread")
LOOKS = ("wrong", "schedule", "fault", "guard", "address", "undefined", "race", "crash")


def seen_in(kind: str, cases: Iterable[Case]) -> set[str]:
    """The ways of looking that see a mistake in these launches, in all schedules, in this build."""
    outcomes = run(kind, [scheduled for case in cases for scheduled in schedules(case)])
    return ({outcome.verdict for outcome in outcomes} - {"ok"}) | ({"schedule"} if differ(outcomes) else set())


def differ(outcomes: Iterable[Outcome]) -> bool:
    """Whether a launch that none finds fault with gives other bits in another schedule."""
    bits: dict[Case, set[str]] = {}
    for outcome in outcomes:
        if outcome.verdict == "ok":
            bits.setdefault(replace(outcome.case, order="forward", late=True, check=True), set()).add(outcome.detail)
    return any(len(different) > 1 for different in bits.values())


@functools.cache
def caught(kind: str, name: str) -> set[str]:
    """The ways of looking that see this mistake in this build."""
    return seen_in(kind, [replace(case, planted=name) for case in MISTAKES[name]])


def test_every_mistake_has_launches():
    sources = [path.read_text() for path in sorted((ROOT / "csrc/cuda").iterdir()) if not path.name.startswith("gpu")]
    assert {name for source in sources for name in re.findall(r"PLANTED\((\w+)\)", source)} == set(MISTAKES)


@pytest.mark.parametrize("kind", BUILDS)
def test_the_kernels_as_they_are_pass(kind):
    assert seen_in(kind, dict.fromkeys(case for cases in MISTAKES.values() for case in cases)) == set()


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_caught(name):
    assert any(caught(kind, name) for kind in BUILDS)


@pytest.mark.full
def test_table_of_mistakes_and_what_catches_them():
    table = {name: {look for kind in BUILDS for look in caught(kind, name)} for name in MISTAKES}
    for name, looks in table.items():
        print(f"\n{name:30s}", *(look if look in looks else " " * len(look) for look in LOOKS), end="")
    for kind in ("wrong", "address", "race"):
        assert any(kind not in looks for looks in table.values())  # else the others were of no use
