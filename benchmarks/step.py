"""How long is one training step, in Trainer and in a loop of one's own, without what a fit costs beside its steps?"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from .command import Options, Question
from .cuda import CALLS
from .fit import EAGER, FUSED_ADAM, HIDDEN, Plan, Problem, fused_call, loop_call, make_fused, training_case
from .harness import Case, Side, Sides

TRAINER, LOOP = "Trainer, autoencoder", "a loop of one's own, autoencoder"
# What transfer trains: not the encoder's layers but for its last.
FROZEN_TRAINER, FROZEN_LOOP = f"{TRAINER}, first 3 layers frozen", f"{LOOP}, first 3 layers frozen"
FROZEN = {TRAINER: 0, LOOP: 0, FROZEN_TRAINER: 3, FROZEN_LOOP: 3}
NOTHING_FROZEN = "ours, nothing frozen"
# in, rows, batch, epochs: so long that a fit's own cost, about a millisecond, is lost in it
PROBLEMS = ((100, 8192, 32, 1), (784, 8192, 32, 1), (784, 16384, 256, 1), (784, 16384, 4096, 1))
QUICK_PROBLEMS = ((100, 128, 32, 1),)


def cases(options: Options) -> Iterator[Case]:
    problems = QUICK_PROBLEMS if options.quick else PROBLEMS
    for place, dtype, mode, problem in itertools.product(options.places(), options.dtypes, FROZEN, problems):
        if place.way == CALLS:
            sizes = dict(zip(("in", "rows", "batch", "epochs"), problem, strict=True))
            plan = Plan((problem[0], *HIDDEN), *problem[1:], frozen=FROZEN[mode])
            yield training_case(mode, sizes, plan, dtype, place, partial(setup, plan=plan))


def setup(case: Case, plan: Plan) -> Sides:
    """The loop is the same on both sides but for the model, with fused Adam; Trainer is compared with both of EAGER.

    Where layers are frozen, so they are for eager; and our own training of all layers is one more side.
    """
    problem = Problem(case, plan)
    whole = Problem(case, replace(plan, frozen=0), problem.data) if plan.frozen else None

    def ours(of: Problem) -> Side:
        if case.mode in (TRAINER, FROZEN_TRAINER):
            return of.side(make_fused, fused_call)
        return of.side(make_fused, loop_call, adam=EAGER[FUSED_ADAM])

    peers = problem.eager(*(EAGER if case.mode in (TRAINER, FROZEN_TRAINER) else (FUSED_ADAM,)))
    if whole is not None:
        peers[NOTHING_FROZEN] = replace(ours(whole), exact=whole.exact)
    return problem.sides(ours(problem), peers)


QUESTION = Question(
    name="step",
    title="One training step: autoencoder in-128-64-32-16 and back, mse, Adam",
    cases=cases,
    budget_s=4.0,
)
