"""What is installed: the content and tags of the sdist and the wheel, and what the real libraries link to."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from building import EAGER, EXTENSION_SUFFIX, ROOT, build, copy_sources
from setuptools.config.pyprojecttoml import load_file

import fastenc
import fastenc.info

PROJECT = load_file(ROOT / "pyproject.toml")
VERSION = PROJECT["project"]["version"]


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """The folder with the sdist, and the wheel built from it."""
    folder = copy_sources(tmp_path_factory.mktemp("checkout"))
    build(folder, "setup.py", "--quiet", "sdist", FASTENC_EXTENSION="0")  # whole even where nothing can be compiled
    dist = folder / "dist"
    (sdist,) = dist.iterdir()
    with tarfile.open(sdist) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.4 has it, and 3.12 wants it
        archive.extractall(dist)
    unpacked = dist / f"fastenc-{VERSION}"
    build(unpacked, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", str(dist), FASTENC_EXTENSION="1")
    return dist


@pytest.fixture(scope="module")
def wheel(dist):
    (path,) = dist.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def packages() -> dict[str, Path]:
    """What pyproject.toml installs: package -> folder."""
    tool = PROJECT["tool"]["setuptools"]

    def folder(name: str) -> Path:
        if (listed := tool["package-dir"].get(name)) is not None:
            return ROOT / listed
        parent, _, own = name.rpartition(".")
        return folder(parent) / own

    return {name: folder(name) for name in tool["packages"]}


def test_every_package_is_listed():
    folders = {path.parent for top in ("benchmarks", "fastenc", "kernels") for path in (ROOT / top).rglob("*.py")}
    assert set(packages().values()) == folders
    assert all((folder / "__init__.py").exists() for folder in folders)
    assert not (ROOT / "kernels" / "__init__.py").exists()  # it would hide Hugging Face's package of that name


def test_sdist_holds_what_builds_and_tests_it(dist):
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    ends = {"csrc": ("h", "cpp", "cuh", "cu"), "fastenc": ("py",), "kernels": ("py",), "tests": ("py", "cpp", "json")}
    for pattern in (f"{folder}/**/*.{end}" for folder in ends for end in ends[folder]):
        files = {path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern)}
        assert files, pattern
        assert files <= names
    assert {"setup.py", "pyproject.toml", "Makefile", "LICENSE", "CHANGELOG.md", "fastenc/py.typed"} <= names
    assert {"benchmarks/peers/requirements.txt", "fastenc/serving/page.html"} <= names
    assert not [name for name in names if name.endswith((".so", ".o"))]


def test_wheel_holds_the_packages_and_the_libraries_and_nothing_else(wheel):
    installed = {name for name in wheel.namelist() if not name.startswith(f"fastenc-{VERSION}.dist-info/")}
    expected = {
        "fastenc/benchmarks/peers/requirements.txt",
        "fastenc/py.typed",
        "fastenc/serving/page.html",
        f"fastenc/_C{EXTENSION_SUFFIX}",
        f"fastenc/{EAGER}.abi3.so",
    }
    if torch.version.cuda:
        expected.add("fastenc/_C_cuda.abi3.so")
    for package, folder in packages().items():
        expected |= {f"{package.replace('.', '/')}/{path.name}" for path in folder.glob("*.py")}
    assert installed == expected
    assert "fastenc/kernels/__init__.py" in installed
    for name in filter(lambda name: name.endswith(".so"), installed):
        assert wheel.read(name).startswith(b"\x7fELF")  # built, not the stale file in the checkout


def test_wheel_tags(wheel):
    # The promise is about Python alone; torch's version is checked when the libraries are loaded.
    about = wheel.read(f"fastenc-{VERSION}.dist-info/WHEEL").decode()
    assert re.findall(r"^Tag: (\S+)$", about, re.MULTILINE) == [Path(wheel.filename).stem.split("-", 2)[2]]
    assert re.search(r"^Tag: (cp3\d+)-\1-(linux|macosx)_\w+$", about, re.MULTILINE)
    assert "Root-Is-Purelib: false" in about


def test_wheel_metadata(wheel):
    info = f"fastenc-{VERSION}.dist-info"
    assert wheel.read(f"{info}/entry_points.txt").decode().split("\n") == [
        "[console_scripts]",
        "fastenc = fastenc.cli:main",
        "",
        "[torch_dynamo_backends]",
        "fastenc = fastenc.dynamo:fastenc",
        "",
    ]
    assert wheel.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    core = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", metadata, re.MULTILINE)
    assert sorted(core) == ["numpy", "safetensors", "torch"]


def test_versions_agree():
    assert fastenc.__version__ == VERSION
    assert f"## {VERSION}" in (ROOT / "CHANGELOG.md").read_text()


def needs(library: Path) -> set[str]:
    """The symbols that a shared library takes from others."""
    lines = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True).stdout
    return {line.split()[1].partition("@")[0] for line in lines.splitlines()}


LIMITED = {"PyModule_Create2", "_Py_Dealloc"}  # of the limited API, as Python 3.10 has it


BUILD = importlib.import_module("fastenc._C").build_info()


def test_build_info():
    assert {"cxx", "cxx_version", "cxx_flags", "torch"} <= set(BUILD)
    assert "-std=c++20" in BUILD["cxx_flags"]
    assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?", BUILD.get("commit", "0123456789ab"))
    assert set(BUILD) & {"cuda", "cuda_archs", "cuda_flags"} in (set(), {"cuda", "cuda_archs", "cuda_flags"})
    text = fastenc.info.describe()
    assert all(value in text for value in BUILD.values())


@pytest.mark.parametrize("name", ["_C", "_C_cuda"] if "cuda" in BUILD else ["_C"])
def test_kernels_need_nothing_that_may_change_with_torch(name):
    symbols = needs(Path(importlib.util.find_spec(f"fastenc.{name}").origin))
    if name != "_C":  # which has pybind11, and serves one Python
        assert "PyModule_Create2" in symbols
        assert {name for name in symbols if name.startswith(("Py", "_Py"))} <= LIMITED
    assert not {name for name in symbols if re.match(r"_ZN?K?(N2at|N3c10|N5torch)", name)}
    assert "torch_library_impl" in symbols  # torch's C functions: the stable ABI


@pytest.mark.parametrize("name", ["_C", "_C_cuda"] if "cuda" in BUILD else ["_C"])
def test_libraries_load_without_a_gpu(name):
    # In a process of its own: the tests' emulated CUDA operators have the names of the real ones.
    program = f"import torch, fastenc.{name} as library; print(library.__file__)"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == Path(importlib.util.find_spec(f"fastenc.{name}").origin)


def test_autograd_library_is_there_and_knows_no_python():
    (library,) = Path(fastenc.__file__).parent.glob(f"{EAGER}.*")
    symbols = needs(library)
    assert not {name for name in symbols if name.startswith(("Py", "_Py"))}
    assert {name for name in symbols if re.match(r"_ZNK?2at", name)}  # the C++ API: for one torch alone
