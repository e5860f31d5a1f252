"""The rows of a question as a table: Markdown, and the same cells for the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .cuda import WAYS
from .harness import count
from .machine import load_warning
from .report import Record, has_figures, summarise, verdict

VERDICTS = {"faster": "", "even": "even", "slower": "**SLOWER**"}
EXPLANATION = (
    "Medians and quartiles of all processes. theirs / ours is over 1 where fastenc is ahead; its 95% interval also "
    "holds the median of each process. Shares are of the highest rates measured on the spot."
)
SUMMARY_HEADER = ["rows", "against", "worst", "at", "geometric mean", "ahead", "even", "behind", "failed", "missing"]


def to_markdown(records: Sequence[Record]) -> str:
    """One question: every row with losing ones marked, missing peers in words, worst and geometric mean at the foot."""
    lines = [f"## {records[0]['title']}", "", *(f"- {fact}" for fact in facts(records)), "", EXPLANATION, ""]
    shown = [record for record in records if record["missing"] is None]
    lines += markdown_table(header(shown), [cells(record, shown) for record in shown])
    lines += ["", *markdown_table(SUMMARY_HEADER, [summary_cells(summary) for summary in summarise(records)]), ""]
    lines += [f"- missing: {peer}: {why}" for peer, why in missing(records)]
    return "\n".join(lines) + "\n"


def missing(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Each peer that is missing somewhere, with each of its reasons."""
    return list(dict.fromkeys((r["peer"], r["missing"]) for r in records if r["missing"] is not None))


def facts(records: Sequence[Record]) -> list[str]:
    """The machine, versions and peaks of a question's rows, a sentence each."""
    machine = records[0]["machine"]
    load = "unknown" if machine["load_average"] is None else f"{machine['load_average'][0]:.2f}"
    caches = ", ".join(f"{name} {size >> 10:,} KiB" for name, size in machine["caches"].items())
    number = max(record["processes"] for record in records)
    processes = "1 process" if number == 1 else f"{number} processes"
    return [
        f"{machine['cpu']} ({machine['capability']}), {count(machine['cores'], 'core')}, {caches or 'caches unknown'}, "
        f"load average {load} at the start",
        *gpu_facts(machine),
        f"Python {machine['python']}, torch {machine['torch']}, numpy {machine['numpy']}, fastenc {machine['fastenc']}",
        *(f"backend {name}: {state}" for name, state in machine["backends"].items()),
        f"{machine['time']}, {processes} for each row, seed {records[0]['seed']}; "
        f"caches {' or '.join(dict.fromkeys(record['cache'] for record in records))}",
        *peak_facts(records),
        *([f"**Warning:** {warning}"] if (warning := load_warning(machine)) else []),
    ]


def peak_facts(records: Sequence[Record]) -> list[str]:
    found = {}
    for record in records:
        if "peak_gflops" in record:
            peak = record["peak_gflops"]
            found[record["dtype"], record["place"]] = (
                f"peak in {record['dtype']} on {record['place']}: {peak['rate']:,.0f} GFLOP/s ({peak['source']})"
            )
            copying = ", ".join(f"{int(size) >> 10:,} KiB {rate:,.0f}" for size, rate in record["copying_gbs"].items())
            found["", record["place"]] = f"copying on {record['place']}, GB/s by size: {copying}"
    return list(found.values())


def gpu_facts(machine: dict[str, Any]) -> list[str]:
    """The GPU's facts, and what the ways of timing mean; nothing for a report on a CPU."""
    gpu = machine["gpu"]
    if gpu is None:
        return []
    words = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in gpu.items() if name != "name")
    return [f"{gpu['name']}: {words}", *(f"{way}: {meaning}" for way, meaning in WAYS.items())]


def size_names(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in record["sizes"]))


def header(records: Sequence[Record]) -> list[str]:
    unit = records[0]["unit"] if records else "us"
    first = [
        "mode",
        *size_names(records),
        "dtype",
        "on",
        "against",
        f"ours, {unit}",
        f"theirs, {unit}",
        "theirs / ours",
        "",
    ]
    return [*first, "ours per s", "GFLOP/s", "of peak", "GB/s", "of peak "] if unit == "us" else first


def cells(record: Record, records: Sequence[Record]) -> list[str]:
    """A row under `header(records)`."""
    sizes = [f"{record['sizes'][name]:,}" if name in record["sizes"] else "" for name in size_names(records)]
    first = [record["mode"], *sizes, record["dtype"], record["place"], record["peer"]]
    if not has_figures(record):
        row = [*first, "", "", "", f"**ERROR** {record['error']}".replace("|", "/")]
        return row + [""] * (len(header(records)) - len(row))
    ratio = record["ratio"]
    row = [
        *first,
        spread(record["ours"]),
        spread(record["theirs"]),
        f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})",
        VERDICTS[verdict(ratio)],
    ]
    if record["unit"] == "us":
        row += [f"{1e6 / record['ours']['median']:,.0f}", f"{record['gflops']:,.1f}", f"{record['share_of_peak']:.0%}"]
        row += [f"{record['gbs']:,.1f}", f"{record['share_of_bandwidth']:.0%}"]
    return row


def spread(value: dict[str, float]) -> str:
    digits = 1 if value["median"] < 100 else 0
    return f"{value['median']:,.{digits}f} ({value['q1']:,.{digits}f} to {value['q3']:,.{digits}f})"


def summary_cells(summary: Record) -> list[str]:
    worst = summary["worst"]
    found = ("", "", "")
    if worst is not None:
        found = (f"{worst['ratio']:.2f}", worst["case"], f"{summary['geometric_mean']:.2f}")
    counts = (str(summary[key]) for key in ("faster", "even", "slower", "errors", "missing"))
    return [summary["rows"], summary["peer"], *found, *counts]


def markdown_table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [markdown_line(head), markdown_line(["---"] * len(head)), *(markdown_line(row) for row in rows)]


def markdown_line(row: Sequence[str]) -> str:
    return f"| {' | '.join(row)} |"
