"""setup.py: what it builds, what it leaves out and says, and that no machine is refused the package."""

from __future__ import annotations

import glob
import os
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from building import EAGER, EXTENSION_SUFFIX, ROOT, build, copy_sources, make_toolkit, python, said, unpack
from setuptools import Extension
from torch.utils import cpp_extension

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
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "")  # setup.py's own choice ends here, too


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
    setup["extension_arguments"]("auto", "0")
    assert os.environ["MAX_JOBS"] == "1"


@pytest.fixture
def toolkits(in_root, monkeypatch, tmp_path):
    """A torch with CUDA 13.0, and a function that prefers a toolkit of a release, or takes all away."""

    def prefer(release: str | None) -> Path:
        home = tmp_path / f"cuda-{release}"
        monkeypatch.setenv("CUDA_HOME", str(make_toolkit(home, release) if release else home))
        return home

    monkeypatch.setattr(torch, "__version__", "2.14.0+cu130")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    monkeypatch.setenv("PATH", os.pathsep.join(path for path in os.get_exec_path() if not Path(path, "nvcc").exists()))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    glob = Path.glob  # finds those in /usr/local, too
    monkeypatch.setattr(Path, "glob", lambda *args: (path for path in glob(*args) if tmp_path in path.parents))
    return prefer


def test_a_visible_gpu_changes_nothing(setup, toolkits, monkeypatch):
    toolkits("13.0")

    def described():
        arguments = setup["extension_arguments"]("auto", "auto")
        return [(ext.name, ext.sources, ext.extra_compile_args, ext.libraries) for ext in arguments["ext_modules"]]

    without = described()
    for name, answer in {"is_available": True, "device_count": 8, "get_device_capability": (9, 0)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, answer=answer: answer)
    assert described() == without
    assert [name for name, *_ in without] == ["fastenc._C", "fastenc._eager_2_14_0_cu130", "fastenc._C_cuda"]


def test_extension_0(setup, in_root, capsys):
    assert setup["extension_arguments"]("0", "1") == {}
    assert capsys.readouterr().err == "fastenc: no extension built, as FASTENC_EXTENSION=0 asks\n"


def test_what_is_neither_0_nor_1(setup):
    with pytest.raises(SystemExit, match="FASTENC_EXTENSION is 'yes'; set it to 0 or 1"):
        setup["extension_arguments"]("yes", "auto")
    with pytest.raises(SystemExit, match="FASTENC_CUDA is '12'; set it to 0 or 1"):
        setup["extension_arguments"]("auto", "12")


@pytest.mark.parametrize("command", ["no-such-compiler", "no-such-compiler -pthread"])
def test_extension_1_without_a_compiler(setup, in_root, monkeypatch, command):
    monkeypatch.setenv("CXX", command)
    with pytest.raises(SystemExit, match="FASTENC_EXTENSION=1, but there is no C\\+\\+ compiler"):
        setup["extension_arguments"]("1", "auto")
    with pytest.raises(SystemExit, match="FASTENC_CUDA=1, but there is no C\\+\\+ compiler"):
        setup["extension_arguments"]("auto", "1")


def test_compilers_are_tried_in_turn(setup, monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup["find_compiler"]() is None
    for name in ("clang++", "g++", "c++"):
        (tmp_path / name).touch(mode=0o755)
        assert setup["find_compiler"]() == name


def cuda_part(arguments: dict) -> Extension | None:
    return next((ext for ext in arguments["ext_modules"] if ext.name == "fastenc._C_cuda"), None)


def test_cuda_archs_by_default_are_those_that_nvcc_knows(setup, toolkits):
    assert setup["default_archs"]("sm_75 sm_80 sm_86 sm_87 sm_89 sm_90 sm_100 sm_103 sm_120") == (
        "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
    )
    home = toolkits("13.0")
    extension = cuda_part(setup["extension_arguments"]("auto", "auto"))
    assert extension.facts["cuda_archs"] == os.environ["TORCH_CUDA_ARCH_LIST"] == "8.0;9.0+PTX"  # the toolkit's
    assert extension.facts["cuda"] == "13.0.7"
    assert str(home) == cpp_extension.CUDA_HOME


def test_cuda_archs_of_the_user_count(setup, toolkits, monkeypatch):
    toolkits("13.0")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.9")
    extension = cuda_part(setup["extension_arguments"]("auto", "auto"))
    assert extension.facts["cuda_archs"] == os.environ["TORCH_CUDA_ARCH_LIST"] == "8.9"


def test_cuda_of_another_major_version(setup, toolkits, capsys):
    toolkits("12.8")
    reason = (
        "nvcc is of CUDA 12.8.7 and torch 2.14.0+cu130 of CUDA 13.0; install the CUDA 13 toolkit, "
        "or a torch with CUDA 12 and fastenc by pip install --no-build-isolation"
    )
    assert not cuda_part(setup["extension_arguments"]("auto", "auto"))
    assert capsys.readouterr().err == f"fastenc: no CUDA kernels built: {reason}\n"
    with pytest.raises(SystemExit) as stopped:
        setup["extension_arguments"]("auto", "1")
    assert str(stopped.value) == f"fastenc: FASTENC_CUDA=1, but {reason}"


def test_no_nvcc(setup, toolkits, capsys, monkeypatch):
    toolkits(None)
    assert not cuda_part(setup["extension_arguments"]("1", "auto"))
    assert capsys.readouterr().err == (
        "fastenc: no CUDA kernels built: there is no nvcc; install the CUDA 13 toolkit, or set CUDA_HOME\n"
    )
    with pytest.raises(SystemExit, match="FASTENC_CUDA=1, but there is no nvcc"):
        setup["extension_arguments"]("auto", "1")
    monkeypatch.setattr(torch.version, "cuda", None)  # nothing to say about CUDA there
    assert not cuda_part(setup["extension_arguments"]("auto", "auto"))
    assert capsys.readouterr().err == ""
    with pytest.raises(SystemExit, match="FASTENC_CUDA=1, but torch has no CUDA"):
        setup["extension_arguments"]("auto", "1")


def test_cuda_0(setup, toolkits, capsys):
    toolkits("13.0")
    assert not cuda_part(setup["extension_arguments"]("1", "0"))
    assert capsys.readouterr().err == "fastenc: no CUDA kernels built: FASTENC_CUDA=0 asks for that\n"


def test_the_toolkit_that_fits_is_taken_from_behind_a_script(setup, toolkits, monkeypatch, tmp_path):
    toolkits("12.8")
    script = tmp_path / "bin" / "nvcc"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {make_toolkit(tmp_path / "other", "13.2")}/bin/nvcc "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)
    assert [version for _, version in setup["find_toolkits"]()] == ["12.8.7", "13.2.7"]
    setup["extension_arguments"]("auto", "auto")
    assert str(tmp_path / "other") == cpp_extension.CUDA_HOME


def test_the_toolkit_of_pip_is_found(setup, toolkits, monkeypatch, tmp_path):
    toolkits(None)
    home = make_toolkit(tmp_path / "site" / "nvidia" / "cu13", "13.1")
    assert setup["find_toolkits"]() == []
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert setup["find_toolkits"]() == [(home, "13.1.7")]


def test_cuda_jobs(setup, toolkits, monkeypatch):
    toolkits("13.0")
    files = len(glob.glob("csrc/cuda/*.cu"))
    for jobs, threads in {1: 1, 2 * files: 2, 5 * files - 1: 4}.items():  # all architectures of a file at once
        monkeypatch.setenv("MAX_JOBS", str(jobs))
        extension = cuda_part(setup["extension_arguments"]("auto", "auto"))
        assert f"--threads={threads}" in extension.extra_compile_args["nvcc"]


@pytest.mark.skipif(not shutil.which("git"), reason="there is no git")
def test_the_commit_is_that_of_this_tree(setup, monkeypatch, tmp_path):
    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        return subprocess.run(["git", *who, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.chdir(tmp_path)
    assert setup["commit"]() is None
    Path("file").touch()
    Path("sdist").mkdir()
    git("init", "--quiet")
    git("add", "file")
    git("commit", "--quiet", "--message", "one")
    head = git("rev-parse", "HEAD")
    assert setup["commit"]() == head[:12]
    Path("file").write_text("changed")
    assert setup["commit"]() == head[:12] + "-dirty"
    monkeypatch.chdir(tmp_path / "sdist")  # unpacked in somebody's checkout
    assert setup["commit"]() is None


def test_what_stays_the_same_is_not_written_again(setup, tmp_path):
    path = tmp_path / "folder" / "build_info.inc"
    setup["write_if_new"](path, "one")
    os.utime(path, (0, 0))
    setup["write_if_new"](path, "one")
    assert path.stat().st_mtime == 0
    setup["write_if_new"](path, "two")
    assert path.read_text() == "two"
    assert path.stat().st_mtime > 0


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

    built, left_out = said(build(folder, *command, REFUSED="eager.cpp", FASTENC_CUDA="0"))[-2:]
    assert built.startswith("fastenc: built with ")
    assert built.endswith(": the CPU kernels (for torch 2.13 and newer)")
    assert f"left out: their autograd in C++ (for torch {torch.__version__}" in left_out
    assert left_out.endswith("autograd runs in Python")
    assert (in_place / f"_C{EXTENSION_SUFFIX}").read_bytes().startswith(b"\x7fELF")
    assert not stale.exists()  # from other sources than the kernels beside it

    with pytest.raises(AssertionError, match="this source is refused"):
        build(folder, *command, REFUSED="eager.cpp", FASTENC_EXTENSION="1")

    (sentence,) = said(build(folder, *command))
    assert "the CPU kernels" in sentence
    assert f"for torch {torch.__version__}" in sentence
    assert stale.read_bytes().startswith(b"\x7fELF")


@pytest.mark.skipif(not torch.version.cuda, reason="torch has no CUDA")
def test_cuda_kernels_that_do_not_compile_are_left_out_with_a_reason(tmp_path):
    folder = copy_sources(tmp_path / "checkout")
    library = folder / "fastenc" / "_C_cuda.abi3.so"
    command = ("setup.py", "--quiet", "build_ext", "--inplace")

    built, left_out = said(build(folder, *command, REFUSED="dense_forward.cu"))
    assert "the CPU kernels" in built
    assert "CUDA" not in built
    assert left_out.startswith("fastenc: left out: the CUDA kernels (for torch with CUDA ")
    assert left_out.endswith("; on GPUs, Triton or eager PyTorch takes their place")
    assert not library.exists()

    for variable in ("FASTENC_CUDA", "FASTENC_EXTENSION"):
        with pytest.raises(AssertionError, match="this source is refused"):
            build(folder, *command, REFUSED="dense_forward.cu", **{variable: "1"})

    (built,) = said(build(folder, *command, TORCH_CUDA_ARCH_LIST="9.0"))
    assert "the CUDA kernels (for torch with CUDA 13, on GPUs 9.0)" in built
    assert library.read_bytes().startswith(b"\x7fELF")

    asked, built = said(build(folder, *command, FASTENC_CUDA="0"))
    assert asked == "fastenc: no CUDA kernels built: FASTENC_CUDA=0 asks for that"
    assert "CUDA" not in built
    assert not library.exists()  # of another build than the rest
