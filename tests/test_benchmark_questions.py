"""Each question of the benchmark asks what it says, and its sides are right."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # benchmarks/ is not installed; last, for an installed fastenc to count

from planted import dense_case

from benchmarks import fit, fuse, memory, models, scaling, stacks, step
from benchmarks.command import Options
from benchmarks.harness import EVERY, Case, Outcome, Side, Sides, run_case

OPTIONS = Options(threads=(1,), dtypes=(torch.float32, torch.bfloat16), quick=True, seed=0)
PLAN = fit.Plan((12, 8, 4), 40, 16, 2)


def training(mode: str, setup, plan: fit.Plan = PLAN, dtype: torch.dtype = torch.float32) -> Case:
    place = next(iter(OPTIONS.places()))
    return fit.training_case(mode, {"rows": plan.rows}, plan, dtype, place, lambda case: setup(case, plan))


def run(case: Case) -> Outcome:
    return run_case(case, 0.0, 1, seed=1)


@pytest.mark.parametrize("mode", [step.TRAINER, step.LOOP])
@pytest.mark.parametrize("dtype", OPTIONS.dtypes, ids=str)
def test_steps(mode: str, dtype: torch.dtype) -> None:
    outcome = run(training(mode, step.setup, dtype=dtype))
    assert not outcome.errors
    assert list(outcome.samples) == list(fit.EAGER)[-len(outcome.samples) :]
    assert len(outcome.samples) == (2 if mode == step.TRAINER else 1)


@pytest.mark.parametrize("mode", [step.FROZEN_TRAINER, step.FROZEN_LOOP])
@pytest.mark.parametrize("dtype", OPTIONS.dtypes, ids=str)
def test_steps_of_frozen_layers(mode: str, dtype: torch.dtype) -> None:
    plan = fit.Plan((12, 8, 6, 4), 40, 16, 2, frozen=2)
    outcome = run(training(mode, step.setup, plan, dtype))
    assert not outcome.errors
    assert list(outcome.samples)[-2:] == [fit.FUSED_ADAM, step.NOTHING_FROZEN]
    layers = fit.layer_sizes(plan.widths)
    gradients = 2 * sum(K * N for K, N in layers[2:]) - layers[2][0] * layers[2][1]
    assert fit.step_flops(10, plan.widths, 2) == 20 * (sum(K * N for K, N in layers) + gradients)


def test_layers_that_are_frozen_stay_as_they_are() -> None:
    for make in (fit.make_fused, fit.make_eager):
        model = fit.freeze(make((12, 8, 6, 4)), 2)
        trained = [parameter.requires_grad for parameter in model.parameters()]
        assert trained == [False] * 4 + [True] * 8


@pytest.mark.parametrize("setup", [scaling.train, scaling.from_map], ids=lambda setup: setup.__name__)
def test_growing_training(setup) -> None:
    assert not run(training("growing", setup)).errors


def test_growing_inference() -> None:
    assert not run(scaling.inference_case(next(iter(OPTIONS.places())), 3)).errors


def test_each_curve_has_one_size_that_varies() -> None:
    cases = list(scaling.cases(replace(OPTIONS, quick=False, threads=(1, 3))))
    assert all(len(case.sizes) == 1 for case in cases)
    assert [case.threads for case in cases if case.mode == scaling.BY_THREADS] == [1, 2, 3]
    assert max(case.sizes["batch"] for case in cases if case.mode == stacks.FORWARD) == 2**20
    assert {case.sizes["depth"] for case in cases if case.mode == scaling.BY_DEPTH} >= {1, 8}


def test_a_map_is_read_again_and_its_file_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    dropped, folders = [], []
    monkeypatch.setattr(scaling.os, "posix_fadvise", lambda *arguments: dropped.append(arguments[3]))
    true_folder = scaling.tempfile.TemporaryDirectory
    monkeypatch.setattr(scaling.tempfile, "TemporaryDirectory", lambda: folders.append(true_folder()) or folders[-1])
    case = training("growing", scaling.from_map)
    sides = case.setup(case)
    sides.ours.call()
    assert dropped == [scaling.os.POSIX_FADV_DONTNEED]
    assert Path(folders[0].name).exists()
    sides.ours.close()
    assert not Path(folders[0].name).exists()


def test_a_model_that_lacks_a_package_is_left_out_with_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = fuse.QUICK_MODELS[0]
    monkeypatch.setitem(models.MODELS, name, models.MODELS[name]._replace(needs=("torch", "no_such_package")))
    assert not list(fuse.cases(OPTIONS))
    assert capsys.readouterr().err == (
        f'fuse: {name}: left out without no_such_package; run: pip install "fastenc[tools]"\n'
    )


def test_memory_of_inference_is_of_inference() -> None:
    case = memory.inference_case(next(iter(OPTIONS.places())), 8)
    sides = case.setup(case)
    assert sides.names == ("out",)
    with sides.context():
        assert torch.is_inference_mode_enabled()


def holding(case: Case) -> Sides:
    """Ours takes 80 MiB for a moment, eager 40."""

    def take(mib: int) -> tuple:
        torch.zeros(mib * 2**18).add_(1)
        return (torch.zeros(1),)

    ours, eager = (Side(lambda mib=mib: take(mib), lambda: (torch.zeros(1),)) for mib in (80, 40))
    return Sides(ours, {stacks.EAGER: eager}, (torch.zeros(1, dtype=torch.float64),), ("out",))


def test_memory_is_what_a_call_holds_at_its_peak() -> None:
    outcome = memory.measure(replace(dense_case(), setup=holding), 0.0, 1, 0)
    assert not outcome.errors
    samples = outcome.samples[stacks.EAGER]
    assert samples.ours == [pytest.approx(80, abs=4)]
    assert samples.peer == [pytest.approx(40, abs=4)]
    assert samples.ratios == [samples.peer[0] / samples.ours[0]]


def test_memory_of_a_wrong_side_is_not_told() -> None:
    def wrong(case: Case) -> Sides:
        sides = holding(case)
        return replace(sides, ours=Side(sides.ours.call, lambda: (torch.ones(1),)))

    outcome = memory.measure(replace(dense_case(), setup=wrong), 0.0, 1, 0)
    assert not outcome.samples
    assert outcome.errors


def test_a_wrong_answer_of_training_is_found() -> None:
    def wrong(case: Case, plan: fit.Plan) -> Sides:
        problem = fit.Problem(case, plan)
        eager = problem.side(fit.make_eager, fit.loop_call, adam=torch.optim.Adam)
        other = problem.side(fit.make_eager, fit.loop_call, adam=torch.optim.NAdam)
        return problem.sides(other, {"eager": eager})

    for dtype in OPTIONS.dtypes:
        outcome = run(training("wrong", wrong, dtype=dtype))
        assert "of ours is off by" in outcome.errors[EVERY]
        assert not outcome.samples
