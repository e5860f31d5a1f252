"""Pictures of a run: how time grows with the one size that varies, and a roofline. Needs matplotlib."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .report import Record, grouped, has_figures

OURS = "fastenc"
FEWEST_POINTS = 3  # of a curve


def draw(records: Sequence[Record]) -> Iterator[tuple[str, Figure]]:
    """Each picture with a name for its file."""
    shown = [record for record in records if has_figures(record) and record["unit"] == "us"]
    for (question, mode), group in grouped(shown, "question", "mode").items():
        panels = {key: rows for key, rows in grouped(group, "dtype", "place").items() if varying(rows) is not None}
        if panels:
            yield f"{question}-{mode}", panelled(f"{question}: {mode}", panels, draw_curves)
    if shown:
        title = "roofline: least work and least bytes of each row"
        yield "roofline", panelled(title, grouped(shown, "dtype", "place"), draw_roofline)


def varying(records: Sequence[Record]) -> str | None:
    """The size that differs between the records while the others stay, if there is one, with points for a curve."""
    values = {name: {record["sizes"].get(name) for record in records} for name in records[0]["sizes"]}
    names = [name for name, found in values.items() if len(found) > 1]
    return names[0] if len(names) == 1 and len(values[names[0]]) >= FEWEST_POINTS else None


def panelled(title: str, panels: dict[tuple, list[Record]], draw_panel: Callable[[Axes, list[Record]], None]) -> Figure:
    """A panel for each (dtype, place)."""
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(5.5 * columns, 4 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, ((dtype, place), records) in zip(axes.flat, panels.items(), strict=False):
        draw_panel(axis, records)
        axis.set_title(f"{dtype}, {place}", fontsize="medium")
    figure.suptitle(title)
    return figure


def draw_curves(axis: Axes, records: list[Record]) -> None:
    size = varying(records)
    assert size is not None
    peers = {key[0]: rows for key, rows in grouped(records, "peer").items()}
    lines = {OURS: next(iter(peers.values())), **peers}  # eager, the first, is beside every row of ours
    for name, rows in lines.items():
        side = "ours" if name == OURS else "theirs"
        points = sorted((row["sizes"][size], row[side]["median"], row[side]["q1"], row[side]["q3"]) for row in rows)
        x, median, q1, q3 = zip(*points, strict=True)
        (line,) = axis.plot(x, median, marker="o", markersize=3, linewidth=2 if name == OURS else 1, label=name)
        axis.fill_between(x, q1, q3, color=line.get_color(), alpha=0.25, linewidth=0)
    axis.set(xscale="log", yscale="log", xlabel=size, ylabel="us")
    for name, place in cache_marks(records, size).items():
        axis.axvline(place, color="gray", linestyle=":", linewidth=1)
        axis.annotate(
            name, (place, 0.98), xycoords=("data", "axes fraction"), fontsize="x-small", va="top", color="gray"
        )
    axis.grid(visible=True, alpha=0.3)
    axis.legend(fontsize="small")


def cache_marks(records: Sequence[Record], size: str) -> dict[str, float]:
    """Where the least bytes of a step outgrow each cache and memory: between two points, straight in logarithms."""
    machine = records[0]["machine"]
    limits = dict(machine["caches"]) | ({} if machine["memory"] is None else {"memory": machine["memory"]})
    points = sorted({(record["sizes"][size], record["bytes"]) for record in records})
    marks = {}
    for name, limit in limits.items():
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            if y0 < limit <= y1:
                share = math.log(limit / y0) / math.log(y1 / y0)
                marks[name] = x0 * (x1 / x0) ** share
    return marks


def draw_roofline(axis: Axes, rows: list[Record]) -> None:
    """GFLOP/s over FLOP per byte of each row, under the roofs measured on the spot."""
    first = [group[0] for group in grouped(rows, "case").values()]  # of each case, against eager
    intensity = [row["flops"] / row["bytes"] for row in first]
    axis.scatter(intensity, [row["their_gflops"] for row in first], s=12, label=first[0]["peer"], color="tab:gray")
    axis.scatter(intensity, [row["gflops"] for row in first], s=12, label=OURS, color="tab:blue")
    peak = max(row["peak_gflops"]["rate"] for row in first)
    rates = [max(row["copying_gbs"][key] for row in first) for key in first[0]["copying_gbs"]]
    bends = (peak / max(rates), peak / min(rates))
    ends = (min(*intensity, *bends) / 2, max(*intensity, *bends) * 2)
    for rate, name, below in ((rates[-1], "memory", True), (max(rates), "cache", False)):
        bend = peak / rate
        axis.plot([ends[0], bend], [ends[0] * rate, peak], color="black", linewidth=1)
        offset = (4, -12) if below else (-4, 6)
        where = (ends[0], ends[0] * rate)
        axis.annotate(f"{name} {rate:,.0f} GB/s", where, offset, textcoords="offset points", fontsize="x-small")
    axis.plot([peak / max(rates), ends[1]], [peak, peak], color="black", linewidth=1)
    axis.annotate(f"{peak:,.0f} GFLOP/s", (ends[1], peak), fontsize="x-small", ha="right", va="bottom")
    axis.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="GFLOP/s")
    axis.grid(visible=True, alpha=0.3)
    axis.legend(fontsize="small", loc="lower right")
