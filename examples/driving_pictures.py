"""The pictures of driving.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import driving_world as world
import numpy as np

from fastenc import plots

COLOURS = (plots.BLUE, plots.ORANGE, "#94a4a2", "#00695c")


def draw_track(drives: world.Drives, estimates: dict[str, np.ndarray], path: Path) -> None:
    """The first drive as it was and as the first two found it, and the errors of all over time."""

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2, width_ratios=[1, 1.25])
        seconds = np.arange(drives.state.shape[1]) * world.STEP
        colours = dict(zip(estimates, COLOURS, strict=True))
        network, kalman = list(estimates)[:2]
        left.plot(*drives.state[0, :, :2].T, color="#222222", linewidth=6, alpha=0.2, label="truth")
        left.plot(*estimates[kalman][0, :, :2].T, color=colours[kalman], linewidth=1.5, label=kalman)
        left.plot(*estimates[network][0, :, :2].T, ".", color=colours[network], markersize=3, label=network)
        left.plot(*world.POST_PLACES.T, "^", color="#555555", markersize=8, label="posts")
        left.set(title="A drive, and where it was found", xlabel="x, m", ylabel="y, m", aspect="equal")
        left.legend(loc="center")
        for name in reversed(estimates):
            apart = np.hypot(*(estimates[name][0, :, :2] - drives.state[0, :, :2]).T)
            right.plot(seconds, apart, color=colours[name], linewidth=1.5, label=name)
        gone = np.isnan(drives.readings[0])
        sensors = {"camera": slice(2, 2 + world.POSTS), "lidar": slice(2 + world.POSTS, None)}
        for (name, part), level in zip(sensors.items(), (0.0, 0.04), strict=True):
            right.fill_between(
                *(seconds, level, level + 0.03, gone[:, part].all(1)),
                transform=right.get_xaxis_transform(),
                color="#222222" if name == "camera" else "#999999",
                label=f"no {name}",
                linewidth=0,
            )
        right.set(title="Error of the place", xlabel="s", ylabel="m", yscale="log", ylim=(0.003, None))
        right.legend(ncols=2, fontsize=10)

    plots.save_figure(draw, path, (14, 6))


def draw_faults(
    drives: world.Drives, scores: dict[str, np.ndarray], areas: dict[str, dict[str, list[float]]], path: Path
) -> None:
    """Both scores over two drives, one after the other, with the faults; and the areas."""
    colours = {"network": plots.BLUE, "filter": plots.ORANGE}
    shown = next(iter(two_drives(drives.fault)))

    def draw(figure: Any) -> None:
        grid = figure.add_gridspec(2, 2, width_ratios=[1.6, 1])
        fault = np.concatenate(drives.fault[shown])
        seconds = np.arange(len(fault)) * world.STEP
        for place, (name, score) in enumerate(scores.items()):
            axes = figure.add_subplot(grid[place, 0])
            value = np.concatenate(score[shown])
            axes.plot(seconds, value, color=colours[name], linewidth=1.2)
            for start in np.flatnonzero(np.diff(fault, prepend=-1) > 0):
                end = seconds[start] + world.FAULT_LENGTH
                axes.axvspan(seconds[start], end, color="#ffa90e", alpha=0.3, linewidth=0)
                if place == 0:
                    kind = list(world.FAULTS)[fault[start]]
                    axes.text(seconds[start], 1.01, kind, transform=axes.get_xaxis_transform(), fontsize=10)
            axes.set(ylabel="network: deviations" if name == "network" else "filter: mean NIS", xlabel="s")
            if name == "filter":
                axes.set_yscale("log")
        axes = figure.add_subplot(grid[:, 1])
        for offset, (name, found) in zip((-0.2, 0.2), areas.items(), strict=True):
            places = np.arange(len(found)) + offset
            axes.barh(places, [np.mean(each) for each in found.values()], 0.38, color=colours[name], label=name)
        axes.axvline(0.5, color="#555555", linestyle="--", linewidth=1)
        axes.set_yticks(range(len(areas["filter"])), list(areas["filter"]))
        axes.invert_yaxis()
        axes.grid(axis="x")
        axes.set(title="Faults found", xlabel="area under the ROC curve; 0.5 is a guess", xlim=(0.4, 1.0))
        axes.legend(loc="lower right")

    plots.save_figure(draw, path, (14, 6))


def two_drives(fault: np.ndarray) -> list[list[int]]:
    """Pairs of drives in the order of how many kinds of faults they hold, the most first."""
    pairs = [[first, first + 1] for first in range(0, len(fault) - 1, 2)]
    return sorted(pairs, key=lambda pair: -len(np.unique(fault[pair])))
