"""`fastenc bench`, in a checkout also `python -m benchmarks`: ask questions of speed, or compare two earlier answers.

    fastenc bench                            # everything, some hours; the machine should do nothing else
    fastenc bench --processes 1              # less than two; intervals leave out what differs between processes
    fastenc bench fit step                   # some questions
    fastenc bench --quick --out /tmp/bench   # a smoke test
    fastenc bench --device cuda              # on a GPU; in a checkout `make gpu` does more
    fastenc bench --compare before after     # files or folders; exit code 1 if a row became slower or fails now

Writes one JSON file per question, RESULTS.md with their tables, index.html, and pictures where matplotlib is installed.
Exit codes: 0 done; 1 a row failed; 2 bad arguments; 130 Ctrl-C, what has been measured so far being written.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from . import QUESTIONS
from .command import Answer, add_options, parse_options
from .machine import describe_machine
from .page import to_page
from .report import Record, ReportError, compare, failed, grouped, read_rows, write_rows
from .tables import to_markdown

RESULTS = Path(__file__).parent / "results"  # of a checkout; an installed package writes to the current folder


def main(arguments: Sequence[str] | None = None, prog: str = "python -m benchmarks") -> int:
    parser = argparse.ArgumentParser(
        prog=prog, description="Measure fastenc against eager PyTorch and others, or compare two measurements."
    )
    names = [question.name for question in QUESTIONS]
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help=f"by default all of {', '.join(names)}")
    add_options(parser)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="by default a folder named after the processor and time"
    )
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"), help="two files or folders")
    parsed = parser.parse_args(arguments)
    if parsed.compare is not None:
        try:
            return print_comparison(*parsed.compare)
        except ReportError as error:
            parser.error(str(error))
    if unknown := [name for name in parsed.questions if name not in names]:
        parser.error(f"{unknown[0]!r} is no question; ask {', '.join(names)}")
    options, machine = parse_options(parser, parsed), describe_machine(parsed.device, parsed.tf32)
    folder = parsed.out or default_folder(machine)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {folder}: {error.strerror}; give a folder that can be made")
    records: list[Record] = []
    code = 0
    for question in QUESTIONS:
        if parsed.questions and question.name not in parsed.questions:
            continue
        answer = Answer(question, options, machine, parsed.tf32)
        try:
            answer.run()
        except KeyboardInterrupt:
            print("Ctrl-C: writing what has been measured so far", file=sys.stderr)
            code = 130
        if rows := answer.records():
            write_rows(rows, folder / f"{question.name}.json")
            records += rows
        if code:
            break
    if records:
        write_pages(records, folder)
        print(f"Written to {folder}")
    return code or int(failed(records))


def default_folder(machine: Record) -> Path:
    processor = machine["cpu"] if machine["gpu"] is None else machine["gpu"]["name"]
    parent = RESULTS if RESULTS.is_dir() else Path("benchmark-results")
    return parent / folder_name(processor, machine["time"])


def folder_name(processor: str, time: str) -> str:
    """The processor, date and minute in letters that any file system takes."""
    return re.sub(r"[^a-z0-9]+", "-", f"{processor}-{time[:16]}".lower()).strip("-")


def write_pages(records: Sequence[Record], folder: Path) -> None:
    """RESULTS.md, index.html and the pictures of `records`."""
    pictures: dict[str, str] = {}
    if importlib.util.find_spec("matplotlib") is None:
        print('No pictures: matplotlib is not installed; run: pip install "fastenc[app]"', file=sys.stderr)
    else:
        from .plots import draw  # matplotlib is optional

        for name, figure in draw(records):
            file = folder / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
            figure.savefig(file.with_suffix(".png"), dpi=120)
            figure.savefig(file.with_suffix(".svg"))
            pictures[name] = file.with_suffix(".svg").read_text()
    tables = [to_markdown(rows) for rows in grouped(records, "question").values()]
    text = "# fastenc and others\n\n" + "\n".join(tables)
    (folder / "RESULTS.md").write_text(text)
    (folder / "index.html").write_text(to_page(records, pictures))
    print(text)


def print_comparison(before: Path, after: Path) -> int:
    changes = list(compare(read_rows(before), read_rows(after)))
    for kind, line in changes:
        print(f"{kind}: {line}")
    if not changes:
        print("no row changed beyond its interval")
    return 1 if any(kind in ("slower", "failed") for kind, _ in changes) else 0


if __name__ == "__main__":
    sys.exit(main())
