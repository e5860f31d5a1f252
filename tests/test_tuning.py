"""Which configuration a launch gets: the default, what a search measured, what the file on disk holds."""

from __future__ import annotations

import interpreter  # noqa: F401 - first: it decides how Triton runs
import pytest
import torch
from fastenc.kernels import configs, device, tuning
from fastenc.kernels.dense_forward import dense_forward
from fastenc.kernels.store import STORE
from guards import DEVICE

import fastenc

X = torch.ones(4, 4, device=DEVICE)
DEFAULT = {"BLOCK": 16}
OTHERS = [{"BLOCK": size} for size in (32, 64, 128)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning.forget()
    yield tmp_path / "fastenc" / "tuning.json"
    tuning.forget()


class Launches:
    """A kernel's launcher that only notes its configurations, and the timer that looks at the last one."""

    def __init__(self, times: dict[int, float]) -> None:
        self.times = times
        self.ran: list[int] = []

    def run(self, config: configs.Config) -> None:
        self.ran.append(config["BLOCK"])

    def timer(self, launch) -> float:
        launch()
        found = self.times[self.ran[-1]]
        if isinstance(found, Exception):
            raise found
        return found

    def config(self, shape=(4, 8), x=X, name="kernel", candidates=OTHERS) -> configs.Config:
        return tuning.config_for(name, x, shape, lambda: dict(DEFAULT), lambda: list(candidates), self.run)


FAST_64 = {16: 4.0, 32: 3.0, 64: 1.0, 128: 2.0}


def test_nothing_is_measured_unless_asked():
    launches = Launches({})
    assert launches.config() == DEFAULT
    assert launches.ran == []


def test_the_fastest_is_kept():
    launches = Launches(FAST_64)
    with tuning.searching(launches.timer):
        assert launches.config() == {"BLOCK": 64}
        assert launches.config() == {"BLOCK": 64}
    assert launches.ran == [16, 32, 64, 128]  # the default first, and each once
    assert launches.config() == {"BLOCK": 64}
    tuning.forget()  # as another process
    assert launches.config() == {"BLOCK": 64}
    assert len(launches.ran) == 4


def test_the_default_wins_a_draw():
    launches = Launches(dict.fromkeys((16, 32, 64, 128), 1.0))
    with tuning.searching(launches.timer):
        assert launches.config() == DEFAULT


def test_a_search_measures_again_what_was_measured_before():
    with tuning.searching(Launches(FAST_64).timer):
        pass
    for fastest in (64, 128):
        launches = Launches({**FAST_64, fastest: 0.5})
        with tuning.searching(launches.timer):
            assert launches.config() == {"BLOCK": fastest}
        assert launches.config() == {"BLOCK": fastest}


def test_rows_count_by_powers_of_two():
    launches = Launches(FAST_64)
    with tuning.searching(launches.timer):
        launches.config((100, 8))
    for rows, found in ((65, 64), (128, 64), (64, 16), (129, 16)):
        assert launches.config((rows, 8)) == {"BLOCK": found}
    assert [tuning.bucket(M) for M in (0, 1, 2, 3, 4, 5, 4096, 4097)] == [0, 1, 2, 4, 4, 8, 4096, 8192]


def test_whatever_differs_is_another_problem(monkeypatch):
    launches = Launches(FAST_64)
    with tuning.searching(launches.timer):
        launches.config()
    assert launches.config((4, 9)) == DEFAULT
    assert launches.config((4, 8, (1, 2))) == DEFAULT
    assert launches.config(name="other") == DEFAULT
    assert launches.config(x=X.half()) == DEFAULT
    assert launches.config() == {"BLOCK": 64}
    monkeypatch.setattr(tuning, "precision", lambda dtype: "tf32")
    assert launches.config() == DEFAULT


@pytest.mark.parametrize("name", ["source_hash", "version", "gpu"])
def test_what_was_measured_elsewhere_is_not_believed(monkeypatch, name):
    """Another kernel source, another Triton, another GPU."""
    launches = Launches(FAST_64)
    with tuning.searching(launches.timer):
        launches.config()
    tuning.forget()
    if name == "source_hash":
        monkeypatch.setattr(tuning, "source_hash", lambda: "0123")
    elif name == "version":
        monkeypatch.setattr("triton.__version__", "9.9.9")
    else:
        monkeypatch.setattr(tuning, "target", lambda of: device.Target(99, 7, 100_000))
    assert launches.config() == DEFAULT
    tuning.forget()
    monkeypatch.undo()


def test_the_hash_changes_with_every_file(tmp_path):
    (tmp_path / "a.py").write_text("1")
    (tmp_path / "b.py").write_text("2")
    hashes = {tuning.source_hash(tmp_path)}
    for name, text in (("a.py", "3"), ("b.py", "4"), ("c.py", "5"), ("a.py", "3 "), ("notes.txt", "6")):
        (tmp_path / name).write_text(text)
        tuning.source_hash.cache_clear()
        hashes.add(tuning.source_hash(tmp_path))
    tuning.source_hash.cache_clear()
    assert len(hashes) == 5  # the note is no source


def test_candidates_that_fail_are_dropped():
    from triton.runtime.errors import OutOfResources

    launches = Launches({**FAST_64, 64: OutOfResources(3, 2, "shared memory"), 128: RuntimeError("ptxas")})
    with tuning.searching(launches.timer):
        assert launches.config() == {"BLOCK": 32}


def test_the_default_stays_if_nothing_runs():
    """Then the launch itself raises, and nothing is kept."""
    launches = Launches(dict.fromkeys((16, 32, 64, 128), RuntimeError("no")))
    with tuning.searching(launches.timer):
        assert launches.config() == DEFAULT
    assert STORE.entries() == {}


def test_faults_are_not_hidden():
    launches = Launches({**FAST_64, 32: AssertionError("out of bounds")})
    with pytest.raises(AssertionError, match="out of bounds"), tuning.searching(launches.timer):
        launches.config()
    launches.config()  # the search is over


def test_no_more_candidates_than_allowed():
    launches = Launches(dict.fromkeys(range(100), 1.0) | {16: 2.0})
    with tuning.searching(launches.timer):
        launches.config(candidates=[{"BLOCK": size} for size in range(100)])
    assert len(launches.ran) == configs.MAX_CANDIDATES


def test_nothing_is_measured_in_a_cuda_graph(monkeypatch):
    monkeypatch.setattr(tuning, "capturing", lambda device: True)
    launches = Launches(FAST_64)
    with tuning.searching(launches.timer):
        assert launches.config() == DEFAULT
    assert launches.ran == []


def test_capturing(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
    assert tuning.capturing(torch.device("cuda", 0))
    assert not tuning.capturing(torch.device("cpu"))


@pytest.mark.parametrize("config", [None, [], {}, {"BLOCK": "64"}, {"BLOCK": 1.5}, {"BLOCK": True}])
def test_an_entry_that_is_no_configuration(cache, config):
    launches = Launches(FAST_64)
    with tuning.searching(launches.timer):
        launches.config()
    ((key, entry),) = STORE.entries().items()
    STORE.put({key: {**entry, "config": config}})
    tuning.forget()
    assert launches.config() == DEFAULT


def test_a_file_that_cannot_be_written(cache):
    cache.parent.write_text("")
    launches = Launches(FAST_64)
    with tuning.searching(launches.timer) as search:
        launches.config()
    assert str(cache.parent) in search.unwritten
    assert launches.config() == {"BLOCK": 64}


def test_choices():
    place = torch.device(DEVICE)
    assert tuning.choice(("2.14", 64, "relu"), place) is None
    assert tuning.choose(("2.14", 64, "relu"), place, {"backend": "triton"}) is None
    tuning.forget()
    assert tuning.choice(("2.14", 64, "relu"), place) == {"backend": "triton"}
    assert tuning.choice(("2.13", 64, "relu"), place) is None


def test_a_kernel_runs_with_what_was_measured():
    """From the launcher to the file and back; and every candidate gives the right result."""
    x = torch.randint(-2, 3, (33, 20), device=DEVICE).float()
    weight = torch.randint(-2, 3, (17, 20), device=DEVICE).float()
    expected = torch.relu(x @ weight.T)
    calls = []

    def timer(launch) -> float:
        out, _ = launch()
        assert torch.equal(out, expected)
        calls.append(launch)
        return 1.0 / len(calls)  # the last is the fastest

    with tuning.searching(timer):
        dense_forward(x, weight, None, "relu", False)
    assert len(calls) > 3
    (entry,) = STORE.entries().values()
    used = []
    with pytest.MonkeyPatch.context() as patch:
        original = tuning.config_for
        patch.setattr(
            "fastenc.kernels.dense_forward.config_for", lambda *args: used.append(original(*args)) or used[-1]
        )
        with fastenc.use_backend("triton"):
            assert torch.equal(fastenc.fused_dense(x, weight), expected)
    assert used == [entry["config"]]
