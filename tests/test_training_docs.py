"""docs/training.md: its blocks run, one after the other, and write what they say."""

import re
from pathlib import Path

TEXT = (Path(__file__).parents[1] / "docs" / "training.md").read_text()


def test_every_block_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 10
    names = {}
    for block in blocks:
        exec(block, names)
    output = capsys.readouterr().out
    assert "[0, 1, 2, 3, 4, 5]" in output
    assert "65 of 65 steps were taken whole, by the C++ engine" in output
    assert len((tmp_path / "run.csv").read_text().splitlines()) == 7
    written = {"rates.png", "run", "run.csv", "stream", "logs", "tasks", "rows.csv"}
    assert {path.name for path in tmp_path.iterdir()} == written
