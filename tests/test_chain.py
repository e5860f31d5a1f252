"""What chain() reads in C++ (csrc/steps.h) is what plan() says: of usual steps the same stack, of others nothing."""

from __future__ import annotations

import functools
import gc
import itertools
import random
import sys

import pytest
import torch
from integrated import MODULES
from torch import nn
from torch.nn import functional as F

from fastenc import FusedDense
from fastenc.backends import cpu
from fastenc.convert import chain as chains

USUAL = [
    *(make for name, make in MODULES.items() if name != "identity"),
    lambda: F.relu,
    lambda: torch.tanh,
    lambda: F.gelu,
    lambda: "sigmoid_",
    lambda: nn.Linear(4, 4),
    lambda: nn.Linear(4, 4, bias=False),
    lambda: FusedDense(4, 4, activation="silu"),
    lambda: FusedDense(4, 4, activation="identity"),
]
UNUSUAL = [
    nn.Identity,
    lambda: nn.Dropout(0.5),
    lambda: nn.LayerNorm(4),
    lambda: nn.LeakyReLU(0.2),
    lambda: functools.partial(F.gelu, approximate="tanh"),
    lambda: (F.leaky_relu, (0.01,), {}),
    lambda: "exp",
    lambda: torch.exp,
]


@pytest.fixture
def reader():
    if reason := cpu.why_unavailable():
        pytest.skip(reason)
    return chains._reader()


def planned(steps):
    """What plan() says of steps that are one Run and nothing beside; None of others."""
    parts = chains.plan(steps)
    if len(parts) != 1 or type(parts[0]) is not chains.Run:
        return None
    layers, activations = parts[0]
    return [layer.weight for layer in layers], [layer.bias for layer in layers], activations


def same(read, said):
    if read is None or said is None:
        return read is said
    (weights, biases, names), (said_weights, said_biases, said_names) = read, said
    pairs = zip([*weights, *biases], [*said_weights, *said_biases], strict=True)
    return list(names) == said_names and all(one is other for one, other in pairs)


def test_up_to_three_usual_steps(reader):
    for count in (1, 2, 3):
        for makers in itertools.product(USUAL, repeat=count):
            steps = tuple(make() for make in makers)
            # An activation with no layer before it, or after another, is a part of its own for both.
            assert same(reader.read(steps), planned(steps)), steps


def test_longer_lists_with_others_among_them(reader):
    draw = random.Random(0)
    stacks = 0
    for _ in range(2000):
        steps = tuple(draw.choice(USUAL if draw.random() < 0.95 else UNUSUAL)() for _ in range(draw.randint(2, 8)))
        said, read = planned(steps), reader.read(steps)
        if all(type(step) in (nn.Linear, FusedDense) or chains.activation_of(step) for step in steps):
            stacks += said is not None
            # Options given in a call, and what drops nothing, are left to plan().
            assert same(read, said) or (read is None and any(type(s) in (functools.partial, tuple) for s in steps))
        else:
            assert read is None or same(read, said), steps
    assert stacks > 50


def hooked(register):
    return lambda module: getattr(module, register)(lambda *_: None)


@pytest.mark.parametrize("changed", [0, 1])
@pytest.mark.parametrize(
    "change",
    [
        hooked("register_forward_hook"),
        hooked("register_forward_pre_hook"),
        hooked("register_full_backward_hook"),
        hooked("register_full_backward_pre_hook"),
        lambda module: setattr(module, "forward", lambda x: x),
        lambda module: module.compile(),
        lambda module: setattr(module, "__class__", type("Own", (type(module),), {})),
    ],
    ids=["forward hook", "forward pre-hook", "backward hook", "backward pre-hook", "forward", "compile", "subclass"],
)
def test_a_step_that_is_changed_is_not_read(reader, change, changed):
    steps = (nn.Linear(4, 4), nn.ReLU())
    assert reader.read(steps) is not None
    change(steps[changed])
    assert reader.read(steps) is None
    assert planned(steps) is None


@pytest.mark.parametrize(
    "weight",
    [
        torch.randn(4, 4).to_sparse(),
        torch.randn(4, 4).to_mkldnn(),
        torch.randn(4, 4).as_subclass(type("T", (torch.Tensor,), {})),
    ],
    ids=["sparse", "mkldnn", "subclass"],
)
def test_a_weight_of_another_kind_is_not_read(reader, weight):
    layer = nn.Linear(4, 4)
    layer._parameters["weight"] = weight
    assert reader.read((layer, nn.ReLU())) is None
    assert planned((layer, nn.ReLU())) is None
    del layer._parameters["weight"]
    assert reader.read((layer, nn.ReLU())) is None


def test_reading_keeps_no_references(reader):
    steps = (nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Dropout())

    def counts():
        gc.collect()
        state = [step.__dict__ for step in steps]
        watched = [*steps, *state, steps[0].weight, steps[0].bias, nn.Linear, nn.ReLU, torch.strided]
        return [sys.getrefcount(each) for each in watched]

    reader.read(steps[:3])
    before = counts()
    for _ in range(1000):
        reader.read(steps[:3])
        reader.read(steps)
    assert counts() == before
