"""What the benchmark writes: reports, tables, comparisons; and its command line from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # benchmarks/ is not installed; last, for an installed fastenc to count

from planted import add_at_first, dense_case, tamper, with_sides

from benchmarks import dense, machine, stacks, stats
from benchmarks.__main__ import folder_name, print_comparison
from benchmarks.__main__ import main as main_of_all
from benchmarks.command import Question, main, write_json
from benchmarks.harness import Case, Row, Timing
from benchmarks.machine import Peak
from benchmarks.report import ReportError, build_report, compare, read_report, to_markdown
from benchmarks.stats import Quartiles

ROOT = Path(__file__).parents[1]
MACHINE = {
    "cpu": "Test CPU",
    "capability": "AVX512",
    "cores": 2,
    "threads": 2,
    "load_average": [0.1, 0.1, 0.1],
    "python": "3.11.0",
    "torch": "2.13.0",
    "fastenc": "0.1.0",
    "backends": {"cpu": "usable"},
    "time": "2025-01-02T03:04:05+00:00",
}


# Reports.


def timed_row(ratio: float = 2.0, half_width: float = 0.1, case: Case | None = None) -> Row:
    fused, eager = Quartiles(900.0, 1000.0, 1100.0), Quartiles(1900.0, 2000.0, 2100.0)
    return Row(case or dense_case(), Timing(fused, eager, ratio, ratio - half_width, ratio + half_width, 50), None)


def report_of(*rows: Row, peak: float = 100.0) -> dict:
    peaks = {"float32, 1 thread": Peak(peak, "torch.mm of 256 x 256 matrices")}
    return build_report("dense", "A title", rows, peaks, MACHINE, 7)


def test_the_report_holds_what_it_should(tmp_path: Path) -> None:
    write_json(report_of(timed_row(), Row(dense_case(stacks.FORWARD), None, "out is wrong")), tmp_path / "a.json")
    report = read_report(tmp_path / "a.json")
    assert report["machine"] == MACHINE
    assert (report["question"], report["title"], report["seed"]) == ("dense", "A title", 7)
    good, bad = report["rows"]
    assert bad["error"] == "out is wrong"
    assert "ratio" not in bad
    assert good["case"] == "forward + backward, M=32 N=24 K=40, float32, 1 thread"
    assert good["sizes"] == {"M": 32, "N": 24, "K": 40}
    assert good["fused_us"] == {"q1": 0.9, "median": 1.0, "q3": 1.1}
    assert good["ratio"] == {"median": 2.0, "low": 1.9, "high": 2.1}
    assert good["flops"] == 3 * 2 * 32 * 24 * 40
    assert good["fused_gflops"] == good["flops"] / 1000.0
    assert good["eager_gflops"] == good["flops"] / 2000.0
    assert good["fused_per_second"] == 1e6
    assert report["summary"][0] == {
        "rows": "all",
        "worst": {"case": good["case"], "ratio": 2.0},
        "geometric_mean": 2.0,
        "faster": 1,
        "even": 0,
        "slower": 0,
        "errors": 1,
    }
    assert [summary["rows"] for summary in report["summary"][1:]] == [
        "forward + backward, float32, 1 thread",
        "forward, inference, float32, 1 thread",
    ]


def test_steps_are_reported_one_by_one() -> None:
    (row,) = report_of(timed_row(case=replace(dense_case(), steps=10)))["rows"]
    assert row["fused_us"]["median"] == pytest.approx(0.1)
    assert row["fused_per_second"] == pytest.approx(1e7)
    assert row["fused_gflops"] == pytest.approx(row["flops"] / 100)


def test_no_share_of_the_peak_is_over_one() -> None:
    report = report_of(timed_row(), peak=50.0)
    peak = report["peaks"]["float32, 1 thread"]
    assert peak == {"gflops": 184.32, "source": "the case forward + backward, M=32 N=24 K=40, float32, 1 thread"}
    assert report["rows"][0]["share_of_peak"] == 1.0
    assert "peak at float32, 1 thread: 184 GFLOP/s (the case" in to_markdown(report)
    assert report_of(timed_row(), peak=368.64)["rows"][0]["share_of_peak"] == 0.5


def test_the_table_shows_losses_and_failures_in_order() -> None:
    cases = [replace(dense_case(), sizes={"M": M, "N": 1, "K": 1}) for M in (1, 32, 256, 4096)]
    rows = [timed_row(3.0, 0.1, cases[3]), timed_row(0.5, 0.1, cases[1]), timed_row(0.98, 0.1, cases[2])]
    text = to_markdown(report_of(*rows, Row(cases[0], None, "a | b")))
    lines = [line for line in text.splitlines() if line.startswith("| forward + backward | ")]
    assert [line.split(" | ")[1] for line in lines] == ["1", "32", "256", "4,096"]
    assert "**ERROR** a / b" in lines[0]
    assert "0.50 (0.40 to 0.60) | **SLOWER**" in lines[1]
    assert "0.98 (0.88 to 1.08) | even" in lines[2]
    assert "3.00 (2.90 to 3.10) |  |" in lines[3]
    assert (
        len(
            {line.count("|") for line in text.splitlines() if line.startswith("| ") and "mode" in line}
            | {lines[0].count("|")}
        )
        == 1
    )
    assert f"| all | 0.50 | {cases[1].name} | 1.14 | 1 | 1 | 1 | 1 |" in text  # (3 * 0.5 * 0.98) ** (1 / 3)
    assert "Warning" not in text


def test_a_busy_machine_is_told() -> None:
    report = build_report("dense", "A title", [], {}, MACHINE | {"load_average": [1.5, 0.1, 0.1]}, 7)
    assert "**Warning:** load average 1.5 at the start" in to_markdown(report)
    unknown = build_report("dense", "A title", [], {}, MACHINE | {"load_average": None}, 7)
    assert "load average unknown" in to_markdown(unknown)


def test_the_machine_is_described(tmp_path: Path) -> None:
    described = machine.describe_machine()
    assert described.keys() >= MACHINE.keys()
    assert described["torch"] == torch.__version__
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n")
    assert machine.cpu_model(tmp_path / "cpuinfo") == "Some CPU @ 2 GHz"
    assert machine.cpu_model(tmp_path / "absent")
    assert folder_name("Some CPU @ 2 GHz", MACHINE["time"]) == "some-cpu-2-ghz-2025-01-02t03-04"


def test_the_peak_is_the_best_of_torch_and_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "own_peak", lambda dtype, threads: 1e9)
    assert machine.measure_peak(torch.float32, 1, (64,)) == Peak(1e9, "fastenc's own kernel")
    monkeypatch.setattr(machine, "own_peak", lambda dtype, threads: None)
    peak = machine.measure_peak(torch.float32, 1, (64,))
    assert peak.gflops > 0
    assert peak.source == "torch.mm of 64 x 64 matrices"


# Comparing.


def test_compare_says_what_changed_beyond_its_interval() -> None:
    cases = [replace(dense_case(), sizes={"M": M}) for M in range(7)]
    failed = [Row(case, None, "wrong") for case in cases]
    before = report_of(*(timed_row(2.0, 0.1, case) for case in cases[:4]), failed[4], failed[5])
    after = report_of(
        timed_row(2.15, 0.1, cases[0]),  # the intervals overlap
        timed_row(1.7, 0.1, cases[1]),
        timed_row(2.5, 0.1, cases[2]),
        failed[3],
        timed_row(2.0, 0.1, cases[4]),
        timed_row(2.0, 0.1, cases[6]),
    )
    after["machine"] = MACHINE | {"torch": "2.14.1"}
    assert list(compare(before, after)) == [
        ("note", "torch differs: 2.13.0 and 2.14.1"),
        ("slower", f"{cases[1].name}: 2.00 -> 1.70"),
        ("faster", f"{cases[2].name}: 2.00 -> 2.50"),
        ("failed", f"{cases[3].name}: wrong"),
        ("mended", cases[4].name),
        ("gone", cases[5].name),
        ("new", cases[6].name),
    ]


def test_comparing_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fast, slow = tmp_path / "fast.json", tmp_path / "slow.json"
    write_json(report_of(timed_row(2.0)), fast)
    write_json(report_of(timed_row(1.0)), slow)
    assert print_comparison(fast, fast) == 0
    assert capsys.readouterr().out == "no row changed beyond its interval\n"
    assert main_of_all(["--compare", str(fast), str(slow)]) == 1
    assert capsys.readouterr().out.startswith("slower: forward + backward, M=32")
    assert main_of_all(["--compare", str(slow), str(fast)]) == 0


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"format": 99}'])
def test_a_file_that_is_no_report_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ReportError, match=r"a\.json (is not|cannot be read|has format 99)"):
        read_report(path)
    with pytest.raises(SystemExit) as stopped:
        main_of_all(["--compare", str(path), str(path)])
    assert stopped.value.code == 2


# The command line.


def test_a_failing_case_makes_the_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lying = with_sides(dense_case(), fused=tamper(0, add_at_first))
    question = Question("lies", "Lies", lambda options: [lying, dense_case()], (torch.float32,), 0.0)
    assert main(question, ["--quick", "--json", str(tmp_path / "a.json")]) == 1
    assert "**ERROR** out of fused is off by" in capsys.readouterr().out
    assert [row["error"] is None for row in read_report(tmp_path / "a.json")["rows"]] == [False, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "0 is not a number of threads"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--json", "no/such/folder/a.json"], "there is no folder no/such/folder"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(dense.QUESTION, arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_quick_run_works_from_end_to_end(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "--quick", "--threads", "1", "--dtype", "float32", "--seed", "5"]
    run = subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"dense.json", "encoder.json", "training.json", "RESULTS.md"}
    results = (tmp_path / "RESULTS.md").read_text()
    for name, rows in (("dense", 4), ("encoder", 6), ("training", 2)):
        report = json.loads((tmp_path / f"{name}.json").read_text())
        assert len(report["rows"]) == rows
        assert to_markdown(report) in results
        for row in report["rows"]:
            assert row["error"] is None
            assert row["threads"] == 1
            assert 0 < row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
            assert 0 < row["share_of_peak"] <= 1
            assert row["rounds"] >= stats.FEWEST
    assert results in run.stdout
