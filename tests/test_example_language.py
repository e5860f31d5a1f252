"""The language example at a small size: its tables, its pictures, and the figures for the table of all examples."""

import json

from example_runs import compare, figure

WAYS = ("TF-IDF", "frozen", "fine-tuned", "both: fine-tuned, TF-IDF")


def test_language(tmp_path):
    output, files = compare("language.py", tmp_path, "--epochs", 4, "--functions", 50, "--no-pretrained")
    accuracy, rank = output.split("mean reciprocal rank in search", 1)
    for row in WAYS:
        assert 0.15 < figure(accuracy, row) < 1.0  # a guess is right once in ten
    for row in WAYS:
        assert 0.04 < figure(rank, row) < 1.0  # a guess among about 165 has 0.034
    assert files == ["accuracy.png", "map.png", "results.json", "search.png"]
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["beside"] for row in rows] == ["TF-IDF"] * 4
