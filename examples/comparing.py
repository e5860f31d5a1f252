"""What the examples on real data share: their arguments, mean and spread, and a picture of bars."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastenc import plots
from fastenc.report import table


@dataclass(frozen=True)
class Row:
    """One line of the table that `make examples` makes of all examples.

    what       what is measured, with its unit
    ours       the figure of the fused model
    beside     the baseline
    theirs     its figure
    higher     whether higher is better
    """

    what: str
    ours: float
    beside: str
    theirs: float
    higher: bool = True


def write_results(out: Path, rows: Sequence[Row]) -> None:
    """Write the figures to results.json in the example's folder, for the table of all of them."""
    (out / "results.json").write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")


def arguments(
    description: str,
    name: str,
    *,
    epochs: int,
    seeds: int,
    rows: int | None = None,
    over: str = "the training rows",
    **more: tuple[float, str],
) -> Any:
    """The parsed command line; the output folder is made, and PyTorch runs on one thread, which suits small models.

    rows: with an option for how many rows of the data are taken; this many by default.
    over: what an epoch is a pass over.
    more: further options that take a number: its default, of the type that is read, and what it is.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=Path("out") / name, help="folder for the picture (%(default)s)")
    parser.add_argument("--epochs", type=int, default=epochs, help=f"passes over {over} (%(default)s)")
    parser.add_argument("--seeds", type=int, default=seeds, help="how often, each from other numbers (%(default)s)")
    if rows is not None:
        parser.add_argument("--rows", type=int, default=rows, help="of the data (%(default)s)")
    for option, (default, what) in more.items():
        parser.add_argument(f"--{option}", type=type(default), default=default, help=f"{what} (%(default)s)")
    found = parser.parse_args()
    found.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    return found


def show(figures: Mapping[str, Sequence[float]], what: str, path: Path, digits: int = 3, **columns: Mapping) -> None:
    """Print mean and spread of each row's figures, and draw them.

    Args:
        figures: a name, and one number for each seed.
        what: what the numbers are.
        path: of the picture.
        columns: more columns of the table: their names, and a number or text for each row.
    """
    header = ("", what, "standard deviation", *(name.replace("_", " ") for name in columns))
    rows = []
    for name, values in figures.items():
        cells = (f"{np.mean(values):.{digits}f}", f"{np.std(values):.{digits}f}" if len(values) > 1 else "")
        rows.append((name, *cells, *(str(column[name]) for column in columns.values())))
    print(table(header, rows))

    def draw(axes: Any) -> None:
        for place, values in enumerate(figures.values()):
            axes.barh(place, np.mean(values), color=plots.BLUE, height=0.55, alpha=0.85)
            axes.plot(values, [place] * len(values), "o", color=plots.ORANGE, markersize=5)
        axes.set_yticks(range(len(figures)), list(figures))
        axes.invert_yaxis()
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.set(title=f"{what}: means, and each seed", xlabel=what)

    plots.save_plot(draw, path, (9, 1.4 + 0.6 * len(figures)))
    print(f"\nThe picture is {path}.")
