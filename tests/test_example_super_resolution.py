"""Super-resolution as a program, at a smaller size; and that its patches fit together again."""

import json

import numpy as np
import pytest
import torch
from example_runs import compare, figure, imported


def test_super_resolution(tmp_path):
    output, files = compare("super_resolution.py", tmp_path, "--epochs", 1)
    temple, flower = output.split("\nflower\n")
    assert "temple, right third" in temple
    for part in (temple, flower):
        bicubic, ours = figure(part, "bicubic"), figure(part, "fused encoder")
        assert 20 < bicubic < ours < 50
        assert bicubic < figure(part, "linear, of the same patches")
    assert files == ["photograph.png", "results.json"]
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["what"].split(", ")[-1] for row in rows] == ["PSNR in dB", "SSIM"] * 2
    assert all(row["ours"] > row["theirs"] for row in rows)


@pytest.fixture
def example():
    with imported("super_resolution") as (super_resolution,):
        yield super_resolution


def test_with_all_that_is_missing_a_photograph_is_the_original(example):
    photograph = example.Photograph(np.random.default_rng(0).integers(0, 256, (21, 34, 3), np.uint8))
    assert photograph.low.shape == (3, 10, 17)
    x, missing = photograph.patches()
    assert (x.shape, missing.shape) == ((170, 81), (170, 4))
    assert torch.equal(photograph.improved(missing), photograph.high[0])
    assert photograph.scores(photograph.high[0])[1] == pytest.approx(1)
    # The middle of a patch is its own pixel, and what is left of it its left neighbour.
    luma = photograph.low[0].flatten()
    assert not x[:, 40].any()
    assert torch.equal(x[1:17, 39], luma[:16] - luma[1:17])


def test_turning_patches_is_turning_the_photograph(example):
    """Each of the eight ways gives the rows that the turned photograph has, but for rounding at half the size."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    x, y = example.Photograph(pixels).patches()
    xs, ys = example.turned(x, y)
    assert len(xs) == len(ys) == 8 * len(x)
    for way in range(8):
        there = np.rot90(pixels, way // 2)
        there = there[:, ::-1] if way % 2 else there
        of_x, of_y = example.Photograph(np.ascontiguousarray(there)).patches()
        rows = torch.arange(100).view(10, 10).rot90(way // 2, (0, 1))
        rows = (rows.flip(1) if way % 2 else rows).flatten() + way * 100
        # An 8-bit step at half the size, and what bicubic makes of it (its weights' sizes sum to less than 2).
        assert (xs[rows] - of_x).abs().max() <= 2 / 255 + 1e-6
        assert (ys[rows] - of_y).abs().max() <= 2 / 255 + 1e-6
