"""examples/privacy.py at a smaller size."""

import json

from example_runs import compare, figure


def test_privacy(tmp_path):
    output, files = compare("privacy.py", tmp_path, "--epochs", 8)
    assert "899 rows trained on, 898 not; 1 seeds; delta 0.0001" in output
    assert figure(output, "epsilon none") > 0.85
    # A guess is right once in ten.
    assert 0.2 < figure(output, "epsilon 8") < figure(output, "epsilon none")
    assert files == ["privacy.png", "results.json"]
    results = json.loads((tmp_path / "results.json").read_text())
    attack = next(row for row in results if row["what"].startswith("membership"))
    assert 0.45 < attack["ours"] < attack["theirs"] < 1.0
