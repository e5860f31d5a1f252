"""Pictures are written without a display, and show what they were given."""

import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from fastenc import plots


@pytest.fixture
def axes():
    return Figure().add_subplot()


def test_losses(axes):
    plots.draw_losses(axes, {"loss": [3.0, 2.0, 1.0], "val_loss": [4.0, 3.0, 2.0]}, ("PCA", 1.5))
    assert [line.get_label() for line in axes.lines] == ["training", "validation", "PCA"]
    assert axes.lines[0].get_xdata().tolist() == [1, 2, 3]
    assert axes.lines[1].get_ydata().tolist() == [4, 3, 2]


def test_losses_without_validation(axes):
    plots.draw_losses(axes, {"loss": [3.0]})
    assert [line.get_label() for line in axes.lines] == ["training"]


def test_images(axes):
    first, second = np.zeros((4, 3, 2)), np.full((4, 3, 2), 0.5)
    plots.draw_images(axes, {"zeros": first, "halves": second}, "title")
    drawn = axes.images[0].get_array()
    assert drawn.shape == (2 * 5, 4 * 4)  # a border of one pixel around each
    assert drawn.data[1, 1] == 0
    assert drawn.data[6, 1] == 0.5
    assert [label.get_text() for label in axes.get_yticklabels()] == ["zeros", "halves"]


def test_map(axes):
    points = np.array([[0.0, 0.0], [2.0, 0.0], [9.0, 9.0]])
    plots.draw_map(axes, points, np.array([4, 4, 7]), "title")
    assert [(text.get_text(), text.get_position()) for text in axes.texts] == [("4", (1.0, 0.0)), ("7", (9.0, 9.0))]
    assert len({tuple(group.get_facecolor()[0]) for group in axes.collections}) == 2


def test_ten_labels_have_ten_colours():
    assert len(set(plots.TEN_COLOURS)) == 10


def test_saving_leaves_pyplot_and_its_style_alone(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.save_plot(lambda axes: axes.plot([1, 2]), tmp_path / "plot.png", size=(4, 2))
    assert imread(tmp_path / "plot.png").shape == (2 * plots.DPI, 4 * plots.DPI, 4)
    assert dict(matplotlib.rcParams) == before


def test_without_matplotlib_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "fastenc\[app\]"'):
        plots.save_plot(lambda axes: None, tmp_path / "plot.png")
