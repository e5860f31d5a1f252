"""examples/personalised.py at a smaller size."""

import json

from example_runs import compare, figure


def test_personalised(tmp_path):
    output, files = compare("personalised.py", tmp_path, "--epochs", 20)
    assert "12 users with 30 rows each; accuracy on their other rows; 1 seeds" in output
    shared = figure(output, "shared model ")
    adapters = figure(output, "shared model and adapters of rank 4")
    assert 0.2 < shared < adapters < 1.0  # a guess is right once in ten
    assert figure(output, "a model for each user, from scratch") > 0.2
    assert files == ["results.json", "users.png"]
    rows = json.loads((tmp_path / "results.json").read_text())
    assert rows[2]["ours"] < rows[2]["theirs"] / 3  # bytes
