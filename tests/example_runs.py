"""Running an example as a program of its own, and reading what it printed and drew."""

import os
import subprocess
import sys
from pathlib import Path

from matplotlib.image import imread

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name, *args):
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), *map(str, args)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    return result


def compare(name, out, *args):
    output = run(name, "--out", out, "--seeds", 1, *args).stdout
    for path in out.glob("*.png"):
        assert imread(path)[..., :3].std() > 0.05  # not blank
    return output, sorted(path.name for path in out.iterdir())


def figure(output, row):
    """The first number in the table's row of this name."""
    (line,) = (line for line in output.splitlines() if line.startswith(f"{row} "))
    return float(line[len(row) :].split()[0])
