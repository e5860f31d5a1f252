"""Sequence logos, and the attributions of one sequence, for motifs.py."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from matplotlib.font_manager import FontProperties
from matplotlib.patches import PathPatch
from matplotlib.textpath import TextPath
from matplotlib.transforms import Affine2D
from planted_motifs import BOXES, LETTERS, RIGHT, START, WIDTH, Planted

from fastenc.plots import BLUE, ORANGE

COLOURS = {"A": "#009E73", "C": BLUE, "G": "#E69F00", "T": ORANGE}  # of Okabe and Ito's palette
SHOWN = 64  # letters of the sequence


def draw(
    figure: Any,
    promoters: Planted,
    attributed: np.ndarray,
    motifs: list[np.ndarray],
    starts: np.ndarray,
    order: np.ndarray,
) -> None:
    """The planted motifs above the recovered ones, their distances, and the letters of one promoter.

    attributed [rows, L], starts [rows, 2] of the motifs found, order [rows] from the surest promoter on: the
    one that is shown is surer than nine in ten.
    """
    grid = figure.add_gridspec(3, 3, height_ratios=(1, 1, 1.1))
    for column, ((name, planted), motif) in enumerate(zip(BOXES.items(), motifs, strict=True)):
        for row, (how, matrix) in enumerate((("planted", planted), ("recovered", motif))):
            axes = figure.add_subplot(grid[row, column])
            bits = 2 + (matrix * np.log2(np.maximum(matrix, 1e-12))).sum(1, keepdims=True)
            draw_letters(axes, matrix * bits)
            axes.set(title=f"{name}, {how}", ylabel="bits", ylim=(0, 2), xticks=range(1, WIDTH + 1))
    axes = figure.add_subplot(grid[:2, 2])
    distance = starts[:, 1] - starts[:, 0] + START
    share = [(distance == d).mean() for d in range(RIGHT[0] - 12, RIGHT[-1] + 13)]
    axes.bar(range(RIGHT[0] - 12, RIGHT[-1] + 13), share, color=BLUE, alpha=0.85)
    axes.axvspan(RIGHT[0] - 0.5, RIGHT[-1] + 0.5, color="#e4e4e4", zorder=0)
    axes.set(title="Distance of the recovered", xlabel="letters; planted: shaded", ylabel="share of promoters")
    row = order[len(order) // 10]
    middle = int(promoters.starts[row].mean()) + WIDTH // 2
    begin = min(max(0, middle - SHOWN // 2), attributed.shape[1] - SHOWN)
    axes = figure.add_subplot(grid[2, :])
    here = promoters.letters[row, begin : begin + SHOWN]
    draw_letters(axes, np.eye(4)[here] * attributed[row, begin : begin + SHOWN, None], begin + 1)
    for start in promoters.starts[row]:
        axes.axvspan(start + 0.5, start + WIDTH + 0.5, color="#e4e4e4", zorder=0)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(
        title="Attribution of each letter of a promoter; planted boxes shaded",
        xlabel="position",
        ylabel="log of the odds",
    )


def draw_letters(axes: Any, heights: np.ndarray, first: int = 1) -> None:
    """Letters [columns, 4] of these heights on each other, the largest on top; negative ones hang below zero."""
    for column, of_column in enumerate(heights, first):
        base = 0.0
        for letter in np.argsort(of_column):
            height = of_column[letter]
            if abs(height) > 1e-9:
                place = Affine2D().scale(0.94, height).translate(column - 0.47, base)
                name = LETTERS[letter]
                axes.add_patch(PathPatch(glyph(name), color=COLOURS[name], lw=0, transform=place + axes.transData))
                base += max(height, 0.0)
    axes.set(xlim=(first - 0.6, first + len(heights) - 0.4), ylim=(min(0.0, heights.min() * 1.1), heights.max() * 1.1))
    axes.grid(False)


@cache
def glyph(letter: str) -> Any:
    """The letter's outline, in the square from 0 to 1."""
    path = TextPath((0, 0), letter, size=1, prop=FontProperties(family="DejaVu Sans Mono", weight="bold"))
    box = path.get_extents()
    return path.transformed(Affine2D().translate(-box.x0, -box.y0).scale(1 / box.width, 1 / box.height))
