"""The benchmark's ways of timing on a GPU, by stand-ins where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # benchmarks/ is not installed; last, for an installed fastenc to count

from planted import add_at_first, dense_case, tamper, with_sides
from recording import CpuRecorder

import fastenc
from benchmarks import cuda, dense, encoder, fit, stacks
from benchmarks.command import Options
from benchmarks.harness import EVERY, Side, Sides, find_errors, run_case
from benchmarks.machine import product_key

ROOT = Path(__file__).parents[1]
GPU = torch.cuda.is_available()
OPTIONS = Options(threads=(1, 2), dtypes=(torch.float32, torch.bfloat16), quick=True, seed=0, device="cuda")


class StandIn:
    """A GPU whose flush takes 100 us, and whose calls take what `costs` says, in us."""

    def __init__(self) -> None:
        self.now_us = 0.0
        self.flushes = self.synchronised = 0

    def zero_(self) -> None:
        self.flushes += 1
        self.now_us += 100.0

    def event(self, enable_timing: bool):
        outer = self

        class Event:
            def record(self) -> None:
                self.at = outer.now_us

            def elapsed_time(self, end) -> float:
                return (end.at - self.at) / 1000  # in ms, as CUDA has it

        return Event()

    def work(self) -> None:
        self.now_us += 7.0

    def synchronize(self) -> None:
        self.synchronised += 1


@pytest.fixture
def stand_in(monkeypatch) -> StandIn:
    gpu = StandIn()
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
    monkeypatch.setattr(cuda, "l2_flush", lambda: gpu)
    return gpu


def test_kernels_are_timed_without_their_flush(stand_in) -> None:
    assert cuda.sample_kernels(stand_in.work, 5, None) == pytest.approx(7000)
    assert stand_in.flushes == 5
    assert stand_in.synchronised == 1


def test_calls_are_timed_from_an_idle_gpu_to_an_idle_gpu(stand_in) -> None:
    times = iter((1000, 9000))

    def clock() -> int:
        times_synchronised.append(stand_in.synchronised)
        return next(times)

    times_synchronised: list[int] = []
    assert cuda.sample_calls(stand_in.work, 4, clock) == 2000
    assert times_synchronised == [1, 2]


@pytest.mark.parametrize("module", [dense, encoder])
def test_each_way_of_timing_is_a_case(module) -> None:
    cases = list(module.QUESTION.cases(OPTIONS))
    assert {(case.device, case.way) for case in cases} == {("cuda", way) for way in cuda.WAYS}
    assert len({case.name for case in cases}) == len(cases)
    assert {product_key(case) for case in cases} == {"float32, cuda", "bfloat16, cuda"}
    assert all(case.name.endswith(f"cuda, {case.way}") for case in cases)


def test_training_is_compared_with_a_graph_too_and_timed_as_a_whole() -> None:
    cases = list(fit.QUESTION.cases(OPTIONS))
    assert [case.dtype for case in cases] == [*OPTIONS.dtypes]
    assert {case.way for case in cases} == {cuda.CALLS}


@pytest.fixture
def recorders(monkeypatch) -> list[CpuRecorder]:
    """Stand-ins for CUDA graphs, which see the fused layers only on this backend."""
    made: list[CpuRecorder] = []

    def make() -> CpuRecorder:
        made.append(CpuRecorder())
        return made[-1]

    for module in (cuda, fit):
        monkeypatch.setattr(module, "CudaRecorder", make)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with fastenc.use_backend("reference"):
        yield made


def test_the_loop_with_a_graph_is_right(recorders) -> None:
    torch.manual_seed(0)
    widths = (100, *fit.HIDDEN)
    drawn = fit.draw_problem(widths)

    def train(make, call) -> tuple:
        model, x = make(widths), drawn.x
        return (
            *call(model, drawn.weights, x, fit.CHECKED_EPOCHS, fit.CHECKED_BATCH, nullcontext, shuffle=False)(),
            model(x),
        )

    eager = Side(partial(train, fit.make_eager, partial(fit.loop_call, adam=torch.optim.Adam)))
    names = ("loss", "loss", "output")
    sides = Sides(Side(partial(train, fit.make_eager, fit.graph_call)), {"eager": eager}, drawn.exact, names)
    assert not find_errors(sides)
    assert [recorder.replayed for recorder in recorders] == [3 * fit.CHECKED_EPOCHS]


@pytest.mark.parametrize("mode", [stacks.FORWARD, stacks.EVERYTHING])
def test_recorded_calls_give_what_calls_give(recorders, mode) -> None:
    torch.manual_seed(0)
    sides = dense.setup(dense_case(mode))
    with sides.context():
        replayed = cuda.recorded(sides.ours.call)
        expected = [result.clone() for result in sides.ours.call()]
        actual = replayed()
    assert recorders[0].replayed == 1
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_without_a_gpu_one_sentence() -> None:
    command = [sys.executable, "-m", "benchmarks", "--device", "cuda"]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=hidden, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--device cuda: PyTorch finds no GPU here; run it on a machine with one" in done.stderr


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("case", [*dense.QUESTION.cases(OPTIONS), *fit.QUESTION.cases(OPTIONS)], ids=lambda c: c.name)
def test_on_a_gpu(case) -> None:
    assert not run_case(case, 0.0, 1, seed=0).errors


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_a_wrong_answer_on_a_gpu_is_found() -> None:
    case = next(iter(dense.QUESTION.cases(OPTIONS)))
    lying = with_sides(case, ours=tamper(0, add_at_first))
    assert "out of ours is off" in run_case(lying, 0.0, 1, seed=0).errors[EVERY]
