"""Mistakes planted in the CUDA kernels: each is caught by an emulated launch, and the kernels without them by none.

No one way of looking catches all: exact results, schedules that must give the same bits, guards, the emulator's own
rules, AddressSanitizer, ThreadSanitizer. Run with -s to see which caught what.
"""

import re
from dataclasses import replace

import pytest
from cuda_native import ROOT, Case, run, schedules


def dense(arithmetic: str, **changes: object) -> Case:
    case = Case("dense_forward", arithmetic, M=70, widths=(135, 90), activations=("sigmoid",), save=True)
    return replace(case, **changes)


DENSE = [dense("bfloat16", widths=(136, 90)), dense("half"), dense("tf32"), dense("ieee", widths=(136, 90))]

# Each PLANTED(name) of csrc/cuda, and launches that come by it.
MISTAKES = {
    "BiasTooFar": DENSE,
    "EarlyWait": DENSE,
    "LoadColumnTooFar": DENSE,
    "LoadRowTooFar": DENSE,
    "MissingWait": DENSE,
    "NoBarrierBeforeOverwrite": DENSE,
    "NoBarrierBeforeStore": DENSE,
    "NoBarrierBeforeUse": DENSE,
    "StoreColumnTooFar": DENSE,
    "StoreRowTooFar": DENSE,
    "WrongFragment": DENSE,
}

LOOKS = ("wrong", "schedule", "fault", "guard", "address", "undefined", "race")


def caught_by(cases: list[Case]) -> list[str]:
    """The ways of looking that see a mistake in these launches."""
    everything = [scheduled for case in cases for scheduled in schedules(case)]
    plain = run("plain", everything)
    digests: dict[Case, set[str]] = {}
    for outcome in plain:
        case = replace(outcome.case, order="forward", late=True, check=True)
        digests.setdefault(case, set()).add(outcome.detail if outcome.verdict == "ok" else "")
    seen = {outcome.verdict for outcome in plain} | {outcome.verdict for outcome in run("address", everything)}
    seen |= {outcome.verdict for outcome in run("thread", everything)}
    if any(len(bits - {""}) > 1 for bits in digests.values()):
        seen.add("schedule")
    return [look for look in LOOKS if look in seen]


def test_every_mistake_has_launches():
    sources = [path.read_text() for path in sorted((ROOT / "csrc/cuda").iterdir()) if path.name != "gpu.cuh"]
    names = {name for source in sources for name in re.findall(r"PLANTED\((\w+)\)", source)}
    assert names - {"name"} == set(MISTAKES)


def test_the_kernels_as_they_are_pass():
    assert caught_by(list(dict.fromkeys(case for cases in MISTAKES.values() for case in cases))) == []


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_caught(name):
    looks = caught_by([replace(case, planted=name) for case in MISTAKES[name]])
    print(f"{name:28s} " + " ".join(look if look in looks else "-" * len(look) for look in LOOKS))
    assert looks
