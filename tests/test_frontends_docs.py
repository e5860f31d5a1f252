"""docs/frontends.md: its block runs and gives what it says."""

import re
from pathlib import Path

TEXT = (Path(__file__).parents[1] / "docs" / "frontends.md").read_text()


def test_the_block_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names = {}
    exec(block, names)
    assert names["vectors"].shape == (40, 8)
    assert (tmp_path / "model" / "model.safetensors").is_file()
