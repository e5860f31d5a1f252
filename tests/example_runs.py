"""Running an example as a program of its own, reading what it printed and drew, and its parts as modules."""

import importlib
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
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


@contextmanager
def imported(*names):
    """Modules of the examples, which find each other in their folder; forgotten afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield [importlib.import_module(name) for name in names]
    for name in (*names, "comparing"):
        sys.modules.pop(name, None)
