"""How many launches a call makes and how many bytes they move, counted as the kernels are interpreted.

The model of times that is made of these counts, benchmarks/roofline.py, is tested here too.
"""

import itertools
from pathlib import Path

import interpreter
import pytest
import torch
from accuracy import draw
from fastenc.kernels import device

import fastenc
from benchmarks import roofline
from fastenc.backends.rule import KERNEL, Datasheet
from fastenc.functional import encoder, fused_dense

pytestmark = [
    pytest.mark.skipif(not interpreter.INTERPRETED, reason="kernels are compiled, not counted, where there is a GPU"),
    pytest.mark.usefixtures("one_thread"),
]

STACK = (40, 32, 16, 24)


@pytest.fixture(autouse=True)
def triton():
    with fastenc.use_backend("triton"):
        yield


def launches_of(call):
    with interpreter.watched() as launches:
        result = call()
    return result, launches


def leaves_of(problem, wanted):
    leaves = problem.leaves()
    return [leaves[name].requires_grad_() for name in wanted]


def forward_of(problem):
    if len(problem.weights) == 1:
        return fused_dense(problem.x, problem.weights[0], problem.biases[0], problem.activations[0])
    return encoder(problem.x, problem.weights, problem.biases, problem.activations)


@pytest.mark.parametrize("widths", [(40, 24), STACK], ids=["dense", "encoder"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "identity"])
def test_one_launch_forward_and_at_most_three_backward(widths, activation):
    problem = draw(50, widths, activation, torch.bfloat16)
    leaves = leaves_of(problem, problem.leaves())
    out, launches = launches_of(lambda: forward_of(problem))
    assert len(launches) == 1
    _, launches = launches_of(lambda: torch.autograd.grad(out, leaves, problem.grad_out))
    assert 1 <= len(launches) <= 3


@pytest.mark.parametrize("widths", [(40, 24), STACK], ids=["dense", "encoder"])
def test_inference_writes_its_output_alone(widths):
    problem = draw(50, widths, "gelu", torch.bfloat16)
    with torch.no_grad():
        out, (launch,) = launches_of(lambda: forward_of(problem))
    assert launch.stored == out.numel() * 2
    assert launch.loaded == 2 * sum(leaf.numel() for leaf in problem.leaves().values())


@pytest.mark.parametrize("widths", [(40, 24), STACK], ids=["dense", "encoder"])
def test_a_gradient_that_is_not_asked_for_is_not_made(widths):
    """With fewer leaves, fewer bytes are stored, and fewer operations done where a product is left out."""

    def backward(*wanted):
        problem = draw(50, widths, "relu", torch.bfloat16)
        leaves = leaves_of(problem, wanted)
        out = forward_of(problem)
        _, launches = launches_of(lambda: torch.autograd.grad(out, leaves, problem.grad_out))
        return sum(launch.stored for launch in launches), sum(launch.flops for launch in launches)

    everything = backward("x", *(f"{kind}{i}" for i in range(len(widths) - 1) for kind in ("weight", "bias")))
    for wanted in (["x"], [f"weight{len(widths) - 2}"], [f"bias{len(widths) - 2}"]):
        stored, flops = backward(*wanted)
        assert stored < everything[0]
        assert flops < everything[1]
    assert backward(f"bias{len(widths) - 2}")[1] == 0


def test_frozen_layers_cost_nothing():
    """With the first two layers frozen, backward reads neither x nor the first hidden output."""
    problem = draw(64, (512, *STACK), "relu", torch.bfloat16)
    leaves = leaves_of(problem, ["weight3", "bias3"])
    out = forward_of(problem)
    _, launches = launches_of(lambda: torch.autograd.grad(out, leaves, problem.grad_out))
    assert sum(launch.loaded for launch in launches) < problem.x.numel() * 2


@pytest.mark.parametrize("arch", [80, 90])
def test_the_encoder_moves_less_than_eager(arch):
    """As users call it; and the README's table says so.

    Of the 1.36 times the least, 0.3 are partial sums that stay in the L2 cache: fewer programs would have fewer of
    them, and were measured to take longer.
    """
    M = 4096
    with device.assumed(device.TARGETS[arch]):
        launches = roofline.counted_launches(M, roofline.WIDTHS, roofline.ACTIVATIONS, torch.bfloat16)
    assert len(launches) == 4
    moved = sum(launch.bytes for launch in launches)
    least = roofline.least_bytes(M, roofline.WIDTHS, 2)
    assert moved <= 1.40 * least
    row = f"| {M:,} | fastenc, Triton | 4 | {moved / (2 * M):,.0f} | {moved / least:.2f} |"
    assert row in (Path(__file__).parents[1] / "README.md").read_text()


def test_the_least_and_what_eager_moves_are_as_stated():
    """For a row of 784-128-64-32-16: 2,048 elements at least; eager 4,192 in 21 launches. Beside that, weights."""
    M = 10**9
    assert roofline.least_bytes(M, roofline.WIDTHS, 2) // (2 * M) == 2048
    launches = roofline.eager_launches(M, roofline.WIDTHS, roofline.ACTIVATIONS, 2)
    assert len(launches) == 21
    assert sum(launch.bytes for launch in launches) // (2 * M) == 4192
    products = [2 * M * K * N for K, N in itertools.pairwise(roofline.WIDTHS)]
    of_products = sum(launch.flops for launch in launches if "mm" in launch.name)
    assert of_products == 3 * sum(products) - products[0]


def test_the_model_is_the_longer_of_both_and_a_gap():
    gpu = roofline.Gpu(Datasheet(tensor=100, plain=10, memory=1), processors=10)
    for flops, dtype, time in ((0, torch.bfloat16, 1), (2 * 10**8, torch.bfloat16, 2), (2 * 10**8, torch.float32, 20)):
        assert roofline.modelled_time(roofline.Launch("", 10**6, flops), gpu, dtype) == KERNEL + time
    for programs, time in ((1, 20), (5, 4), (10, 2), (1000, 2)):
        launch = roofline.Launch("", 10**6, 2 * 10**8, programs)
        assert roofline.modelled_time(launch, gpu, torch.bfloat16) == KERNEL + time


def test_the_table_says_that_it_is_a_model(capsys):
    assert roofline.main(["--rows", "64"]) == 0
    text = capsys.readouterr().out
    assert "MODELLED" in text
    assert "none is measured" in text
    rows = [line for line in text.splitlines() if line.startswith("| 64 |")]
    assert [row.split(" | ")[1] for row in rows] == ["least", "eager PyTorch", "fastenc, Triton"]
    columns = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(columns) == 1
    eager, ours = (row.split(" | ") for row in rows[1:])
    assert (eager[2], int(ours[2]) <= 4) == ("21", True)
