"""The table of all applications: which programs it runs, and what it makes of their figures."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from example_runs import EXAMPLES

sys.path.insert(0, str(EXAMPLES))
import everything

ROWS = [
    {"what": "accuracy", "ours": 0.91, "beside": "k-mers", "theirs": 0.8, "higher": True},
    {"what": "error, m", "ours": 0.5, "beside": "a filter", "theirs": 0.4, "higher": False},
]


def test_every_program_has_its_page():
    for program, page in everything.PROGRAMS.items():
        assert (EXAMPLES / f"{program}.py").is_file()
        assert (everything.PAGES / f"{page}.md").is_file()
    pages = {path.stem for path in everything.PAGES.glob("*.md")}
    assert pages == {*everything.PROGRAMS.values(), "README", "interpretability"}  # a command, not a program


def test_the_docs_table_has_every_program():
    text = (everything.PAGES / "README.md").read_text()
    for program, page in everything.PROGRAMS.items():
        assert f"| [{program}]({page}.md) |" in text


def test_cells():
    assert everything.cells("motifs", ROWS[0]) == ("motifs", "accuracy", "0.91", "k-mers", "0.8", "better")
    assert everything.cells("motifs", ROWS[1])[-1] == "worse"
    assert everything.cells("motifs", {**ROWS[1], "ours": 0.3})[-1] == "better"
    assert everything.cells("motifs", {**ROWS[1], "ours": 0.4})[-1] == "even"


@pytest.mark.parametrize("fails", [False, True])
def test_the_program(tmp_path, fails):
    (tmp_path / "motifs.py").write_text(
        "import json, pathlib, sys\n"
        f"sys.exit({int(fails)}) if {fails} else None\n"
        "out = pathlib.Path(sys.argv[2])\n"
        "out.mkdir(parents=True)\n"
        f"(out / 'results.json').write_text(json.dumps({ROWS!r}))\n"
    )
    (tmp_path / "everything.py").write_text(Path(everything.__file__).read_text())
    command = [sys.executable, str(tmp_path / "everything.py"), "--only", "motifs", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == int(fails), result.stderr
    assert ("motifs failed" in result.stderr) == fails
    assert [word in result.stdout for word in ("better", "worse")] == [not fails] * 2
