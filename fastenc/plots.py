"""Pictures of a trained encoder: loss curves, images beside their reconstructions, a map of the codes.

The draw_ functions draw into a matplotlib Axes that they are given; `save_plot` makes a figure for one of them. Figures
are drawn by Agg, need no display and leave pyplot's state alone. Colours tell people with colour-blindness apart too,
and where there are more than two, text says the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .data.extras import require

BLUE, ORANGE = "#0072B2", "#D55E00"  # of Okabe and Ito's palette
# Petroff's ten colours for the colour-blind (arXiv:2107.02270); dark green stands for his second grey.
TEN_COLOURS = (
    "#3f90da",
    "#ffa90e",
    "#bd1f01",
    "#94a4a2",
    "#832db6",
    "#a96b59",
    "#e76300",
    "#b9ac70",
    "#00695c",
    "#92dadd",
)
STYLE = {
    "font.size": 12,
    "axes.titlesize": 14,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid.axis": "y",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
}
DPI = 150


def save_plot(draw: Callable[[Any], None], path: str | os.PathLike[str], size: tuple[float, float] = (8, 5)) -> None:
    """Draw one Axes by `draw(axes)` and write it to `path` (.png, .svg or .pdf); `size` is in inches."""
    save_figure(lambda figure: draw(figure.add_subplot()), path, size)


def save_figure(draw: Callable[[Any], None], path: str | os.PathLike[str], size: tuple[float, float]) -> None:
    """Draw a whole Figure by `draw(figure)` and write it to `path`; `size` is in inches."""
    matplotlib = require("matplotlib", "drawing pictures")
    figure_module = require("matplotlib.figure", "drawing pictures")
    with matplotlib.rc_context(STYLE):
        figure = figure_module.Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(path, dpi=DPI)


def draw_losses(axes: Any, history: Mapping[str, list[float]], reference: tuple[str, float] | None = None) -> None:
    """The loss of each epoch, "loss" and, if it is there, "val_loss" of a History; `reference` is a level to beat."""
    curves = [("loss", "training", BLUE), ("val_loss", "validation", ORANGE)]
    for key, name, colour in curves:
        if values := history.get(key):
            axes.plot(range(1, len(values) + 1), values, color=colour, linewidth=2, label=name)
    if reference is not None:
        name, level = reference
        axes.axhline(level, color="#555555", linewidth=1.5, linestyle=(0, (4, 3)), label=name)
    axes.set(title="Loss", xlabel="epoch", ylabel="mean squared error", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.yaxis.set_major_locator(require("matplotlib.ticker", "drawing pictures").LogLocator(subs=(1, 2, 5)))
    axes.minorticks_off()
    axes.legend()


def draw_images(axes: Any, rows: Mapping[str, np.ndarray], title: str) -> None:
    """A grid of grey images, 1 is black; each row of it has a name and an array [images, height, width] in 0 to 1."""
    bands = []
    for images in rows.values():
        framed = np.pad(images, ((0, 0), (1, 1), (1, 1)), constant_values=np.nan)  # NaN is drawn as the background
        bands.append(np.concatenate(list(framed), axis=1))
    height = bands[0].shape[0]
    axes.imshow(np.concatenate(bands), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title)
    axes.set_xticks([])
    axes.set_yticks([height * (index + 0.5) - 0.5 for index in range(len(rows))], list(rows))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.grid(False)


def draw_map(axes: Any, points: np.ndarray, labels: np.ndarray, title: str) -> None:
    """Points [n, 2] coloured by label [n]; each label's name stands in the middle of its points."""
    effects = require("matplotlib.patheffects", "drawing pictures")
    for index, label in enumerate(np.unique(labels)):
        mine = points[labels == label]
        colour = TEN_COLOURS[index % len(TEN_COLOURS)]
        axes.scatter(mine[:, 0], mine[:, 1], s=14, color=colour, alpha=0.75, linewidths=0)
        x, y = np.median(mine, axis=0)
        text = axes.text(x, y, str(label), fontsize=20, fontweight="bold", ha="center", va="center")
        text.set_path_effects([effects.withStroke(linewidth=4, foreground="white")])
    axes.set_title(title)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.grid(False)
