"""tune(): what is measured, what is kept, and what it changes; with timers that tell what they are told."""

from __future__ import annotations

import re
import subprocess
import sys

import emulated
import interpreter
import pytest
import torch
from fastenc.kernels.store import STORE
from guards import DEVICE
from typer.testing import CliRunner

import fastenc
from fastenc import cli, ops
from fastenc import tune as tune_function
from fastenc.backends import choice, cuda, triton
from fastenc.cli import machine

tune = sys.modules["fastenc.tune"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cuda, "why_unavailable", lambda: "it is not measured here")
    choice.forget()
    yield tmp_path / "fastenc" / "tuning.json"
    choice.forget()


@pytest.fixture
def auto_on_this_device(monkeypatch):
    """As if `auto` were asked for tensors of a GPU."""
    monkeypatch.setitem(ops._ON_DEVICE, "cpu", [triton])
    monkeypatch.setattr("fastenc.functional.ops.everyday", lambda: None)


def timers(ours: float, eagers: float, launches: list | None = None) -> tune.Timers:
    """Each side's time in milliseconds; every call runs once."""

    def step(call) -> float:
        with interpreter.watched() as launched:
            call()
        return ours if launched else eagers

    def launch(call) -> float:
        call()
        if launches is not None:
            launches.append(call)
        return 1.0

    return tune.Timers(launch, step, lambda call: 2 * step(call))


def encoder(**options) -> fastenc.Encoder:
    return fastenc.Encoder(20, (16, 8), device=DEVICE, **options)


X = torch.ones(24, 20, device=DEVICE)


def test_the_table():
    result = tune_function(encoder(), X, timers(0.002, 0.004))
    assert [c.microseconds for c in result.comparisons] == [{"eager": 4, "triton": 2}] * 2 + [
        {"eager": 8, "triton": 4}
    ] * 2
    heading, *lines = str(result).splitlines()
    assert heading.split() == ["eager", "us", "triton", "us", "choice"]
    assert {line.index("triton") for line in lines} == {heading.index("choice")}
    assert [re.split(r"\s\s+", line) for line in lines] == [
        ["24 rows, 20-16-8, relu, float32, inference", "4.0", "2.0", "triton"],
        ["24 rows, 20-16-8, relu, float32, training", "4.0", "2.0", "triton"],
        ["24 rows, 20-16-8, relu, float32, inference in a CUDA graph", "8.0", "4.0", "triton"],
        ["24 rows, 20-16-8, relu, float32, training in a CUDA graph", "8.0", "4.0", "triton"],
    ]


@pytest.mark.parametrize(
    ("ours", "eagers", "backend"), [(1, 2, "triton"), (2, 1, "eager PyTorch"), (1, 1, "eager PyTorch")]
)
@pytest.mark.parametrize("training", [False, True])
def test_what_was_measured_goes_before_the_rule(auto_on_this_device, ours, eagers, backend, training):
    model = encoder()
    tune_function(model, X, timers(ours, eagers))
    choice.forget()  # as another process
    for rows, measured in ((24, True), (17, True), (16, False)):  # as many rows up to a power of two
        with ops.record() as decisions, torch.set_grad_enabled(training):
            model(X[:rows])
        of_stack = decisions[0]
        times = f"measured, in us: eager PyTorch {eagers * 1000:.4g}, triton {ours * 1000:.4g}"
        assert (times in of_stack.reason) == measured
        assert of_stack.backend == backend or not measured


@pytest.mark.skipif(not emulated.EMULATED, reason="what is slow and what is fast is for the test to say")
@pytest.mark.parametrize("fastest", ["eager", "cuda", "triton"])
def test_all_that_are_usable_are_measured(auto_on_this_device, monkeypatch, fastest):
    monkeypatch.setattr(cuda, "why_unavailable", lambda: None)
    monkeypatch.setitem(ops._ON_DEVICE, "cpu", [cuda, triton])

    def step(call) -> float:
        call()
        return 0.001 if ops._forced.get().replace("auto", "eager") == fastest else 0.002

    model = encoder()
    result = tune_function(model, X, tune.Timers(lambda call: 1.0, step, step))
    assert [list(c.microseconds) for c in result.comparisons] == [["eager", "cuda", "triton"]] * 4
    assert [c.choice for c in result.comparisons] == [fastest] * 4
    choice.forget()  # as another process
    with ops.record() as decisions:
        model(X)
    assert decisions[0].backend == fastest.replace("eager", "eager PyTorch")
    assert "measured, in us: " in decisions[0].reason


def test_every_kernel_is_searched():
    launches: list = []
    tune_function(encoder(), X, timers(1, 2, launches))
    kernels = {key.split("|")[-1].split(" ")[0] for key in STORE.entries() if key.startswith("config|")}
    assert {"encoder_forward", "weight_gradient"} < kernels
    assert len(launches) > 10
    tuned = [entry["config"] for entry in STORE.entries().values() if "config" in entry]
    assert all(tuned)


def test_every_layer_of_a_model_once():
    layer = fastenc.FusedDense(20, 20, device=DEVICE)
    model = torch.nn.Sequential(layer, layer, encoder())
    result = tune_function(model, X, timers(1, 2))
    assert [c.problem.split(", ")[1] for c in result.comparisons] == ["20-20"] * 4 + ["20-16-8"] * 4


def test_layers_without_biases():
    result = tune_function(encoder(bias=False), X, timers(1, 2))
    assert len(result.comparisons) == 4


def test_what_the_kernels_do_not_take_is_said():
    result = tune_function(encoder(dtype=torch.float64), X.double(), timers(1, 2))
    assert result.comparisons == ()
    assert "not measured: 24 rows, 20-16-8, float64: eager PyTorch (triton: the kernels take fp32" in str(result)


def test_the_model_and_random_numbers_are_as_before():
    model = encoder(dropout=0.5)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    tune_function(model, X, timers(1, 2))
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert ops._forced.get() == "auto"


def test_a_cache_that_cannot_be_written_is_said(cache):
    cache.parent.write_text("")
    result = tune_function(encoder(), X, timers(1, 2))
    assert f"kept for this process only, as the cache cannot be written: {cache.parent}" in str(result)
    assert len(result.comparisons) == 4


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(triton, "why_unavailable", lambda: "there is none")
    with pytest.raises(RuntimeError, match="backend 'triton' is not available: there is none"):
        tune_function(encoder(), X)


# The command line.


def run(*args: str):
    return CliRunner().invoke(cli.app, list(args), catch_exceptions=False)


def test_command_without_a_gpu(monkeypatch):
    monkeypatch.setattr(triton, "why_unavailable", lambda: "there is none")
    result = run("tune", "--in-features", "784")
    assert result.exit_code == 1
    assert result.output == "fastenc: there is nothing to tune here: there is none\n"


def test_command_measures_each_batch_and_info_shows_it(monkeypatch):
    monkeypatch.setattr(machine, "measure", lambda model, x: tune_function(model, x, timers(0.5, 1)))
    args = ["--in-features", "20", "--widths", "16,8", "--batch", "3,5", "--dtype", "fp16", "--activation", "gelu"]
    result = run("tune", *args)
    assert result.exit_code == 0
    for rows in (3, 5):
        assert f"{rows} rows, 20-16-8, gelu, float16, training  " in result.output
    output = run("info").output
    assert f"{STORE.path}: " in output
    assert "configurations and 8 choices for this GPU" in output
    line = "3 rows, 20-16-8, gelu, float16, inference: triton (eager 1000 us, triton 500 us)"
    assert sum(line in found for found in output.splitlines()) == 1
    output = run("info", "--clear-cache").output
    assert output.startswith(f"removed {STORE.path}\n")
    assert "0 configurations and 0 choices for this GPU, of 0 entries" in output


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--batch", "32,x"], "write for example 32,4096"),
        (["--batch", "0"], "write for example 32,4096"),
        (["--widths", ""], "128,64,32,16"),
        (["--dtype", "fp8"], "fp32, bf16, fp16"),
        (["--activation", "sinus"], "gelu_tanh"),
        (["--in-features", "0"], "--in-features"),
    ],
)
def test_wrong_options(option, words):
    result = run("tune", "--in-features", "20", *option)
    assert result.exit_code == 2
    assert words in result.output


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_program_without_a_gpu(monkeypatch):
    """A process of its own, in which nothing is interpreted."""
    monkeypatch.delenv("TRITON_INTERPRET")
    command = [sys.executable, "-m", "fastenc", "tune", "--in-features", "784"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stderr.startswith("fastenc: there is nothing to tune here: this PyTorch has no ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
