"""The load test of `fastenc serve` runs, and its table has what it says."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1]))  # benchmarks/ is not installed; last, for an installed fastenc to count

from benchmarks import serve


def test_the_load_test_prints_a_table(capsys):
    assert serve.main(["--seconds", "0.3", "--clients", "1", "6", "--models", "64-128-64-32-16"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 64")]
    assert len(lines) == 4
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[1:3] for row in cells] == [["1", "joined"], ["6", "joined"], ["1", "one by one"], ["6", "one by one"]]
    for row in cells:
        rate, p50, p99, joined, cpu = (float(cell.replace(",", "")) for cell in row[3:])
        assert rate > 0
        assert 0 < p50 <= p99
        assert joined >= 1
        assert cpu > 0
    assert float(cells[0][6]) == float(cells[2][6]) == float(cells[3][6]) == 1.0  # nobody to join, or not allowed to


def test_figures_are_of_the_latencies():
    load = serve.Load(np.linspace(0.001, 0.101, 101), 2.0)
    assert load.cells() == ["50", "51.00", "100.00"]


@pytest.mark.parametrize("option", [["--seconds", "0"], ["--clients", "0"], ["--models", "1-2"]])
def test_bad_options(option, capsys):
    with pytest.raises(SystemExit) as error:
        serve.main(option)
    assert error.value.code == 2
