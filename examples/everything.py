"""All front ends, applications and open challenges one after the other, and one table of what came out.

make examples                            # some minutes; pictures and figures go to out/
python examples/everything.py --only motifs driving
python examples/everything.py --docs     # also writes the table to docs/applications/README.md
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

import fastenc
from fastenc.report import table

HERE = Path(__file__).parent
PAGES = HERE.parent / "docs" / "applications"
# Each program, and the page of docs/applications that tells of it.
PROGRAMS = {
    "images": "images",
    "gan_digits": "gan",
    "super_resolution": "super_resolution",
    "language": "language",
    "audio_sounds": "audio",
    "driving": "driving",
    "motifs": "biology",
    "privacy": "privacy",
    "personalised": "personalised",
    "scale": "scale",
}
COLUMNS = ("program", "what", "ours", "beside", "theirs", "")
HEAD = """# Every kind of data, and the applications

`make examples` runs these programs, {count} in {minutes:.0f} minutes here; `make examples ARGS=--docs` also writes this
table. Each has a page that says what its data are, how they were made, and what is weak. Measured on {where}; PyTorch
{torch}, fastenc {version}. One run: the pages have spreads over seeds where there are some.

"""


def run(name: str, out: Path) -> tuple[list[dict], float]:
    """The rows of a program's results.json, and how many seconds it took."""
    began = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    command = [sys.executable, str(HERE / f"{name}.py"), "--out", str(out / name)]
    subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
    rows = json.loads((out / name / "results.json").read_text(encoding="utf-8"))
    return rows, time.perf_counter() - began


def cells(name: str, row: dict) -> tuple[str, ...]:
    better = (row["ours"] > row["theirs"]) == row["higher"]
    even = math.isclose(row["ours"], row["theirs"])
    verdict = "even" if even else "better" if better else "worse"
    return (name, row["what"], f"{row['ours']:.4g}", row["beside"], f"{row['theirs']:.4g}", verdict)


def to_markdown(found: list[tuple[str, ...]]) -> str:
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    lines += [(f"[{name}]({PROGRAMS[name]}.md)", *others) for name, *others in found]
    rest = "\nWhich inputs drive which codes: [interpretability](interpretability.md).\n"
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + rest


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the applications and make one table of their figures.")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for their folders (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=PROGRAMS, default=list(PROGRAMS), metavar="NAME")
    parser.add_argument("--docs", action="store_true", help="write the table to docs/applications/README.md")
    args = parser.parse_args()
    found, seconds, failed = [], 0.0, []
    for name in args.only:
        print(f"== {name}", file=sys.stderr)
        try:
            rows, took = run(name, args.out)
        except subprocess.CalledProcessError:
            failed.append(name)
            continue
        seconds += took
        found += [cells(name, row) for row in rows]
        print(f"== {name}: {took:.0f} s", file=sys.stderr)
    print(table(COLUMNS, found))
    for name in failed:
        print(f"fastenc: {name} failed; its error is above", file=sys.stderr)
    if args.docs and not failed:
        where = f"{platform.machine()}, {os.cpu_count()} cores, one thread"
        head = HEAD.format(
            count=len(args.only),
            minutes=seconds / 60,
            where=where,
            torch=torch.__version__,
            version=fastenc.__version__,
        )
        (PAGES / "README.md").write_text(head + to_markdown(found), encoding="utf-8")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
