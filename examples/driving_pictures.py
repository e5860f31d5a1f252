"""The pictures of driving.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import driving_world as world
import numpy as np

from fastenc import plots

GUESS = 0.5  # the area of a score that knows nothing
COLOURS = (plots.BLUE, plots.ORANGE, "#94a4a2", "#00695c")


def draw_track(drives: world.Drives, estimates: dict[str, np.ndarray], path: Path) -> None:
    """The drive with the most drop-outs as it was and as the first two found it, and the errors of all over time."""
    sensors = {"camera": slice(2, 2 + world.POSTS), "lidar": slice(2 + world.POSTS, None)}
    gone = {name: np.isnan(drives.readings[..., part]).all(2) for name, part in sensors.items()}
    shown = int(np.argmax(sum(each.sum(1) for each in gone.values())))

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2, width_ratios=[1, 1.25])
        seconds = np.arange(drives.state.shape[1]) * world.STEP
        colours = dict(zip(estimates, COLOURS, strict=True))
        network, kalman = list(estimates)[:2]
        left.plot(*drives.state[shown, :, :2].T, color="#222222", linewidth=6, alpha=0.2, label="truth")
        left.plot(*estimates[kalman][shown, :, :2].T, color=colours[kalman], linewidth=1.5, label=kalman)
        left.plot(*estimates[network][shown, :, :2].T, ".", color=colours[network], markersize=3, label=network)
        left.plot(*world.POST_PLACES.T, "^", color="#555555", markersize=8, label="posts")
        left.set(title="A drive, and where it was found", xlabel="x, m", ylabel="y, m", aspect="equal")
        left.legend(loc="center")
        for name in reversed(estimates):
            apart = np.hypot(*(estimates[name][shown, :, :2] - drives.state[shown, :, :2]).T)
            right.plot(seconds, apart, color=colours[name], linewidth=1.5, label=name)
        for (name, missing), level, colour in zip(gone.items(), (0.0, 0.03), ("#222222", "#999999"), strict=True):
            right.fill_between(
                *(seconds, level, level + 0.025, missing[shown]),
                transform=right.get_xaxis_transform(),
                color=colour,
                label=f"no {name}",
                linewidth=0,
            )
        right.set(title="Error of the place", xlabel="s", ylabel="m", yscale="log", ylim=(0.002, 500))
        right.yaxis.set_major_formatter("{x:g}")
        right.legend(ncols=3, fontsize=10, loc="upper center")

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
        seconds, labelled = np.arange(len(fault)) * world.STEP, 0
        for place, (name, score) in enumerate(scores.items()):
            axes = figure.add_subplot(grid[place, 0])
            value = np.concatenate(score[shown])
            axes.plot(seconds, value, color=colours[name], linewidth=1.2)
            for start in np.flatnonzero(np.diff(fault, prepend=-1) > 0):
                end = seconds[start] + world.FAULT_LENGTH
                axes.axvspan(seconds[start], end, color="#ffa90e", alpha=0.3, linewidth=0)
                if place == 0:
                    kind, height = list(world.FAULTS)[fault[start]], 1.02 + 0.07 * (labelled % 2)
                    labelled += 1
                    axes.text(seconds[start], height, kind, transform=axes.get_xaxis_transform(), fontsize=10)
            axes.set(ylabel="network: deviations" if name == "network" else "filter: mean NIS", xlabel="s")
        axes = figure.add_subplot(grid[:, 1])
        for offset, (name, found) in zip((-0.2, 0.2), areas.items(), strict=True):
            places, beyond = np.arange(len(found)) + offset, [np.mean(each) - GUESS for each in found.values()]
            axes.barh(places, beyond, 0.38, left=GUESS, color=colours[name], label=name)
        axes.axvline(GUESS, color="#555555", linewidth=1)
        axes.set_yticks(range(len(areas["filter"])), list(areas["filter"]))
        axes.invert_yaxis()
        axes.grid(axis="x")
        axes.set(title="Faults found", xlabel="area under the ROC curve; 0.5 is a guess", xlim=(None, 1.0))
        axes.legend(loc="lower right")

    plots.save_figure(draw, path, (14, 6))


def two_drives(fault: np.ndarray) -> list[list[int]]:
    """Pairs of drives in the order of how many kinds of faults they hold, the most first."""
    pairs = [[first, first + 1] for first in range(0, len(fault) - 1, 2)]
    return sorted(pairs, key=lambda pair: -len(np.unique(fault[pair])))
