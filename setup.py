"""Builds fastenc. What pyproject.toml cannot say: the C++ extension, and when to leave it out.

Environment variables, all optional:
    FASTENC_EXTENSION=0     build no extension (the package then runs on eager PyTorch)
    FASTENC_EXTENSION=1     fail if the extension cannot be built, instead of leaving it out
    MAX_JOBS=n              compilers to run at once; by default as many as cores and memory allow
    DEBUG=1                 -O1 -g
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import sys

from setuptools import setup
from setuptools.errors import BaseError

WANTED = os.environ.get("FASTENC_EXTENSION", "auto")
BYTES_PER_JOB = 1.5e9


def default_jobs() -> int:
    """Compilers to run at once: one a core, as long as each has 1.5 GB."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return cores
    return max(1, min(cores, int(memory / BYTES_PER_JOB)))


def say(sentence: str) -> None:
    print(f"fastenc: {sentence}", file=sys.stderr, flush=True)


def extension() -> dict:
    """setup()'s arguments for the extension; none if it is not to be built, or nothing can compile it."""
    if WANTED == "0":
        say("no extension built, as FASTENC_EXTENSION=0 asks; it will run on eager PyTorch")
        return {}
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        return give_up(f"torch cannot be imported here ({error})")
    compiler = os.environ.get("CXX") or next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    if compiler is None or shutil.which(compiler.split()[0]) is None:
        return give_up("there is no C++ compiler (install g++ or clang++, or set CXX)")

    os.environ.setdefault("MAX_JOBS", str(default_jobs()))
    optimise = ["-O1", "-g"] if os.environ.get("DEBUG") == "1" else ["-O3", "-g0"]
    flags = [
        *optimise,
        "-std=c++20",
        "-fvisibility=hidden",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-ffp-contract=fast",
        "-Wno-psabi",
    ]

    class BuildExtension(cpp_extension.BuildExtension):
        """torch's, which on failure leaves the extension out unless it was asked for."""

        def run(self) -> None:
            try:
                super().run()
            except (BaseError, RuntimeError, OSError) as error:
                if WANTED == "1":
                    raise
                give_up(f"compiling failed ({str(error).splitlines()[0]})")
                self.extensions = []
            else:
                say(f"built the CPU kernels with {compiler} on torch {torch.__version__}'s stable ABI")

    common = {"depends": sorted(glob.glob("csrc/**/*.h", recursive=True)), "py_limited_api": True}
    return {
        "ext_modules": [
            cpp_extension.CppExtension(
                "fastenc._C",
                sorted(["csrc/ops.cpp", *glob.glob("csrc/cpu/*.cpp")]),
                extra_compile_args={"cxx": [*flags, "-DTORCH_TARGET_VERSION=0x020d000000000000"]},  # torch 2.13's ABI
                **common,
            ),
            # For this torch alone; any other leaves it aside. fastenc/backends/cpu.py looks for this name.
            cpp_extension.CppExtension(
                "fastenc._eager_" + re.sub(r"\W", "_", torch.__version__),
                ["csrc/eager.cpp"],
                extra_compile_args={"cxx": flags},
                **common,
            ),
        ],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def give_up(reason: str) -> dict:
    if WANTED == "1":
        raise SystemExit(f"fastenc: FASTENC_EXTENSION=1, but {reason}")
    say(f"no extension built: {reason}; it will run on eager PyTorch")
    return {}


setup(**extension())
