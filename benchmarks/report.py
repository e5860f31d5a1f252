"""What came of a question: JSON to keep, a table to read, and the difference between two runs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .cuda import WAYS
from .harness import Row, count, dtype_name
from .machine import Peak, load_warning, peak_name
from .stats import geometric_mean

FORMAT = 1  # of the JSON; to be raised when a reader of the old one would misread the new


class ReportError(ValueError):
    """A file that is not a report, in one sentence with the cure."""


def build_report(
    name: str, title: str, rows: Sequence[Row], peaks: dict[str, Peak], machine: dict[str, Any], seed: int
) -> dict[str, Any]:
    """The report as JSON holds it. Times are microseconds per call or, where a case has steps, per step.

    No share of the peak is over 100%: a case that beats the measured peak becomes the peak, and the report says so.
    """
    peaks = dict(peaks)
    for row in rows:
        if row.timing is not None:
            key = peak_name(row.case)
            fastest = min(row.timing.fused.median, row.timing.eager.median)
            peaks[key] = peaks[key].raised_to(row.case.flops * row.case.steps / fastest, f"the case {row.case.name}")
    records = [to_record(row, peaks) for row in sorted(rows, key=sort_key)]
    return {
        "format": FORMAT,
        "question": name,
        "title": title,
        "machine": machine,
        "seed": seed,
        "peaks": {key: asdict(peak) for key, peak in peaks.items()},
        "rows": records,
        "summary": summarise(records),
    }


def sort_key(row: Row) -> tuple:
    case = row.case
    return case.mode, dtype_name(case.dtype), case.threads, case.place, tuple(case.sizes.values())


def to_record(row: Row, peaks: dict[str, Peak]) -> dict[str, Any]:
    case, timing = row.case, row.timing
    record: dict[str, Any] = {
        "case": case.name,
        "mode": case.mode,
        "sizes": case.sizes,
        "dtype": dtype_name(case.dtype),
        "threads": case.threads,
        "place": case.place,
        "flops": case.flops,
        "error": row.error,
    }
    if timing is None:
        return record
    us = 1e-3 / case.steps
    gflops = case.flops * case.steps / timing.fused.median
    return record | {
        "fused_us": {key: value * us for key, value in asdict(timing.fused).items()},
        "eager_us": {key: value * us for key, value in asdict(timing.eager).items()},
        "ratio": {"median": timing.ratio, "low": timing.low, "high": timing.high},
        "rounds": timing.rounds,
        "fused_per_second": 1e9 * case.steps / timing.fused.median,
        "eager_per_second": 1e9 * case.steps / timing.eager.median,
        "fused_gflops": gflops,
        "eager_gflops": case.flops * case.steps / timing.eager.median,
        "share_of_peak": gflops / peaks[peak_name(case)].gflops,
    }


def verdict(ratio: dict[str, float]) -> str:
    """faster or slower where the interval says so, else even."""
    if ratio["low"] > 1:
        return "faster"
    return "slower" if ratio["high"] < 1 else "even"


def summarise(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Worst and geometric mean of the ratios: of all rows, then of each mode, dtype and place."""

    def group(record: dict[str, Any]) -> str:
        return f"{record['mode']}, {record['dtype']}, {record['place']}"

    groups = {"all": list(records)} | {key: list(rows) for key, rows in itertools.groupby(records, group)}
    return [summarise_group(key, rows) for key, rows in groups.items()]


def summarise_group(name: str, records: list[dict[str, Any]]) -> dict[str, Any]:
    timed = [record for record in records if record["error"] is None]
    verdicts = [verdict(record["ratio"]) for record in timed]
    worst = min(timed, key=lambda record: record["ratio"]["median"], default=None)
    return {
        "rows": name,
        "worst": None if worst is None else {"case": worst["case"], "ratio": worst["ratio"]["median"]},
        "geometric_mean": geometric_mean([record["ratio"]["median"] for record in timed]) if timed else None,
        "faster": verdicts.count("faster"),
        "even": verdicts.count("even"),
        "slower": verdicts.count("slower"),
        "errors": len(records) - len(timed),
    }


def to_markdown(report: dict[str, Any]) -> str:
    """The report as Markdown: the machine, every row with losing ones marked, worst and geometric mean at the foot."""
    rows = report["rows"]
    sizes = list(rows[0]["sizes"]) if rows else []
    lines = [f"## {report['title']}", "", *machine_lines(report), ""]
    lines += [
        "Times are medians and quartiles. eager / fused is over 1 where fused is faster, with its 95% interval.",
        "",
    ]
    lines += table(
        [
            "mode",
            *sizes,
            "dtype",
            "on",
            "fused us",
            "eager us",
            "eager / fused",
            "",
            "fused per s",
            "GFLOP/s",
            "of peak",
        ],
        [cells(row) for row in rows],
    )
    lines += [""]
    lines += table(
        ["rows", "worst", "at", "geometric mean", "faster", "even", "slower", "failed"],
        [summary_cells(summary) for summary in report["summary"]],
    )
    return "\n".join(lines) + "\n"


def machine_lines(report: dict[str, Any]) -> list[str]:
    machine = report["machine"]
    load = "unknown" if machine["load_average"] is None else f"{machine['load_average'][0]:.2f}"
    facts = [
        f"{machine['cpu']} ({machine['capability']}), {count(machine['cores'], 'core')}, "
        f"{count(machine['threads'], 'thread')}, load average {load} at the start",
        *gpu_lines(machine),
        f"Python {machine['python']}, torch {machine['torch']}, fastenc {machine['fastenc']}",
        *(f"backend {name}: {state}" for name, state in machine["backends"].items()),
        f"{machine['time']}, seed {report['seed']}",
        *(f"peak at {key}: {peak['gflops']:,.0f} GFLOP/s ({peak['source']})" for key, peak in report["peaks"].items()),
    ]
    if warning := load_warning(machine):
        facts.append(f"**Warning:** {warning}")
    return [f"- {fact}" for fact in facts]


def gpu_lines(machine: dict[str, Any]) -> list[str]:
    """The GPU's facts, and what the ways of timing mean; nothing for a report on a CPU."""
    gpu = machine.get("gpu")
    if gpu is None:
        return []
    facts = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in gpu.items() if name != "name")
    return [f"{gpu['name']}: {facts}", *(f"{way}: {meaning}" for way, meaning in WAYS.items())]


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [table_line(header), table_line(["---"] * len(header)), *(table_line(row) for row in rows)]


def table_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def cells(record: dict[str, Any]) -> list[str]:
    sizes = [f"{size:,}" for size in record["sizes"].values()]
    first = [record["mode"], *sizes, record["dtype"], record["place"]]
    if record["error"] is not None:
        return [*first, "", "", "", f"**ERROR** {record['error'].replace('|', '/')}", "", "", ""]
    ratio = record["ratio"]
    return [
        *first,
        time_cell(record["fused_us"]),
        time_cell(record["eager_us"]),
        f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})",
        {"faster": "", "even": "even", "slower": "**SLOWER**"}[verdict(ratio)],
        f"{record['fused_per_second']:,.0f}",
        f"{record['fused_gflops']:,.1f}",
        f"{record['share_of_peak']:.0%}",
    ]


def time_cell(us: dict[str, float]) -> str:
    digits = 1 if us["median"] < 100 else 0
    return f"{us['median']:,.{digits}f} ({us['q1']:,.{digits}f} to {us['q3']:,.{digits}f})"


def summary_cells(summary: dict[str, Any]) -> list[str]:
    worst = summary["worst"]
    return [
        summary["rows"],
        *(
            ("", "", "")
            if worst is None
            else (f"{worst['ratio']:.2f}", worst["case"], f"{summary['geometric_mean']:.2f}")
        ),
        *(str(summary[key]) for key in ("faster", "even", "slower", "errors")),
    ]


def read_report(path: Path) -> dict[str, Any]:
    """A report written by this program; a ReportError says what is wrong with any other file."""
    try:
        report = json.loads(path.read_text())
        if report["format"] != FORMAT:
            raise ReportError(f"{path} has format {report['format']} and this program reads {FORMAT}; measure again")
        return report
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, ReportError):
            raise
        raise ReportError(f"{path} is not a benchmark report; give a file that --json or --out has written") from None


def compare(before: dict[str, Any], after: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What changed between two reports: (kind, line), kind being slower, faster, failed, mended, new, gone or note.

    A row is slower or faster when the intervals of its two ratios do not overlap.
    """
    for key in ("cpu", "cores", "torch"):
        if before["machine"][key] != after["machine"][key]:
            yield "note", f"{key} differs: {before['machine'][key]} and {after['machine'][key]}"
    old = {record["case"]: record for record in before["rows"]}
    new = {record["case"]: record for record in after["rows"]}
    for case in old | new:
        if case not in old or case not in new:
            yield ("new" if case in new else "gone"), case
        elif old[case]["error"] is not None or new[case]["error"] is not None:
            if old[case]["error"] is None:
                yield "failed", f"{case}: {new[case]['error']}"
            elif new[case]["error"] is None:
                yield "mended", case
        else:
            was, now = old[case]["ratio"], new[case]["ratio"]
            if now["high"] < was["low"] or now["low"] > was["high"]:
                kind = "slower" if now["median"] < was["median"] else "faster"
                yield kind, f"{case}: {was['median']:.2f} -> {now['median']:.2f}"
