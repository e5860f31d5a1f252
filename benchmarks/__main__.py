"""`python -m benchmarks`: ask every question, or compare two earlier answers.

    python -m benchmarks                                  # tens of minutes; the machine should do nothing else
    python -m benchmarks --quick --out /tmp/bench         # a smoke test
    python -m benchmarks --device cuda                    # on a GPU; `make gpu` does more
    python -m benchmarks --compare before.json after.json # exit code 1 if a row became slower or fails now

Writes one JSON file per question and RESULTS.md with their tables.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from . import dense, encoder, training
from .command import add_options, answer, exit_code, parse_options, write_json
from .machine import describe_machine
from .report import ReportError, compare, read_report, to_markdown

QUESTIONS = (dense.QUESTION, encoder.QUESTION, training.QUESTION)
RESULTS = Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measure fastenc against eager PyTorch, or compare two measurements."
    )
    add_options(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="by default benchmarks/results/<processor>-<date>")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"), help="two JSON files")
    parsed = parser.parse_args(arguments)
    if parsed.compare is not None:
        try:
            return print_comparison(*parsed.compare)
        except ReportError as error:
            parser.error(str(error))
    options, machine = parse_options(parser, parsed), describe_machine(parsed.device)
    processor = machine["cpu"] if machine["gpu"] is None else machine["gpu"]["name"]
    folder = parsed.out or RESULTS / folder_name(processor, machine["time"])
    folder.mkdir(parents=True, exist_ok=True)
    reports = []
    for question in QUESTIONS:
        report = answer(question, options, machine)
        write_json(report, folder / f"{question.name}.json")
        reports.append(report)
    text = "# fastenc against eager PyTorch\n\n" + "\n".join(to_markdown(report) for report in reports)
    (folder / "RESULTS.md").write_text(text)
    print(text)
    print(f"Written to {folder}")
    return max(exit_code(report) for report in reports)


def folder_name(processor: str, time: str) -> str:
    """The processor, date and minute in letters that any file system takes."""
    return re.sub(r"[^a-z0-9]+", "-", f"{processor}-{time[:16]}".lower()).strip("-")


def print_comparison(before: Path, after: Path) -> int:
    changes = list(compare(read_report(before), read_report(after)))
    for kind, line in changes:
        print(f"{kind}: {line}")
    if not changes:
        print("no row changed beyond its interval")
    return 1 if any(kind in ("slower", "failed") for kind, _ in changes) else 0


if __name__ == "__main__":
    sys.exit(main())
