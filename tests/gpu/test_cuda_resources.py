"""What the CUDA kernels need on every GPU that they are compiled for: no GPU takes part."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("fastenc._C", reason="no extension is built")
import cuda_resources
from cuda_resources import Record

from fastenc import _C

REGISTERS = 65536  # of a multiprocessor
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}  # bytes, of a block

RECORDED = json.loads(cuda_resources.RESOURCES.read_text())


@pytest.fixture(scope="module")
def built() -> list[Record]:
    """The records of the library here, made in a process of its own."""
    if "cuda" not in _C.build_info():
        pytest.skip("built without CUDA")
    done = subprocess.run([sys.executable, cuda_resources.__file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["records"]


def spills(record: Record) -> bool:
    return bool(record["stack"] or record["local"])


def does_not_start(record: Record) -> bool:
    return record["registers"] * record["threads"] > REGISTERS


def does_not_fit(record: Record) -> bool:
    return record["shared"] + record["static_shared"] > SHARED[record["arch"]]


def found(records: list[Record], fault: Callable[[Record], bool]) -> list[str]:
    return [f"{record['kernel']} on {record['arch']}" for record in records if fault(record)]


@pytest.mark.parametrize("fault", [spills, does_not_start, does_not_fit], ids=lambda fault: fault.__name__)
def test_no_kernel(built, fault):
    assert found(built, fault) == []
    assert found(RECORDED["records"], fault) == []


def test_every_architecture_that_was_asked_for_is_there(built):
    asked = {int(arch.replace(".", "")) for arch in re.findall(r"\d+\.\d", _C.build_info()["cuda_archs"])}
    assert {record["arch"] for record in built} == asked


def test_every_kernel_is_there_for_every_architecture():
    listed = runpy.run_path(str(cuda_resources.ROOT / "setup.py"))["CUDA_ARCHS"]
    assert set(SHARED) == {int(arch.replace(".", "")) for arch in listed}
    records = RECORDED["records"]
    kernels = {record["kernel"] for record in records}
    assert {(record["kernel"], record["arch"]) for record in records} == {(k, a) for k in kernels for a in SHARED}
    written = {
        name
        for path in (cuda_resources.ROOT / "csrc" / "cuda").glob("*.cuh")
        for name in re.findall(r"^FASTENC_KERNEL\(.*\)\s+(\w+_kernel)\(", path.read_text(), re.MULTILINE)
    }
    assert {kernel.partition("<")[0] for kernel in kernels} == written


def test_the_report_on_record_is_this_one(built):
    """Exactly, if the nvcc on record is the one here; another may need other numbers."""
    archs = {record["arch"] for record in built}
    recorded = [record for record in RECORDED["records"] if record["arch"] in archs]
    if RECORDED["nvcc"] == _C.build_info()["cuda"]:
        assert [record for record in built if record["arch"] in SHARED] == recorded, (
            "if that is right: make resources, and look at the difference"
        )
    else:
        assert {record["kernel"] for record in built} == {record["kernel"] for record in recorded}


PLANTED = """
__global__ void __launch_bounds__(256) right_kernel(float* x) { x[threadIdx.x] = 0; }
// An array that is indexed by what is known only as it runs.
__global__ void __launch_bounds__(256) spills_kernel(float* x, int n) {
  float kept[64];
  for (int i = 0; i < n; ++i) kept[i] = x[i];
  for (int i = 0; i < n; ++i) x[i] = kept[n - i - 1];
}
"""


def test_planted_faults_are_found(built, tmp_path: Path):
    source, library = tmp_path / "planted.cu", tmp_path / "planted.o"
    source.write_text(PLANTED)
    (nvcc, *_) = (toolkit.home / "bin" / "nvcc" for toolkit in cuda_resources.toolkits())
    subprocess.run([nvcc, "-gencode=arch=compute_80,code=sm_80", "-c", "-o", library, source], check=True)
    right, wrong = cuda_resources.measure(library)
    assert (right["kernel"], right["threads"]) == ("right_kernel", 256)
    assert not spills(right)
    assert spills(wrong)
    assert not does_not_start({**wrong, "registers": 255})
    assert does_not_start({**wrong, "registers": 255, "threads": 512})
    assert not does_not_fit({**right, "shared": 166912})
    assert does_not_fit({**right, "shared": 166916})
