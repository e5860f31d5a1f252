"""The training engine under ThreadSanitizer, and under AddressSanitizer and UBSan, without torch.

tests/native/train_threads.cpp compares the bits of many workers, in time, late or absent, with those of one, and looks
where training stops. Mistakes planted in the engine show that all of it can fail.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fastenc.backends import cpu

ROOT = Path(__file__).parents[1]
FLAGS = (
    *("-std=c++20", "-O1", "-g1", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    *("-Wno-psabi", f"-I{ROOT / 'csrc'}", "-include", str(ROOT / "tests/native/planted.h")),
)
SANITIZERS = {
    "thread": ("-fsanitize=thread",),
    # alignment: rows of any tensor are read as vectors, which x86 allows
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-sanitize=alignment"),
}

# Each PLANTED(name) of csrc/cpu: the build that sees it, and what that says.
MISTAKES = {
    "NoWait": ("thread", "ThreadSanitizer: data race"),
    "NoClaims": ("thread", "ThreadSanitizer: data race"),
    "RowTooMany": ("address", "AddressSanitizer: SEGV"),
    "UpdateTooFar": ("address", "AddressSanitizer: SEGV"),
    "SumsByWorkers": ("thread", "more workers make other bits"),
    "NoStop": ("thread", "the step of a bad row is not where training ends"),
}


def instruction_sets() -> list[str]:
    """Those of this CPU, the one that is chosen by itself first."""
    known = []
    for isa in ("avx512", "avx2", "generic"):
        try:
            cpu.configure(isa, True)
        except ValueError:
            continue
        known.append(isa)
    cpu.configure("auto", True)
    return known


ISAS = instruction_sets()


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """(isa, sanitizer) -> the program, compiled once."""
    built: dict[tuple[str, str], Path] = {}

    def compiled(isa: str, sanitizer: str) -> Path:
        if (isa, sanitizer) not in built:
            built[isa, sanitizer] = build(isa, SANITIZERS[sanitizer], tmp_path_factory.mktemp(f"{isa}-{sanitizer}"))
        return built[isa, sanitizer]

    return compiled


def build(isa: str, sanitizer: tuple[str, ...], folder: Path) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("c++")
    probe = [compiler, *sanitizer, "-x", "c++", "-", "-o", folder / "probe"]
    if not compiler or subprocess.run(probe, input=b"int main() {}", capture_output=True).returncode:
        pytest.skip(f"there is no C++ compiler with {sanitizer[0]}")
    command = [compiler, *FLAGS, *sanitizer, f"-DKERNELS={isa}_kernels", "-c"]
    sources = [ROOT / f"csrc/cpu/stack_{isa}.cpp", ROOT / "csrc/cpu/crew.cpp", ROOT / "tests/native/train_threads.cpp"]
    objects = [folder / f"{source.stem}.o" for source in sources]

    def compile_one(source: Path, target: Path) -> None:
        subprocess.run([*command, source, "-o", target], check=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, sources, objects))
    subprocess.run([compiler, *sanitizer, *objects, "-o", folder / "run"], check=True)
    return folder / "run"


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    setarch = shutil.which("setarch")  # ThreadSanitizer does not start where addresses are very random
    command = [*([setarch, "-R"] if setarch else []), program, *arguments]
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize(
    ("isa", "passes"),
    [
        pytest.param(ISAS[0], 1, marks=pytest.mark.brief),
        *(pytest.param(isa, 2, marks=pytest.mark.full) for isa in ISAS),
    ],
)
def test_workers_share_a_step_without_a_mistake(program, isa, passes, sanitizer):
    result = run(program(isa, sanitizer), str(passes))
    assert result.returncode == 0, result.stderr[-6000:]
    assert result.stderr == ""
    assert result.stdout.startswith(f"{50 * passes} setups of {isa}, "), result.stdout


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(program, mistake):
    sanitizer, words = MISTAKES[mistake]
    result = run(program(ISAS[0], sanitizer), "1", mistake)
    assert result.returncode != 0
    assert words in result.stderr, result.stderr[-6000:]


def test_all_mistakes_are_tried():
    source = "".join(path.read_text() for path in (ROOT / "csrc/cpu").iterdir())
    assert {*re.findall(r"PLANTED\((\w+)\)", source)} - {"name"} == {*MISTAKES}
