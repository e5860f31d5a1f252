"""setup.py: what it builds, what it leaves out and says, and that no machine is refused the package."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

import pytest
import torch
from building import EAGER, ROOT, build, copy_sources, python, said, unpack

GIGABYTE = 1e9


@pytest.fixture(scope="module")
def setup():
    """The functions of setup.py."""
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.fixture
def in_root(monkeypatch):
    """setup.py runs in its folder, and sets what torch and setuptools read from the environment."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CXX", "c++")
    monkeypatch.setenv("MAX_JOBS", "1")


@pytest.mark.parametrize(
    ("cores", "gigabytes", "jobs"),
    [(1, 64, 1), (8, 64, 8), (8, 6.1, 4), (8, 1, 1), (8, 0, 1), (64, float("inf"), 64)],
)
def test_default_jobs(setup, monkeypatch, cores, gigabytes, jobs):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    monkeypatch.setitem(setup["default_jobs"].__globals__, "free_memory", lambda: gigabytes * GIGABYTE)
    assert setup["default_jobs"]() == jobs


def test_free_memory(setup, monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda path: "MemTotal: 9000 kB\nMemFree: 1 kB\nMemAvailable:   4000 kB\n")
    assert setup["free_memory"]() == 4000 * 1024  # what caches hold can be had
    monkeypatch.setattr(Path, "read_text", lambda path: "")
    assert setup["free_memory"]() == float("inf")


def test_max_jobs_of_the_user_counts(setup, in_root):
    setup["extension_arguments"]("auto")
    assert os.environ["MAX_JOBS"] == "1"


def test_a_visible_gpu_changes_nothing(setup, in_root, monkeypatch):
    def described():
        arguments = setup["extension_arguments"]("auto")
        return [(ext.name, ext.sources, ext.extra_compile_args, ext.libraries) for ext in arguments["ext_modules"]]

    without = described()
    for name, answer in {"is_available": True, "device_count": 8, "get_device_capability": (9, 0)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, answer=answer: answer)
    assert described() == without
    assert [name for name, *_ in without] == ["fastenc._C", f"fastenc.{EAGER}"]


def test_extension_0(setup, in_root, capsys):
    assert setup["extension_arguments"]("0") == {}
    assert capsys.readouterr().err == "fastenc: no extension built, as FASTENC_EXTENSION=0 asks\n"


def test_extension_that_is_neither_0_nor_1(setup):
    with pytest.raises(SystemExit, match="FASTENC_EXTENSION is 'yes'; set it to 0 or 1"):
        setup["extension_arguments"]("yes")


@pytest.mark.parametrize("command", ["no-such-compiler", "no-such-compiler -pthread"])
def test_extension_1_without_a_compiler(setup, in_root, monkeypatch, command):
    monkeypatch.setenv("CXX", command)
    with pytest.raises(SystemExit, match="FASTENC_EXTENSION=1, but there is no C\\+\\+ compiler"):
        setup["extension_arguments"]("1")


def test_compilers_are_tried_in_turn(setup, monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup["find_compiler"]() is None
    for name in ("clang++", "g++", "c++"):
        (tmp_path / name).touch(mode=0o755)
        assert setup["find_compiler"]() == name


USE = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fastenc, torch
    assert not caught, caught[0].message
    layer = fastenc.FusedDense(3, 2)
    x = torch.arange(15.0).reshape(5, 3)
    for parameter in layer.parameters():  # integers: every sum is exact, whatever its order
        parameter.data = torch.arange(float(parameter.numel())).reshape(parameter.shape) - 3
    for _ in range(3):
        assert torch.equal(layer(x), torch.relu(torch.nn.functional.linear(x, layer.weight, layer.bias)))
        fastenc.Encoder(3, (4, 2))(x).sum().backward()
print(fastenc.__file__)
print(*(warning.message for warning in caught), sep="\\n")
"""


def test_without_a_compiler_it_installs_runs_and_warns_once(tmp_path):
    folder = copy_sources(tmp_path / "checkout")
    sentences = said(build(folder, "setup.py", "--quiet", "bdist_wheel", compiler=False))
    assert sentences == [
        "fastenc: no extension built: there is no C++ compiler; install g++ or clang++, or set CXX; "
        "fastenc will run on eager PyTorch"
    ]
    installed = unpack(folder / "dist", tmp_path / "installed")
    assert not list(installed.rglob("*.so"))
    result = python(USE, installed)
    assert result.returncode == 0, result.stderr
    where, *warned = result.stdout.splitlines()
    assert Path(where).parent.parent == installed
    assert len(warned) == 1
    assert "fastenc runs on eager PyTorch: the C++ extension fastenc._C is not built" in warned[0]
    assert "C++ compiler" in warned[0]


def test_what_does_not_compile_is_left_out_with_a_reason(tmp_path):
    folder = copy_sources(tmp_path / "checkout")
    in_place = folder / "fastenc"
    stale = in_place / f"{EAGER}.abi3.so"
    stale.touch()
    command = ("setup.py", "--quiet", "build_ext", "--inplace")

    built, left_out = said(build(folder, *command, REFUSED="eager.cpp"))
    assert built.startswith("fastenc: built with ")
    assert built.endswith(": the CPU kernels (for torch 2.13 and newer)")
    assert f"left out: their autograd in C++ (for torch {torch.__version__}" in left_out
    assert left_out.endswith("autograd runs in Python")
    assert (in_place / "_C.abi3.so").read_bytes().startswith(b"\x7fELF")
    assert not stale.exists()  # from other sources than the kernels beside it

    with pytest.raises(AssertionError, match="this source is refused"):
        build(folder, *command, REFUSED="eager.cpp", FASTENC_EXTENSION="1")

    (sentence,) = said(build(folder, *command))
    assert "the CPU kernels" in sentence
    assert f"for torch {torch.__version__}" in sentence
    assert stale.read_bytes().startswith(b"\x7fELF")
