"""The command for a machine with a GPU, with stand-ins for what it runs: it must not say that all is well when not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import on_gpu
import pytest

FOLDER = Path(__file__).parent


@pytest.fixture
def _stand_ins(monkeypatch, tmp_path):
    """A machine on which everything is right: the tests below break one thing each."""
    monkeypatch.setattr(on_gpu, "why_not", lambda: None)
    facts = {
        "time": "now",
        "commit": "abc",
        "changed_files": [],
        "description": ["fastenc 1"],
        "gpu": {"name": "Stand-in"},
    }
    monkeypatch.setattr(on_gpu, "environment", lambda: facts)
    monkeypatch.setattr(on_gpu, "ROOT", tmp_path)
    monkeypatch.setattr(on_gpu.shutil, "which", lambda name: None)
    (tmp_path / "test_planted.py").write_text(GOOD)
    monkeypatch.setattr(on_gpu, "TESTS", ("test_*.py",))
    write_benchmark(tmp_path, None, 0)


GOOD = "import os\n\ndef test_right(): assert 'TRITON_INTERPRET' not in os.environ\n"
WRONG = "\ndef test_wrong(): assert 1 == 2\n"
SKIPPED = "import pytest\n\n@pytest.mark.skip(reason='no such part')\ndef test_left_out(): pass\n"


def write_benchmark(root: Path, error: str | None, status: int) -> None:
    """A stand-in for `python -m benchmarks`, which writes one row."""
    report = {"format": 2, "rows": [{"question": "dense", "case": "a case", "error": error}]}
    (root / "benchmarks.py").write_text(
        "import pathlib, sys\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
        "out.mkdir(exist_ok=True)\n"
        f"(out / 'dense.json').write_text({json.dumps(report)!r})\n"
        f"sys.exit({status})\n"
    )


def report(tmp_path: Path, status: int) -> tuple[dict, str]:
    """What was written, after checking the exit status; the verdicts by part."""
    assert on_gpu.main(["--out", str(tmp_path / "out")]) == status
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["passed"] == (status == 0)
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.startswith(f"# fastenc on Stand-in: {'passed' if status == 0 else 'FAILED'}\n")
    return {part["name"]: part for part in written["parts"]}, text


@pytest.mark.usefixtures("_stand_ins")
def test_all_is_well(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # not for the tests that run there
    parts, text = report(tmp_path, 0)
    assert {name: part["verdict"] for name, part in parts.items()} == {
        "tests": "passed",
        "benchmark": "passed",
        "compute-sanitizer": "not run",
    }
    assert parts["tests"]["summary"] == "1 passed, 0 failed, 0 skipped"
    assert "| compute-sanitizer | not run | it is not installed; it comes with the CUDA toolkit |" in text


@pytest.mark.usefixtures("_stand_ins")
def test_a_failing_test_is_named(tmp_path):
    (tmp_path / "test_planted.py").write_text(GOOD + WRONG)
    parts, text = report(tmp_path, 1)
    assert parts["tests"]["verdict"] == "FAILED"
    assert parts["tests"]["summary"] == "1 passed, 1 failed, 0 skipped"
    assert "failed: test_planted::test_wrong" in text
    assert parts["benchmark"]["verdict"] == "passed"  # the rest ran nevertheless


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize("content", ["", SKIPPED, "import nothing_of_this_name\n"], ids=["none", "skipped", "broken"])
def test_no_test_that_passed_is_no_success(tmp_path, content):
    (tmp_path / "test_planted.py").write_text(content)
    parts, text = report(tmp_path, 1)
    assert parts["tests"]["verdict"] == "FAILED"
    assert ("skipped 1: no such part" in text) == (content == SKIPPED)


@pytest.mark.usefixtures("_stand_ins")
def test_a_wrong_answer_in_the_benchmark(tmp_path):
    write_benchmark(tmp_path, "out of fused is off by 1", 1)
    parts, text = report(tmp_path, 1)
    assert parts["benchmark"]["verdict"] == "FAILED"
    assert "a case: out of fused is off by 1" in text


@pytest.mark.usefixtures("_stand_ins")
def test_what_breaks_off_does_not_live_on_earlier_results(tmp_path):
    report(tmp_path, 0)
    (tmp_path / "conftest.py").write_text("raise SystemExit\n")
    (tmp_path / "benchmarks.py").write_text("raise SystemExit('no memory')\n")
    parts, text = report(tmp_path, 1)
    assert parts["tests"]["verdict"] == "FAILED"
    assert parts["benchmark"]["summary"] == "it ended with 1 and no results"
    assert "no memory" in text


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize("bad", [None, "racecheck"])
def test_each_sanitizer_runs(tmp_path, monkeypatch, bad):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        f"#!{sys.executable}\nimport os, sys\nprint(sys.argv, os.environ['PYTORCH_NO_CUDA_MEMORY_CACHING'])\n"
        f"sys.exit(9 if sys.argv[2] == {bad!r} else 0)\n"
    )
    tool.chmod(0o755)
    monkeypatch.setattr(on_gpu.shutil, "which", lambda name: str(tool))
    parts, text = report(tmp_path, 0 if bad is None else 1)
    for name in on_gpu.SANITIZERS:
        assert parts[f"compute-sanitizer {name}"]["verdict"] == ("FAILED" if name == bad else "passed")
        assert "exercise.py" in (tmp_path / "out" / f"{name}.log").read_text()
    assert ("racecheck', '--error-exitcode'" in text) == (bad is not None)


def test_without_a_gpu_one_sentence_and_nothing_else(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert on_gpu.main(["--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.splitlines() == [on_gpu.NO_GPU]
    assert not (tmp_path / "out").exists()


def test_make_gpu_says_so_before_it_builds_anything(tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 6\n")  # as where there is a driver and no GPU
    (tmp_path / "nvidia-smi").chmod(0o755)
    of_a_make_around_this = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    variables = {name: value for name, value in os.environ.items() if name not in of_a_make_around_this}
    variables["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    command = ["make", "gpu", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, cwd=on_gpu.ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.startswith("fastenc: nvidia-smi finds no GPU here, and make gpu is for machines with one")
    assert done.stdout == ""
    assert not (tmp_path / "venv").exists()


def test_the_program_for_the_sanitizers_runs():
    command = [sys.executable, "-W", "error", str(FOLDER / "exercise.py"), "--device", "cpu", "--backend", "reference"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "reference: 63 calls, forward and backward, on cpu\n"


def test_the_program_for_the_sanitizers_launches_the_cuda_kernels():
    """Emulated: what it does with them is right as well."""
    program = "import sys, emulated, exercise; sys.argv[1:] = ['--device', 'cpu', '--backend', 'cuda']; exercise.main()"
    paths = os.pathsep.join([str(FOLDER), str(FOLDER.parent)])
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "cuda: 79 calls, forward and backward, on cpu\n"


def test_every_pattern_of_tests_finds_files():
    for pattern in on_gpu.TESTS:
        assert list(on_gpu.ROOT.glob(pattern)), pattern
