"""examples/scale.py at a smaller size."""

import json
import re
import sys

import pytest
from example_runs import run
from matplotlib.image import imread


@pytest.mark.skipif(sys.platform != "linux", reason="the limit, and what is read in /proc, are Linux's")
def test_scale(tmp_path):
    output = run("scale.py", "--out", tmp_path, "--megabytes", 150).stdout
    assert "153,600 rows of 256 numbers: 150 MB; memory may grow by 75 MB" in output
    assert "a copy of the rows: refused by the system" in output
    loss = float(re.search(r"2 passes in .* loss (\S+) \(the least is 0\.9688\), by: .* the C\+\+ engine", output)[1])
    assert 0.95 < loss < 2.0  # the variance is 9: the hidden numbers are learned
    assert "2 processes share every batch" in output
    # In float64, where only the order of sums differs: the same in all of float32's digits.
    assert float(re.search(r"the losses differ by (\S+) of themselves", output)[1]) < 2**-24
    rows = json.loads((tmp_path / "results.json").read_text())
    assert rows[0]["ours"] < 75 < rows[0]["theirs"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory.png", "results.json"]
    assert imread(tmp_path / "memory.png")[..., :3].std() > 0.05  # not blank
