"""The benchmark must not flatter: it catches answers that lie, and its figures are those planted."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # benchmarks/ is not installed; last, for an installed fastenc to count

from planted import add_at_first, dense_case, nan_at_last, tamper, with_sides, zero_last_row

from benchmarks import dense, encoder, stacks, stats, training
from benchmarks.command import Options
from benchmarks.harness import calls_per_sample, find_error, run_case, threads, time_pair
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
    assert (timing.ratio, timing.low, timing.high) == (0.5, 0.5, 0.5)
    assert timing.fused == Quartiles(4e6, 4e6, 4e6)
    assert timing.eager == Quartiles(2e6, 2e6, 2e6)


def test_a_machine_that_slows_down_steadily_favours_neither_side() -> None:
    clock = Clock()

    def slower_and_slower() -> tuple:
        slower_and_slower.cost += 100_000
        clock.now += slower_and_slower.cost
        return ()

    slower_and_slower.cost = 2_000_000
    timing = time_pair(slower_and_slower, lambda: slower_and_slower(), 1.0, clock)
    assert (timing.low, timing.ratio, timing.high) == (1, 1, 1)
    assert timing.fused.q1 < timing.fused.median < timing.fused.q3


def test_warm_up_is_not_counted() -> None:
    clock = Clock()
    slow_at_first = clock.work(10**9, 10**9, 10**9, 10**9, 2_000_000)
    timing = time_pair(slow_at_first, clock.work(2_000_000), 1.0, clock)
    assert timing.fused == Quartiles(2e6, 2e6, 2e6)


def test_time_is_bounded() -> None:
    clock = Clock()
    timing = time_pair(clock.work(10**9), clock.work(10**9), 0.1, clock)
    assert timing.rounds == stats.FEWEST
    clock = Clock()
    timing = time_pair(clock.work(10**6), clock.work(10**6), 1.0, clock)
    assert timing.rounds == 249  # of 4 ms, and one for warm-up


def test_a_sample_lasts_a_millisecond() -> None:
    clock = Clock()
    assert calls_per_sample(clock.work(10_000), clock) == 128
    assert calls_per_sample(clock.work(1_000_000), clock) == 1


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
    timing = time_pair(lambda: (sides.eager(), sides.eager())[0], sides.eager, 0.2, time.thread_time_ns)
    assert timing.low <= timing.ratio <= timing.high < 1
    assert (1 / 6) ** 0.5 < timing.ratio < (1 / 2) ** 0.5  # nearer to 1/2 than to 1/3 and to 1


# Checking.


@pytest.mark.parametrize("mode", [stacks.FORWARD, stacks.EVERYTHING])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_honest_case_is_timed(mode: str, dtype: torch.dtype) -> None:
    row = run_case(dense_case(mode, dtype), 0.0, seed=0)
    assert row.error is None
    assert row.timing.rounds == stats.FEWEST


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, add_at_first, "out of fused is off by 0.001; eager's error allows"),
        (1, zero_last_row, "grad_x of fused is off by"),
        (2, lambda grad: grad.flip(0), "grad_weight0 of fused is off by"),
        (2, lambda grad: grad.bfloat16().float(), "grad_weight0 of fused is off by"),
        (3, nan_at_last, "grad_bias0 of fused is off by nan"),
        (3, lambda grad: grad.double(), "grad_bias0 of fused is float64 [24] and of eager float32 [24]"),
        (3, lambda grad: grad[None], "grad_bias0 of fused is float32 [1, 24] and of eager float32 [24]"),
    ],
)
def test_a_case_that_lies_fails(index: int, change, message: str) -> None:
    row = run_case(with_sides(dense_case(), fused=tamper(index, change)), 0.0, seed=0)
    assert row.timing is None
    assert row.error.startswith(message)


def test_a_missing_gradient_fails() -> None:
    row = run_case(with_sides(dense_case(), fused=lambda call: lambda: call()[:-1]), 0.0, seed=0)
    assert row.timing is None
    assert row.error.startswith("ValueError")


def test_a_lie_told_only_after_the_check_fails() -> None:
    def right_once(call):
        calls = []

        def lying() -> tuple:
            calls.append(1)
            return call() if len(calls) == 1 else tamper(0, add_at_first)(call)()

        return lying

    row = run_case(with_sides(dense_case(), fused=right_once), 0.0, seed=0)
    assert row.timing is None
    assert row.error.startswith("after timing: out of fused")


def test_a_fused_side_that_writes_into_its_input_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    class Overwrites(dense.FusedDense):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = super().forward(x)
            x.mul_(2)
            return out

    monkeypatch.setattr(dense, "FusedDense", Overwrites)
    row = run_case(dense_case(stacks.FORWARD), 0.0, seed=0)
    assert row.error.startswith("out of eager is off by")


def test_a_wrong_eager_side_is_no_excuse() -> None:
    lie = tamper(2, lambda grad: grad * 1.01)
    row = run_case(with_sides(dense_case(), fused=lie, eager=lie), 0.0, seed=0)
    assert row.error.startswith("grad_weight0 of eager is off by")


def test_an_exception_is_a_row_and_not_the_end() -> None:
    def fail(call):
        def failing() -> tuple:
            raise RuntimeError("no such kernel\nmore")

        return failing

    assert run_case(with_sides(dense_case(), fused=fail), 0.0, seed=0).error == "RuntimeError: no such kernel"


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
        assert find_error(sides) is None


def test_the_number_of_threads_is_set_and_put_back() -> None:
    before = torch.get_num_threads()
    seen = []

    def note(call):
        def noting() -> tuple:
            seen.append(torch.get_num_threads())
            return call()

        return noting

    assert run_case(replace(with_sides(dense_case(), fused=note), threads=before + 1), 0.0, seed=0).error is None
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
    assert training.step_flops(32) == 2 * 32 * (6 * encoder_products - 100 * 128)


def test_the_full_grids() -> None:
    options = Options(threads=(1, 2), dtypes=(torch.float32, torch.bfloat16), quick=False, seed=0)
    grids = {module.QUESTION.name: list(module.QUESTION.cases(options)) for module in (dense, encoder, training)}
    assert {name: len(cases) for name, cases in grids.items()} == {
        "dense": 2 * 2 * 2 * 64,
        "encoder": 60,
        "training": 4,
    }
    for cases in grids.values():
        assert len({case.name for case in cases}) == len(cases)


@pytest.mark.parametrize(("lie", "right"), [({}, True), ({"lr": 1.01e-3}, False), ({"optimizer": "sgd"}, False)])
def test_training_is_checked(monkeypatch: pytest.MonkeyPatch, lie: dict, right: bool) -> None:
    true_trainer = training.Trainer
    monkeypatch.setattr(training, "Trainer", lambda model, **options: true_trainer(model, **(options | lie)))
    case = next(iter(training.cases(OPTIONS)))
    torch.manual_seed(0)
    error = find_error(case.setup(case))
    assert (error is None) == right, error
