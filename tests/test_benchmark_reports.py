"""What the benchmark writes: reports, tables, comparisons."""

from __future__ import annotations

import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # benchmarks/ is not installed; last, for an installed fastenc to count

from planted import dense_case

from benchmarks import machine, stacks
from benchmarks.__main__ import folder_name, main, print_comparison
from benchmarks.harness import EVERY, Case, Outcome, Samples
from benchmarks.machine import Peak, Peaks
from benchmarks.page import to_page
from benchmarks.plots import cache_marks, draw, varying
from benchmarks.report import Measured, Record, ReportError, compare, make_records, read_rows, write_rows
from benchmarks.tables import gpu_facts, to_markdown

EAGER = stacks.EAGER
MACHINE = {
    "cpu": "Test CPU",
    "capability": "AVX512",
    "cores": 2,
    "caches": {"L1": 4096, "L2": 65536},
    "memory": 2**24,
    "load_average": [0.1, 0.1, 0.1],
    "python": "3.11.0",
    "torch": "2.13.0",
    "numpy": "2.0.0",
    "fastenc": "0.1.0",
    "gpu": None,
    "backends": {"cpu": "usable"},
    "time": "2025-01-02T03:04:05+00:00",
}


# Rows.


def measured(ratio: float = 2.0, half_width: float = 0.1, case: Case | None = None, peer: str = EAGER) -> Measured:
    """One process's seven rounds around `ratio`; ours takes 1000 ns."""
    ratios = [ratio - half_width, ratio, ratio + half_width, ratio, ratio, ratio, ratio]
    samples = Samples([1000.0] * 7, [1000.0 * r for r in ratios], ratios)
    return Measured(case or dense_case(), [Outcome({peer: samples})])


def failed(case: Case | None = None, error: str = "wrong", peer: str = EVERY) -> Measured:
    return Measured(case or dense_case(), [Outcome(errors={peer: error})])


def records_of(*cases: Measured, peak: float = 1000.0, copying: float = 1000.0, **changes) -> list[Record]:
    peaks = Peaks(
        {"float32, 1 thread": Peak(peak, "torch.mm of 256 x 256 matrices")},
        {"1 thread": {2**12: Peak(copying, "copying"), 2**20: Peak(copying / 10, "copying")}},
    )
    about = {"question": "dense", "title": "A title", "unit": "us", "seed": 7}
    return make_records(about, cases, peaks, MACHINE | changes)


def test_a_row_holds_all_that_it_was_measured_on(tmp_path: Path) -> None:
    write_rows(records_of(measured(), failed(dense_case(stacks.FORWARD), "out is wrong")), tmp_path / "a.json")
    good, bad = read_rows(tmp_path / "a.json")
    assert good["machine"] == bad["machine"] == MACHINE
    assert (good["question"], good["title"], good["seed"]) == ("dense", "A title", 7)
    assert bad["error"] == "out is wrong"
    assert "ratio" not in bad
    assert good["case"] == "forward + backward, M=32 N=24 K=40, float32, 1 thread"
    assert (good["peer"], good["sizes"], good["cache"]) == (EAGER, {"M": 32, "N": 24, "K": 40}, "warm")
    assert good["ours"] == {"q1": 1.0, "median": 1.0, "q3": 1.0}
    assert good["theirs"] == {"q1": 2.0, "median": 2.0, "q3": 2.0}
    assert good["ratio"] == {"median": 2.0, "low": 1.9, "high": 2.1}
    assert good["flops"] == 3 * 2 * 32 * 24 * 40
    assert (good["gflops"], good["their_gflops"]) == (good["flops"] / 1000.0, good["flops"] / 2000.0)
    assert good["gbs"] == good["bytes"] / 1000.0
    assert (good["rounds"], good["processes"]) == (7, 1)


def test_steps_are_reported_one_by_one() -> None:
    (row,) = records_of(measured(case=replace(dense_case(), steps=10)))
    assert row["ours"]["median"] == pytest.approx(0.1)
    assert row["gflops"] == pytest.approx(row["flops"] / 100)


def test_other_units_are_left_as_they_are() -> None:
    about = {"question": "memory", "title": "Memory", "unit": "MiB", "seed": 7}
    (row,) = make_records(about, [measured(case=replace(dense_case(), steps=10))], Peaks(), MACHINE)
    assert row["ours"]["median"] == 1000.0
    assert "gflops" not in row
    assert "1,000 (1,000 to 1,000) | 2,000 (2,000 to 2,000) | 2.00 (1.90 to 2.10) |  |" in to_markdown([row])


def test_processes_are_pooled() -> None:
    first, second = measured(2.0), measured(3.0)
    (row,) = records_of(Measured(first.case, [*first.outcomes, *second.outcomes]))
    assert row["ratio"]["low"] <= 2.0 < 3.0 <= row["ratio"]["high"]
    assert (row["rounds"], row["processes"]) == (14, 2)


def test_one_process_that_fails_fails_the_row() -> None:
    (row,) = records_of(Measured(dense_case(), [*measured().outcomes, *failed(peer=EAGER).outcomes]))
    assert row["error"] == "wrong"
    assert "ratio" not in row


def test_too_few_rounds_are_no_row() -> None:
    samples = Samples([1.0] * 4, [1.0] * 4, [1.0] * 4)
    assert not Measured(dense_case(), [Outcome({EAGER: samples})]).complete()
    assert Measured(dense_case(), [Outcome({EAGER: samples})] * 2).complete()
    assert not Measured(dense_case()).complete()
    assert failed().complete()


def test_no_share_of_a_peak_is_over_one() -> None:
    (row,) = records_of(measured(), peak=50.0, copying=1.0)
    name = "the case forward + backward, M=32 N=24 K=40, float32, 1 thread"
    assert row["peak_gflops"] == {"rate": row["gflops"], "source": name}
    assert row["peak_gbs"] == {"rate": row["gbs"], "source": name}
    assert row["share_of_peak"] == row["share_of_bandwidth"] == 1.0
    assert "peak in float32 on 1 thread: 184 GFLOP/s (the case" in to_markdown([row])
    (row,) = records_of(measured(), peak=368.64)
    assert row["share_of_peak"] == 0.5


def test_bandwidth_is_of_what_is_as_large() -> None:
    peaks = Peaks(traffic={"1 thread": {10: Peak(8.0, ""), 100: Peak(9.0, ""), 1000: Peak(2.0, "")}})
    assert [peaks.bandwidth("1 thread", size).rate for size in (1, 50, 101, 9999)] == [9, 9, 2, 2]
    other = Peaks(traffic={"1 thread": {10: Peak(1.0, ""), 100: Peak(1.0, ""), 1000: Peak(3.0, "")}})
    assert [peak.rate for peak in peaks.raised_to(other).traffic["1 thread"].values()] == [8, 9, 3]


# Tables.


WHY = ("it is not installed here", "it takes no bfloat16", "it is not installed here")


def test_the_table_shows_losses_failures_and_what_is_missing() -> None:
    cases = [replace(dense_case(), sizes={"M": M, "N": 1, "K": 1}) for M in (1, 32, 256, 4096)]
    absent = [Measured(case, [Outcome(missing={"Other": why})]) for case, why in zip(cases, WHY, strict=False)]
    rows = records_of(
        failed(cases[0], "a | b", EAGER),
        *(measured(r, 0.1, c) for r, c in zip((0.5, 0.98, 3.0), cases[1:], strict=True)),
        *absent,
    )
    text = to_markdown(rows)
    lines = [line for line in text.splitlines() if line.startswith("| forward + backward | ")]
    assert [line.split(" | ")[1] for line in lines] == ["1", "32", "256", "4,096"]
    assert "**ERROR** a / b" in lines[0]
    assert "0.50 (0.40 to 0.60) | **SLOWER**" in lines[1]
    assert "0.98 (0.88 to 1.08) | even" in lines[2]
    assert "3.00 (2.90 to 3.10) |  |" in lines[3]
    head = next(line for line in text.splitlines() if line.startswith("| mode"))
    assert {line.count("|") for line in lines} == {head.count("|")}
    # (3 * 0.5 * 0.98) ** (1 / 3)
    assert f"| {EAGER} | 0.50 | {cases[1].name} | 1.14 | 1 | 1 | 1 | 1 | 0 |" in text
    assert [line for line in text.splitlines() if line.startswith("- missing")] == [
        "- missing: Other: it is not installed here",
        "- missing: Other: it takes no bfloat16",
    ]
    assert "Warning" not in text


def test_a_busy_machine_is_told() -> None:
    assert "**Warning:** load average 1.5 at the start" in to_markdown(records_of(measured(), load_average=[1.5, 0, 0]))
    assert "load average unknown" in to_markdown(records_of(measured(), load_average=None))


def test_the_gpu_is_in_the_report() -> None:
    assert gpu_facts({"gpu": None}) == []
    lines = gpu_facts({"gpu": {"name": "Stand-in", "memory_gib": 1.5, "driver_version": "1.2"}})
    assert lines[0] == "Stand-in: memory gib 1.5, driver version 1.2"


def test_the_machine_is_described(tmp_path: Path) -> None:
    described = machine.describe_machine()
    assert described.keys() >= MACHINE.keys()
    assert described["torch"] == torch.__version__
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n")
    assert machine.cpu_model(tmp_path / "cpuinfo") == "Some CPU @ 2 GHz"
    assert machine.cpu_model(tmp_path / "absent")
    for number, (level, kind, size) in enumerate(
        (("1", "Data", "48K"), ("1", "Instruction", "32K"), ("3", "Unified", "2048K"))
    ):
        folder = tmp_path / f"index{number}"
        folder.mkdir()
        for name, text in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(text + "\n")
    assert machine.caches(tmp_path) == {"L1": 48 * 1024, "L3": 2048 * 1024}
    assert machine.caches(tmp_path / "absent") == {}
    (tmp_path / "meminfo").write_text("MemTotal:       100 kB\nMemFree: 1 kB\n")
    assert machine.memory(tmp_path / "meminfo") == 102400
    assert machine.memory(tmp_path / "absent") is None
    assert folder_name("Some CPU @ 2 GHz", MACHINE["time"]) == "some-cpu-2-ghz-2025-01-02t03-04"


def test_the_peak_is_the_best_of_torch_and_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "own_peak", lambda dtype, threads: 1e9)
    assert machine.measure_products(torch.float32, 1, (64,)) == Peak(1e9, "fastenc's own kernel")
    monkeypatch.setattr(machine, "own_peak", lambda dtype, threads: None)
    peak = machine.measure_products(torch.float32, 1, (64,))
    assert peak.rate > 0
    assert peak.source == "torch.mm of 64 x 64 matrices"


# Pictures and the page.


def curve(*rows: tuple[int, float], mode: str = "by rows") -> list[Record]:
    cases = [replace(dense_case(mode), sizes={"M": M, "N": 2}, bytes=M * 1024, flops=M * 1000) for M, _ in rows]
    return records_of(*(measured(ratio, 0.1, case) for (_, ratio), case in zip(rows, cases, strict=True)))


def test_a_curve_is_drawn_where_one_size_varies() -> None:
    rows = curve((1, 2.0), (10, 1.5), (100, 1.0))
    assert varying(rows) == "M"
    assert varying(rows[:2]) is None  # too few points
    assert varying([*rows, {**rows[0], "sizes": {"M": 1, "N": 3}}]) is None
    elsewhere = [{**row, "peer": "of one point"} for row in rows[1:2]]
    pictures = dict(draw([*rows, *elsewhere]))
    assert list(pictures) == ["dense-by rows", "roofline"]
    axis = pictures["dense-by rows"].axes[0]
    lines = {line.get_label(): line for line in axis.get_lines() if not line.get_label().startswith("_")}
    assert list(lines["fastenc"].get_xdata()) == [1, 10, 100]
    assert list(lines["fastenc"].get_ydata()) == [1, 1, 1]
    assert list(lines[EAGER].get_ydata()) == [2, 1.5, 1]
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")


def test_the_roofline_has_both_sides_under_its_roofs() -> None:
    axis = dict(draw(curve((1, 2.0), (10, 1.5), (100, 1.0))))["roofline"].axes[0]
    theirs, ours = axis.collections
    assert ours.get_offsets()[:, 1].tolist() == [1, 10, 100]
    assert theirs.get_offsets()[:, 1].tolist() == pytest.approx([0.5, 10 / 1.5, 100])
    assert {line.get_ydata()[-1] for line in axis.get_lines()} == {1000.0}


def test_caches_are_marked_where_the_bytes_outgrow_them() -> None:
    marks = cache_marks(curve((1, 2.0), (10, 1.5), (100, 1.0)), "M")
    assert marks == {"L1": pytest.approx(4), "L2": pytest.approx(64)}  # of 4096 and 65536 bytes, 1024 a row


class Page(HTMLParser):
    """The page's tags that were opened and not closed, its rows and what it would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[str | None] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        found = dict(attributes)
        self.loaded += [tag for name in ("src", "href") if not found.get(name, "#").startswith("#")]
        if tag == "tr":
            self.rows.append(found.get("class"))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else() -> None:
    rows = records_of(measured(2.0), measured(0.5, case=dense_case(stacks.FORWARD)), failed(peer="<b>", error="a < b"))
    page = Page()
    text = to_page(rows, {"a picture": '<?xml version="1.0"?><svg width="1"><g><path d="M0"/></g></svg>'})
    page.feed(text)
    assert page.open == []
    assert page.loaded == []
    assert [row for row in page.rows if row] == ["faster", "slower", "error"]
    assert "ERROR a &lt; b" in text
    assert "<?xml" not in text


# Comparing.


def test_compare_says_what_changed_beyond_its_interval() -> None:
    cases = [replace(dense_case(), sizes={"M": M}) for M in range(7)]
    bad = [failed(case, peer=EAGER) for case in cases]
    before = records_of(*(measured(2.0, 0.1, case) for case in cases[:4]), bad[4], bad[5])
    after = records_of(
        measured(2.15, 0.1, cases[0]),  # the intervals overlap
        measured(1.7, 0.1, cases[1]),
        measured(2.5, 0.1, cases[2]),
        bad[3],
        measured(2.0, 0.1, cases[4]),
        measured(2.0, 0.1, cases[6]),
        torch="2.14.1",
    )
    names = [f"dense, {case.name}, against {EAGER}" for case in cases]
    assert list(compare(before, after)) == [
        ("note", "torch differs: 2.13.0 and 2.14.1"),
        ("slower", f"{names[1]}: 2.00 -> 1.70"),
        ("faster", f"{names[2]}: 2.00 -> 2.50"),
        ("failed", f"{names[3]}: wrong"),
        ("mended", names[4]),
        ("gone", names[5]),
        ("new", names[6]),
    ]


def test_comparing_files_and_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fast, slow = tmp_path / "fast", tmp_path / "slow"
    for folder, ratio in ((fast, 2.0), (slow, 1.0)):
        folder.mkdir()
        write_rows(records_of(measured(ratio)), folder / "dense.json")
    assert print_comparison(fast, fast / "dense.json") == 0
    assert capsys.readouterr().out == "no row changed beyond its interval\n"
    assert main(["--compare", str(fast), str(slow)]) == 1
    assert capsys.readouterr().out.startswith("slower: dense, forward + backward, M=32")
    assert main(["--compare", str(slow), str(fast)]) == 0


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"format": 1}', '{"format": 2, "rows": [1]}'])
def test_a_file_that_is_no_report_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ReportError, match=r"a\.json (is not|cannot be read|has format 1)"):
        read_rows(path)
    with pytest.raises(SystemExit) as stopped:
        main(["--compare", str(path), str(path)])
    assert stopped.value.code == 2


def test_a_folder_without_reports_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="holds no JSON file"):
        read_rows(tmp_path)
