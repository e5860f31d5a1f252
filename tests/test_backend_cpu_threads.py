"""The CPU kernels and threads: the same bits for any number of them, several callers at once, and fork."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from accuracy import DTYPES, PATHS, assert_same, draw, fused, run, take_path, threads

from fastenc.activation import ACTIVATIONS

# Enough work for more than one thread, in fewer blocks of rows than threads and in more.
SHAPES = [
    (1, (1024, 1030)),
    (3, (784, 512)),
    (16, (300, 257)),
    (33, (256, 130, 70, 16)),
    (97, (200, 129)),
    (257, (128, 65, 33)),
    (2050, (65, 40, 16)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "widths"), SHAPES)
def test_bits_do_not_depend_on_the_number_of_threads(build, dtype, M, widths):
    problem = draw(M, widths, "gelu", dtype)
    with threads(1):
        expected = run(fused, problem)
    for number in (2, 3, 4):
        with threads(number):
            assert_same(run(fused, problem), expected)


@pytest.mark.parametrize("name", ["everyday", "functions"])
def test_bits_of_a_stack_do_not_depend_on_the_number_of_threads(name):
    """Of what users call, without force."""
    problem = draw(2050, (65, 40, 16), "tanh")
    with take_path(name):
        with threads(1):
            expected = run(fused, problem)
        for number in (2, 3, 4):
            with threads(number):
                assert_same(run(fused, problem), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", PATHS)
def test_bits_are_the_same_again(name, activation):
    problem = draw(257, (128, 65, 33), activation)
    with take_path(name):
        expected = run(fused, problem)
        for _ in range(3):
            assert_same(run(fused, problem), expected)


@pytest.mark.parametrize("name", ["everyday", "cpu"])
def test_callers_in_several_threads_at_once(name):
    """`use_backend` holds for a thread, and so does torch's number of threads."""
    problems = [draw(130, (40, 33, 17), "silu", seed=seed) for seed in range(4)]
    found: list[dict[str, torch.Tensor]] = [{} for _ in problems]
    start = threading.Barrier(len(problems))

    def call(i: int) -> None:
        torch.set_num_threads(1)
        with take_path(name):
            start.wait()
            for _ in range(50):
                found[i] = run(fused, problems[i])

    callers = [threading.Thread(target=call, args=(i,)) for i in range(len(problems))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for actual, problem in zip(found, problems, strict=True):
        with threads(1), take_path(name):
            assert_same(actual, run(fused, problem))


FORK = """
import os
import sys

import torch

sys.path.insert(0, sys.argv[1])
from accuracy import draw, fused, run

problem = draw(257, (128, 65, 33), "gelu")
before = run(fused, problem)  # starts torch's threads, which a child does not have
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    try:
        after = run(fused, problem)
        same = all(torch.equal(after[name], before[name]) for name in before)
    finally:
        os._exit(0 if same else 1)
_, status = os.waitpid(child, 0)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_fork_after_use(request):
    """In a program of its own: what a test process has done before must not matter."""
    folder = str(request.path.parent)
    done = subprocess.run([sys.executable, "-W", "error", "-c", FORK, folder], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
