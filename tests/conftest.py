"""Fixtures that the tests of the layers share."""

import accuracy
import pytest
import torch

import fastenc
from fastenc.backends import cpu

BUILDS = {
    "avx512-brgemm": ("avx512", True),
    "avx512": ("avx512", False),
    "avx2": ("avx2", False),
    "generic": ("generic", False),
}


@pytest.fixture
def one_thread():
    """On a busy machine a parallel region costs thousands of times what these small shapes do."""
    with accuracy.threads(1):
        yield


@pytest.fixture
def step_by_step():
    """Training by one operation after another: the engine's sums differ in the last bits."""
    with fastenc.use_backend("reference"):
        yield


@pytest.fixture
def always_fused():
    """Fuse whatever the CPU's kernels take, so that tests are the same on every CPU."""
    with fastenc.use_backend("cpu"):
        yield


@pytest.fixture
def fresh_compiler():
    """torch.compile without what it compiled for other tests."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(params=accuracy.PATHS)
def path(request):
    """Each of the ways that run the layers on plain tensors."""
    with accuracy.take_path(request.param):
        yield request.param


@pytest.fixture(params=BUILDS, scope="module")
def build(request):
    """Each build of the kernels that this CPU can run, and the kernels even where eager PyTorch is faster."""
    isa, brgemm = BUILDS[request.param]
    try:
        description = cpu.configure(isa, brgemm)
    except ValueError as error:
        pytest.skip(str(error).splitlines()[0])
    assert description.startswith(isa)
    assert ("no brgemm" in description) == (not brgemm)
    with fastenc.use_backend("cpu"):
        yield request.param
    cpu.configure("auto", True)
