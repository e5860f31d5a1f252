"""How long is one training step, in Trainer and in a loop of one's own, without what a fit costs beside its steps?"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

from .command import Options, Question
from .cuda import CALLS
from .fit import EAGER, FUSED_ADAM, HIDDEN, Plan, Problem, loop_call, make_fused, training_case
from .harness import Case, Sides

TRAINER, LOOP = "Trainer, autoencoder", "a loop of one's own, autoencoder"
# in, rows, batch, epochs: so many steps that a fit's own cost is lost among them
PROBLEMS = ((100, 8192, 32, 1), (784, 8192, 32, 1), (784, 16384, 256, 2), (784, 16384, 4096, 4))
QUICK_PROBLEMS = ((100, 128, 32, 1),)


def cases(options: Options) -> Iterator[Case]:
    problems = QUICK_PROBLEMS if options.quick else PROBLEMS
    for place, dtype, mode, problem in itertools.product(options.places(), options.dtypes, (TRAINER, LOOP), problems):
        if place.way == CALLS:
            sizes = dict(zip(("in", "rows", "batch", "epochs"), problem, strict=True))
            plan = Plan((problem[0], *HIDDEN), *problem[1:])
            yield training_case(mode, sizes, plan, dtype, place, partial(setup, plan=plan))


def setup(case: Case, plan: Plan) -> Sides:
    """The loop is the same on both sides but for the model, with fused Adam; Trainer is compared with both of EAGER."""
    problem = Problem(case, plan)
    if case.mode == TRAINER:
        return problem.trainer_against(*EAGER)
    ours = problem.side(make_fused, loop_call, adam=EAGER[FUSED_ADAM])
    return problem.sides(ours, problem.eager(FUSED_ADAM))


QUESTION = Question(
    name="step",
    title="One training step: autoencoder in-128-64-32-16 and back, mse, Adam",
    cases=cases,
    budget_s=4.0,
)
