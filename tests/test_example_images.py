"""The example of pictures in folders, at a small size."""

import json

from example_runs import compare, figure
from matplotlib.image import imread


def test_images(tmp_path):
    output, files = compare("images.py", tmp_path, "--epochs", 20, "--rows", 500)
    assert "350 pictures of 14 to 42 pixels a side to train on, scored on 150; 1 seeds" in output
    assert figure(output, "convolutional stem and dense encoder") > 0.5  # a guess is right once in ten
    assert files == ["accuracy.png", "pictures.png", "results.json"]
    assert (imread(tmp_path / "pictures.png")[..., :3].mean(2) < 0.3).mean() > 0.15  # the pictures themselves are dark
    (row,) = json.loads((tmp_path / "results.json").read_text())
    assert row["ours"] > 0.5
