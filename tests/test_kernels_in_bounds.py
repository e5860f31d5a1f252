"""The CPU kernels under AddressSanitizer and UBSan, without torch: nothing beyond a buffer is read or written."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLAGS = [
    "-std=c++20",
    "-O1",
    "-g1",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-sanitize=alignment",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
]  # alignment: rows of any tensor are read as vectors, which x86 allows


def test_nothing_beyond_a_buffer_is_touched(tmp_path):
    compiler = os.environ.get("CXX") or shutil.which("c++")
    sources = [ROOT / "tests/native/kernels_in_bounds.cpp", ROOT / "csrc/cpu/crew.cpp"]
    sources += sorted((ROOT / "csrc/cpu").glob("stack_*.cpp"))
    objects = [tmp_path / f"{source.stem}.o" for source in sources]

    def compile_one(source: Path, target: Path) -> None:
        subprocess.run([compiler, *FLAGS, f"-I{ROOT / 'csrc'}", "-c", source, "-o", target], check=True)

    if (
        not compiler
        or subprocess.run(
            [compiler, *FLAGS, "-x", "c++", "-", "-o", tmp_path / "probe"], input=b"int main(){}"
        ).returncode
    ):
        pytest.skip("there is no compiler with AddressSanitizer")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, sources, objects))
    subprocess.run([compiler, *FLAGS, *objects, "-o", tmp_path / "run"], check=True)
    result = subprocess.run([tmp_path / "run"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "runs in" in result.stdout
