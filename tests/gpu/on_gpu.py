"""What a machine with a GPU can tell: `make gpu`, or `python tests/gpu/on_gpu.py`.

The tests of the kernels run compiled, the benchmark measures, and compute-sanitizer, where it is installed, looks at
every access of a small program. All of it goes to one folder: report.md and report.json, and the output of each part.
The exit status is 0 only if every answer was right.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
NO_GPU = "fastenc: PyTorch finds no GPU here, and this is for machines with one; without a GPU there is make test"
PASSED, FAILED, NOT_RUN = "passed", "FAILED", "not run"

TESTS = (
    "tests/test_kernels_*.py",
    "tests/test_cuda_values.py",
    "tests/test_cuda_stacks.py",
    "tests/test_backend_gpu.py",
    "tests/test_backends_agree.py",
    "tests/test_backend_cuda*.py",
    "tests/test_backend_triton_choice.py",
    "tests/test_training_*.py",
    "tests/test_benchmarks_cuda.py",
    "tests/gpu",
)
SANITIZERS = {
    "memcheck": "accesses out of bounds or misaligned",
    "racecheck": "races in shared memory",
    "initcheck": "reads of memory that was never written",
    "synccheck": "barriers that not all threads reach",
}


@dataclass
class Part:
    """One part of the report: whether it passed, in a line why, and what to read."""

    name: str
    verdict: str
    summary: str
    lines: list[str] = field(default_factory=list)


def why_not() -> str | None:
    """Why nothing here can run on a GPU, in a sentence; None if it can."""
    import torch  # not before the arguments are read

    return None if torch.cuda.is_available() else NO_GPU


def environment() -> dict[str, Any]:
    """fastenc's own description, and the GPU's facts as the benchmark has them."""
    from benchmarks.cuda import describe_gpu
    from fastenc import info

    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": output(["git", "rev-parse", "HEAD"]) or "unknown",
        "changed_files": output(["git", "status", "--porcelain"]).splitlines(),
        "description": info.describe().splitlines(),
        "gpu": describe_gpu(),
    }


def output(command: Sequence[str]) -> str:
    """What a command prints; nothing if there is no such command or it fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def run(command: Sequence[str], log: Path, **settings: str) -> int:
    """Run a command from the repository's root, its output into `log`; its exit status. Kernels are compiled."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | settings
    print(f"fastenc: running {' '.join(command)}; its output is in {log}", file=sys.stderr, flush=True)
    with log.open("w") as file:
        return subprocess.run(command, cwd=ROOT, env=variables, stdout=file, stderr=subprocess.STDOUT).returncode


def tests(patterns: Sequence[str], folder: Path) -> Part:
    """pytest over the files of `patterns`; each failure and the reason of each skip."""
    paths = [str(path) for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    results = folder / "tests.xml"
    results.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={results}", *paths]
    status = run(command, folder / "tests.log")
    if not results.exists():
        return Part("tests", FAILED, f"pytest ended with {status} and no results", tail(folder / "tests.log"))
    cases = list(ElementTree.parse(results).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skips = [skip.get("message", "") for case in cases if (skip := case.find("skipped")) is not None]
    lines = [f"failed: {case.get('classname')}::{case.get('name')}" for case in failed]
    lines += [f"skipped {skips.count(reason)}: {reason}" for reason in dict.fromkeys(skips)]
    passed = len(cases) - len(failed) - len(skips)
    verdict = PASSED if status == 0 and passed and not failed else FAILED
    return Part("tests", verdict, f"{passed} passed, {len(failed)} failed, {len(skips)} skipped", lines)


def benchmark(command: Sequence[str], folder: Path) -> Part:
    """The benchmark, whose cases are checked before and after they are timed; its tables."""
    from benchmarks.report import grouped, has_figures, summarise_group

    results = folder / "benchmark"
    shutil.rmtree(results, ignore_errors=True)  # an earlier run's answers are not this one's
    status = run([*command, "--out", str(results)], folder / "benchmark.log")
    reports = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    rows = [row for report in reports for row in report["rows"]]
    errors = [f"{row['case']}: {row['error']}" for row in rows if row["error"] is not None]
    if not rows:
        return Part("benchmark", FAILED, f"it ended with {status} and no results", tail(folder / "benchmark.log"))
    verdict = PASSED if status == 0 and not errors else FAILED
    summary = f"{len(rows)} cases, {len(errors)} with a wrong answer or an error; tables in {results / 'RESULTS.md'}"
    worst = []
    for (question, peer), group in grouped(filter(has_figures, rows), "question", "peer").items():
        summary = summarise_group(question, peer, group)
        worst.append(
            f"{question} against {peer}: worst {summary['worst']['ratio']:.2f} at {summary['worst']['case']}, "
            f"geometric mean {summary['geometric_mean']:.2f} (theirs / ours)"
        )
    return Part("benchmark", verdict, summary, errors + worst)


def sanitize(tool: str | None, command: Sequence[str], folder: Path) -> Iterator[Part]:
    """`command` under each of compute-sanitizer's tools; one part that says so if it is not installed."""
    if tool is None:
        yield Part("compute-sanitizer", NOT_RUN, "it is not installed; it comes with the CUDA toolkit")
        return
    for name, what in SANITIZERS.items():
        log = folder / f"{name}.log"
        checked = [tool, "--tool", name, "--error-exitcode", "9", *command]
        # Without PyTorch's cache every tensor is an allocation of its own, whose ends can be watched.
        status = run(checked, log, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        verdict = PASSED if status == 0 else FAILED
        yield Part(f"compute-sanitizer {name}", verdict, f"{what}: exit status {status}", tail(log) if status else [])


def tail(log: Path, lines: int = 30) -> list[str]:
    return log.read_text(errors="replace").splitlines()[-lines:]


def to_markdown(report: dict[str, Any]) -> str:
    """The report for people: verdicts first, then the environment, then what each part found."""
    facts = report["environment"]
    lines = [f"# fastenc on {facts['gpu']['name']}: {'passed' if report['passed'] else 'FAILED'}", ""]
    lines += ["| part | verdict | |", "| --- | --- | --- |"]
    lines += [f"| {part['name']} | {part['verdict']} | {part['summary']} |" for part in report["parts"]]
    changed = f", with {len(facts['changed_files'])} files changed" if facts["changed_files"] else ""
    lines += ["", "## Environment", "", f"{facts['time']}, commit {facts['commit']}{changed}", "", "```"]
    lines += [*facts["description"], *(f"{name}: {value}" for name, value in facts["gpu"].items()), "```"]
    for part in report["parts"]:
        if part["lines"]:
            lines += ["", f"## {part['name']}", "", "```", *part["lines"], "```"]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Test, measure and sanitize on a GPU, and write one report.")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu", metavar="DIR", help="by default out/gpu")
    parser.add_argument("--quick", action="store_true", help="only a few cases of the benchmark")
    parsed = parser.parse_args(arguments)
    if (reason := why_not()) is not None:
        print(reason, file=sys.stderr)
        return 1
    folder = parsed.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    quick = ["--quick"] if parsed.quick else []
    facts = environment()
    parts = [tests(TESTS, folder)]
    parts.append(benchmark([sys.executable, "-m", "benchmarks", "--device", "cuda", *quick], folder))
    exercise = [sys.executable, str(Path(__file__).with_name("exercise.py"))]
    parts.extend(sanitize(shutil.which("compute-sanitizer"), exercise, folder))
    passed = all(part.verdict != FAILED for part in parts)
    report = {"passed": passed, "environment": facts, "parts": [asdict(part) for part in parts]}
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "report.md").write_text(to_markdown(report))
    print((folder / "report.md").read_text())
    print(f"Written to {folder / 'report.md'}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # for benchmarks/, which is not installed
    sys.exit(main())
