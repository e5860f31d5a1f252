"""The driving example: what it prints and draws at a small size, its simulation and filter, and its page."""

import importlib
import json
import re

import numpy as np
import pytest
from example_runs import EXAMPLES, compare

DOCS = EXAMPLES.parent / "docs" / "applications" / "driving.md"
PARTS = ("driving.py", "driving_pictures.py", "driving_world.py")


@pytest.fixture(scope="module")
def world():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        return importlib.import_module("driving_world")


def row(output, name):
    (line,) = (line for line in output.splitlines() if line.startswith(f"{name}  "))
    return [float(number) for number in line[len(name) :].split()]


def test_driving(tmp_path):
    output, files = compare("driving.py", tmp_path, "--epochs", 8, "--drives", 24, "--seconds", 24)
    assert files == ["faults.png", "results.json", "track.png"]
    network, known = row(output, "network, 2 s"), row(output, "filter, start known")
    assert network[0] < 40  # who knows the middle of the drives alone is 62 m off
    assert known[0] < 1
    assert all(area > 0.55 for area in row(output, "all faults"))  # a guess has 0.5
    results = json.loads((tmp_path / "results.json").read_text())
    assert [each["ours"] for each in results[2:]] == pytest.approx(
        [row(output, k)[0] for k in faults(output)], abs=6e-4
    )


def faults(output):
    return [line.split("  ")[0] for line in output.split("area under the ROC curve")[1].splitlines()[2:7]]


def test_its_parts_are_there():
    assert all((EXAMPLES / part).is_file() for part in PARTS)


def test_states_follow_the_model(world):
    drives = world.simulate(8, 30, 0)
    place, heading, speed = drives.state[..., :2], drives.state[..., 2], drives.state[..., 3]
    ahead = np.stack([np.cos(heading), np.sin(heading)], -1) * speed[..., None]
    np.testing.assert_allclose(np.diff(place, axis=1), world.STEP * ahead[:, :-1], atol=1e-9)
    middle = np.hypot(*np.moveaxis(place, -1, 0)) - world.radius(np.arctan2(place[..., 1], place[..., 0]))
    assert np.abs(middle).max() < 6  # on the road
    turn = world.wrapped(np.diff(heading, axis=1)) / world.STEP
    noise = drives.readings[:, 1:, 1] - turn
    assert np.nanstd(noise - np.nanmean(noise, axis=1, keepdims=True)) == pytest.approx(world.TURN_NOISE, rel=0.1)


def test_sensors_drop_out(world):
    readings = world.simulate(20, 60, 0).readings
    assert readings.shape == (20, 600, len(world.COLUMNS))
    gone = np.isnan(readings)
    assert 0.005 < gone[..., :2].all(2).mean() < 0.05
    assert 0.05 < gone[..., 2 : 2 + world.POSTS].all(2).mean() < 0.5
    again = world.simulate(20, 60, 0).readings
    np.testing.assert_array_equal(again, readings)


def test_faults_are_as_long_as_they_should_be(world):
    drives = world.simulate(30, 60, 0, faults=2)
    assert ((drives.fault >= 0).sum(1) == 2 * world.FAULT_LENGTH / world.STEP).all()
    assert set(np.unique(drives.fault)) == {-1, 0, 1, 2, 3}
    stuck = drives.fault == list(world.FAULTS).index("acceleration stuck")
    still = np.diff(drives.readings[..., 0], axis=1) == 0
    assert still[stuck[:, 1:] & stuck[:, :-1]].all()


def test_the_filter_is_as_sure_as_it_should_be(world, monkeypatch):
    """Without echoes, which it does not expect, its normalised innovations squared have mean 1."""
    monkeypatch.setattr(world, "ECHOES", 0.0)
    drives = world.simulate(40, 60, 1)
    start = np.column_stack([drives.state[:, 0], np.zeros(40)])
    states, total, count = world.run_filter(drives, start, np.array([0.1, 0.1, 0.01, 0.1, world.TURN_BIAS]), 1)
    assert total.sum() / count.sum() == pytest.approx(1.0, abs=0.1)
    apart = np.hypot(*np.moveaxis((states[..., :2] - drives.state[..., :2])[:, 1:], -1, 0))
    assert np.median(apart) < 2 * world.RANGE_NOISE


def test_its_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert len(blocks) == 1
    exec(blocks[0], {})
    assert "(30, 16)" in capsys.readouterr().out
