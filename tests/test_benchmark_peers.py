"""Peers of other frameworks: the wire to their processes, and the peers themselves where `make bench-peers` was run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # benchmarks/ is not installed; last, for an installed fastenc to count

from planted import dense_case

from benchmarks import fit, stacks
from benchmarks.harness import Side, find_errors
from benchmarks.peers import local, remote

ROOT = Path(__file__).parents[1]
ENVIRONMENT = ROOT / ".venv-peers"
WIDTHS = (20, 16, 8)

# Answers as worker.py does; what it has "trained" is what the test has put into the task.
FAKE = """
import json, os, sys, time
import numpy as np
kind, folder = sys.argv[1:]
print("a word that is no answer", file=sys.stderr)
for line in sys.stdin:
    asked = json.loads(line)
    if kind == "jax-jit" and asked["command"] == "hello":
        answer = {"missing": "No module named 'jax'"}
    elif kind == "sklearn" and asked["command"] == "hello":
        sys.exit("Segmentation fault")
    elif kind == "keras-torch" and asked["command"] == "run":
        answer = {"error": "ValueError: no"}
    elif asked["command"] == "run":
        answer = {"ns": 1000 * asked["calls"]}
    elif asked["command"] == "check":
        data = np.load(folder + "/task.npz")["checked"]
        np.savez(folder + "/checked.npz", losses=np.float32([1, 2]), output=2 * data)
        answer = {}
    else:
        answer = {"threads": os.environ["OMP_NUM_THREADS"]}
    print(json.dumps(answer), flush=True)
"""


def test_where_epsilon_is_added_matters() -> None:
    """Or those who add it first would not need an answer of their own."""
    task, drawn = make_task()
    assert (task.epsilon_first[-1] - drawn.exact[-1]).abs().max() > 0


def make_task() -> tuple[remote.Task, fit.Drawn]:
    torch.manual_seed(0)
    drawn = fit.draw_problem(WIDTHS)
    data = torch.rand(100, WIDTHS[0])
    epsilon_first, _ = fit.train_exactly(WIDTHS, drawn.weights, drawn.x, fit.EpsilonFirst)
    task = remote.Task(
        drawn.weights, data, drawn.x, 2, 32, fit.CHECKED_EPOCHS, fit.CHECKED_BATCH, fit.LR, 1, epsilon_first
    )
    return task, drawn


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One whose Python is this one, and whose worker is the fake."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "worker.py").write_text(FAKE)
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    monkeypatch.setattr(remote, "WORKER", tmp_path / "worker.py")
    return tmp_path


def test_without_an_environment_each_peer_says_how_to_get_it() -> None:
    task, _ = make_task()
    sides = remote.sides(None, task)
    assert list(sides) == list(remote.PEERS)
    assert all(isinstance(side, str) and "make bench-peers" in side for side in sides.values())


def test_what_a_worker_says_is_heard(environment: Path) -> None:
    task, drawn = make_task()
    sides = remote.sides(environment, task)
    missing = {name: side for name, side in sides.items() if isinstance(side, str)}
    assert "No module named 'jax'" in missing["JAX, jit of the step"]
    assert "its process ended: Segmentation fault" in missing["scikit-learn MLPRegressor"]
    side = sides["JAX, jit and scan of the epoch"]
    assert isinstance(side, Side)
    assert side.sample is not None
    assert side.sample(5) == 1000
    *losses, output = side.results()
    assert [loss.item() for loss in losses] == [1, 2]
    assert torch.equal(output, 2 * drawn.x)
    broken = sides["Keras fit on torch"]
    assert isinstance(broken, Side)
    assert broken.sample is not None
    with pytest.raises(remote.PeerError, match="ValueError: no"):
        broken.sample(1)
    for each in sides.values():
        if isinstance(each, Side):
            each.close()


def test_closing_ends_the_process_and_its_files(environment: Path) -> None:
    task, _ = make_task()
    worker = remote.Worker(environment, "keras-tensorflow", task)
    assert worker.ask("hello") == {"threads": "1"}
    folder = Path(worker.folder.name)
    worker.close()
    assert worker.process.returncode is not None
    assert not folder.exists()
    with pytest.raises((remote.PeerError, ValueError)):
        worker.ask("hello")


def test_a_worker_ends_with_its_parent(environment: Path) -> None:
    """Its stdin ends then."""
    task, _ = make_task()
    worker = remote.Worker(environment, "keras-tensorflow", task)
    assert worker.process.stdin is not None
    worker.process.stdin.close()
    assert worker.process.wait(10) == 0
    worker.close()


def test_a_peer_that_hangs_is_told(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "LIMIT_S", 0.2)
    (environment / "worker.py").write_text("import time; time.sleep(60)")
    task, _ = make_task()
    side = remote.start(environment, "Keras fit on TensorFlow", task)
    assert side == "Keras fit on TensorFlow cannot be measured: it gave no answer within 0 seconds"


@pytest.mark.skipif(not (ENVIRONMENT / "bin" / "python").exists(), reason="needs make bench-peers")
@pytest.mark.parametrize("name", remote.PEERS)
def test_each_peer_trains_as_float64_does(name: str) -> None:
    task, drawn = make_task()
    side = remote.start(ENVIRONMENT, name, task)
    assert isinstance(side, Side), side
    try:
        *losses, output = side.results()
        for actual, exact in zip([*losses, output], side.exact or drawn.exact, strict=True):
            assert (actual.double() - exact).abs().max() <= exact.abs().max() * torch.finfo(torch.float32).eps ** 0.5
        assert side.sample is not None
        assert side.sample(2) > 0
    finally:
        side.close()


@pytest.mark.parametrize("peer", [local.addmm_activation, local.inductor_linear], ids=lambda f: f.__name__)
def test_peers_of_pytorch_give_the_right_answer(peer) -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(12, 8), torch.nn.Linear(8, 4)]
    x = torch.randn(16, 12)
    with torch.inference_mode():
        side = peer(layers, x)
        assert isinstance(side, Side)
        expected = torch.relu(layers[1](torch.relu(layers[0](x)))).double()
        (actual,) = side.call()
        assert (actual.double() - expected).abs().max() <= 1e-5


def test_a_peer_that_is_wrong_is_found() -> None:
    def wrong(_layers, x: torch.Tensor) -> Side:
        return local.addmm_activation([torch.nn.Linear(40, 24)], x)

    torch.manual_seed(0)
    linear, relu = torch.nn.Linear(40, 24), torch.nn.ReLU()
    fused = torch.nn.Sequential(torch.nn.Linear(40, 24), relu)
    case = dense_case(stacks.FORWARD)
    sides = stacks.stack_sides(case, 32, fused, torch.nn.Sequential(linear, relu), [linear], {"wrong": wrong})
    assert list(find_errors(sides)) == ["wrong"]
