"""What the tests of the build share: a copy of the sources, a compiler that takes no time, and what runs the build."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
EXTENSION_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")  # of _C, which serves one Python
EAGER = "_eager_" + re.sub(r"\W", "_", torch.__version__)

SOURCES = ("benchmarks", "csrc", "examples", "fastenc", "kernels", "tests")
NO_SOURCE = shutil.ignore_patterns("*.so", "__pycache__", "results")

# Makes an empty object of any source, except one named in $REFUSED; links and answers as the real one does.
COMPILER = """#!/bin/sh
for argument; do
    case $argument in
        -c) compiles=yes ;;
        */$REFUSED) echo "error: this source is refused" >&2; exit 1 ;;
    esac
    if [ "$previous" = -o ]; then output=$argument; fi
    previous=$argument
done
if [ "$compiles" ]; then exec c++ -x c++ -fPIC -c /dev/null -o "$output"; fi
exec c++ "$@"
"""

# As the above, and answers what setup.py and torch ask.
NVCC = """#!/bin/sh
for argument; do
    case $argument in
        --version) echo "Cuda compilation tools, release {release}, V{release}.7"; exit ;;
        --dryrun) echo '#$ TOP={home}/bin/..' >&2; exit ;;
        --list-gpu-code) printf 'sm_80\\nsm_90\\n'; exit ;;
        */$REFUSED) echo "error: this source is refused" >&2; exit 1 ;;
    esac
    if [ "$previous" = -o ]; then output=$argument; fi
    previous=$argument
done
exec c++ -x c++ -fPIC -c /dev/null -o "$output"
"""


def make_toolkit(home: Path, release: str) -> Path:
    """A CUDA toolkit of that release whose nvcc takes no time."""
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(NVCC.format(release=release, home=home))
    nvcc.chmod(0o755)
    return home


def copy_sources(folder: Path) -> Path:
    """A checkout in `folder`, with libraries lying about that earlier builds have left."""
    for name in SOURCES:
        shutil.copytree(ROOT / name, folder / name, ignore=NO_SOURCE)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    (folder / "fastenc" / "_eager_1_13_1.abi3.so").touch()
    (folder / "fastenc" / f"_C{EXTENSION_SUFFIX}").write_text("stale")
    (folder / "fastenc" / "_C_cuda.abi3.so").write_text("stale")
    return folder


def build(folder: Path, *command: str, compiler: bool = True, **environment: str) -> str:
    """Run `python *command` in `folder`; what it prints. `compiler=False`: where there is none.

    CUDA's compiler is one that takes no time, too, if this torch has CUDA.
    """
    paths = [str(Path(sys.executable).parent)]  # ninja's
    if compiler:
        script = folder / "quick-c++"
        script.write_text(COMPILER)
        script.chmod(0o755)
        environment = {"CXX": str(script), **environment}
        if torch.version.cuda:
            home = folder / "toolkit"
            environment.setdefault("CUDA_HOME", str(home if home.exists() else make_toolkit(home, torch.version.cuda)))
        paths.append(os.environ["PATH"])
    result = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={"HOME": str(folder), "PATH": os.pathsep.join(paths), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def said(output: str) -> list[str]:
    """The lines that setup.py itself prints."""
    return [line for line in output.splitlines() if line.startswith("fastenc: ")]


def unpack(wheels: Path, folder: Path) -> Path:
    """The one wheel in `wheels`, unpacked."""
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


# An editable install finds the modules that the package in the folder lacks.
NOT_EDITABLE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if not finder.__module__.startswith("__editable__")]
"""


def python(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `program` where `import fastenc` finds the one in `folder`, and that alone."""
    program = NOT_EDITABLE + program
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
