"""The benchmark's command line from end to end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # benchmarks/ is not installed; last, for an installed fastenc to count

from planted import dense_case, dying_setup, lying_setup, sleeping_setup

from benchmarks import QUESTIONS, __main__, command, dense, machine, stacks
from benchmarks.__main__ import main
from benchmarks.command import Options, Question
from benchmarks.harness import Case, Outcome
from benchmarks.report import read_rows
from benchmarks.tables import to_markdown

ROOT = Path(__file__).parents[1]


def lies(options: Options) -> list[Case]:
    dying = replace(dense_case(), mode="dying", setup=dying_setup)
    return [replace(dense_case(), mode=stacks.FORWARD, setup=lying_setup), dying, dense_case()]


def ask(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> int:
    question = Question("lies", "Lies", lies, 0.0)
    monkeypatch.setattr(__main__, "QUESTIONS", (question,))
    return main(["--quick", "--out", str(folder), *arguments])


def test_a_failing_case_makes_the_exit_code_1_and_spares_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(monkeypatch, tmp_path) == 1
    assert "**ERROR** out of ours is off by" in capsys.readouterr().out
    errors = [row["error"] for row in read_rows(tmp_path / "lies.json")]
    assert errors[0].startswith("out of ours is off by")
    assert errors[1] == "the process that measured it died; is there enough memory?"
    assert errors[2] is None


def test_peaks_that_cannot_be_measured_again_lose_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    true_submit, asked = command.Worker.submit, []

    def submit(worker: command.Worker, function, *arguments):
        asked.append(function)
        if asked.count(machine.measure_peaks) == 2:
            raise BrokenProcessPool
        return true_submit(worker, function, *arguments)

    monkeypatch.setattr(command.Worker, "submit", submit)
    ask(monkeypatch, tmp_path)
    assert len(read_rows(tmp_path / "lies.json")) == 3


def test_ctrl_c_keeps_what_has_been_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    true_run, asked = command.Worker.run, []

    def run(*arguments) -> Outcome:
        asked.append(1)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return true_run(*arguments)

    monkeypatch.setattr(command.Worker, "run", run)
    assert ask(monkeypatch, tmp_path) == 130
    assert len(read_rows(tmp_path / "lies.json")) == 1
    assert (tmp_path / "RESULTS.md").exists()


def sleeps(options: Options) -> list[Case]:
    return [dense_case(), replace(dense_case(), mode="sleeping", setup=sleeping_setup)]


def test_ctrl_c_does_not_wait_for_the_case_that_runs(tmp_path: Path) -> None:
    program = """if True:
        import signal, sys
        from benchmarks import __main__
        from benchmarks.command import Question
        from test_benchmark_command import sleeps

        signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background it is ignored
        __main__.QUESTIONS = (Question("sleeps", "Sleeps", sleeps, 0.0),)
        sys.exit(__main__.main(["--quick", "--out", sys.argv[1]]))
    """
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *sys.path])
    start = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(start, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}) as run:
        assert run.stderr is not None
        for line in run.stderr:
            if line == "asleep\n":
                break
        run.send_signal(signal.SIGINT)
        assert run.wait(60) == 130, run.stderr.read()
    assert len(read_rows(tmp_path / "sleeps.json")) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "0 is not a positive whole number"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--peers", "no/such/folder"], "no environment is there; make one by `make bench-peers`"),
        (["--out", "/dev/null/a"], "give a folder that can be made"),
        (["speed"], "'speed' is no question; ask fit, step, "),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_quick_run_works_from_end_to_end(tmp_path: Path) -> None:
    start = [sys.executable, "-m", "benchmarks", "dense", "encoder", "fit", "--quick", "--threads", "1"]
    command = [*start, "--dtype", "float32", "--seed", "5", "--processes", "2", "--out", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    written = {path.name for path in tmp_path.iterdir()}
    assert written >= {
        "dense.json",
        "encoder.json",
        "fit.json",
        "RESULTS.md",
        "index.html",
        "roofline.png",
        "roofline.svg",
    }
    results = (tmp_path / "RESULTS.md").read_text()
    for name, rows in (("dense", 4), ("encoder", 6), ("fit", 2)):
        records = read_rows(tmp_path / f"{name}.json")
        timed = [record for record in records if record["missing"] is None]
        assert len(timed) >= rows
        assert to_markdown(records) in results
        for row in timed:
            assert row["error"] is None
            assert (row["threads"], row["processes"]) == (1, 2)
            assert 0 < row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
            assert 0 < row["share_of_peak"] <= 1
            assert 0 < row["share_of_bandwidth"] <= 1
    assert results in run.stdout


def test_every_question_has_cases_of_its_own() -> None:
    options = Options(threads=(1,), dtypes=(torch.float32,), quick=True, seed=0)
    assert len({question.name for question in QUESTIONS}) == len(QUESTIONS)
    for question in QUESTIONS:
        cases = list(question.cases(options))
        assert cases
        assert len({case.name for case in cases}) == len(cases)
        assert all(case.bytes > 0 for case in cases)
    assert json.dumps([case.sizes for case in dense.QUESTION.cases(options)])
