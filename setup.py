"""Builds fastenc. What pyproject.toml cannot say: the C++ extensions, and when to leave them out.

    fastenc._C                  the CPU kernels, on torch's stable ABI: one build serves every torch from 2.13 on
    fastenc._eager_<version>    their autograd in C++, for that one version of torch; any other leaves it aside

Environment variables, all optional:
    FASTENC_EXTENSION=0     build no extension (the package then runs on eager PyTorch)
    FASTENC_EXTENSION=1     fail if an extension cannot be built, instead of leaving it out
    MAX_JOBS=n              compilers to run at once; by default as many as cores and memory allow
    CXX=compiler            by default the first of c++, g++ and clang++
    DEBUG=1                 -O1 -g
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from setuptools import Extension, setup

BYTES_PER_JOB = 1.5e9


def default_jobs() -> int:
    """Compilers to run at once: one a core, as long as each has 1.5 GB."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(cores, free_memory() / BYTES_PER_JOB)))


def free_memory() -> float:
    """Bytes that programs may still take, caches counted as free; infinite where the system does not tell."""
    try:
        found = re.search(r"^MemAvailable: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return int(found[1]) * 1024.0 if found else float("inf")


def say(sentence: str) -> None:
    print(f"fastenc: {sentence}", file=sys.stderr, flush=True)


def find_compiler() -> str | None:
    """The C++ compiler's command, or None if there is none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((name for name in names if shutil.which(name.split()[0])), None)


def build_extension_command(compiler: str, required: bool) -> type:
    """The build_ext command: torch's, but what cannot be compiled is left out unless `required`."""
    from torch.utils import cpp_extension

    class BuildExtension(cpp_extension.BuildExtension):
        def run(self) -> None:
            self.in_place = bool(self.inplace)
            self.built: list[str] = []
            self.left_out: list[str] = []
            # Of an earlier build with another torch, maybe from other sources.
            for old in glob.glob(os.path.join(self.build_lib, "fastenc", "_eager_*")):
                os.remove(old)
            super().run()
            if self.built:
                say(f"built with {compiler}: {', '.join(self.built)}")
            if self.left_out:
                instead = "autograd runs in Python" if self.built else "fastenc will run on eager PyTorch"
                say(f"left out: {', '.join(self.left_out)}; {instead}")

        def build_extensions(self) -> None:
            with self.leaving_out(self.extensions):
                super().build_extensions()

        def build_extension(self, ext: Extension) -> None:
            with self.leaving_out([ext]):
                super().build_extension(ext)
                self.built.append(ext.purpose)

        @contextlib.contextmanager
        def leaving_out(self, extensions: Sequence[Extension]) -> Iterator[None]:
            try:
                yield
            except Exception as error:  # compilers and torch's builder fail in many ways
                if required:
                    raise
                for ext in extensions:
                    library = self.get_ext_fullpath(ext.name)
                    in_place = [os.path.join("fastenc", os.path.basename(library))] if self.in_place else []
                    for stale in filter(os.path.exists, [library, *in_place]):
                        os.remove(stale)
                    reason = (str(error).splitlines() or [type(error).__name__])[0]
                    self.left_out.append(f"{ext.purpose}, as compiling failed ({reason})")

    return BuildExtension


def extension_arguments(wanted: str) -> dict:
    """setup()'s arguments for the extensions; none if they are not to be built, or nothing can compile them.

    Args:
        wanted: what FASTENC_EXTENSION says, "auto" if nothing.
    """
    if wanted not in ("0", "1", "auto"):
        raise SystemExit(f"fastenc: FASTENC_EXTENSION is {wanted!r}; set it to 0 or 1, or leave it unset")
    if wanted == "0":
        say("no extension built, as FASTENC_EXTENSION=0 asks")
        return {}
    required = wanted == "1"
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        return do_without(f"torch cannot be imported here ({error})", required)
    compiler = find_compiler()
    if compiler is None:
        return do_without("there is no C++ compiler; install g++ or clang++, or set CXX", required)

    os.environ["CXX"] = compiler  # for torch and setuptools, which have defaults of their own
    os.environ.setdefault("MAX_JOBS", str(default_jobs()))
    flags = [
        *(["-O1", "-g"] if os.environ.get("DEBUG") == "1" else ["-O3", "-g0"]),
        "-std=c++20",
        "-fvisibility=hidden",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-ffp-contract=fast",
        "-Wno-psabi",
    ]
    # optional: setuptools copies into the source folder what was built, and does not miss what was left out.
    common = {
        "depends": sorted(glob.glob("csrc/**/*.h", recursive=True)),
        "py_limited_api": True,
        "optional": not required,
    }
    kernels = cpp_extension.CppExtension(
        "fastenc._C",
        sorted(["csrc/ops.cpp", *glob.glob("csrc/cpu/*.cpp")]),
        extra_compile_args={"cxx": [*flags, "-DTORCH_TARGET_VERSION=0x020d000000000000"]},  # torch 2.13's ABI
        **common,
    )
    kernels.purpose = "the CPU kernels (for torch 2.13 and newer)"
    autograd = cpp_extension.CppExtension(
        # fastenc/backends/cpu.py looks for this name.
        "fastenc._eager_" + re.sub(r"\W", "_", torch.__version__),
        ["csrc/eager.cpp"],
        extra_compile_args={"cxx": flags},
        **common,
    )
    autograd.purpose = f"their autograd in C++ (for torch {torch.__version__}, found here, alone)"
    return {
        "ext_modules": [kernels, autograd],
        "cmdclass": {"build_ext": build_extension_command(compiler, required)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def do_without(reason: str, required: bool) -> dict:
    if required:
        raise SystemExit(f"fastenc: FASTENC_EXTENSION=1, but {reason}")
    say(f"no extension built: {reason}; fastenc will run on eager PyTorch")
    return {}


if __name__ == "__main__":
    setup(**extension_arguments(os.environ.get("FASTENC_EXTENSION") or "auto"))
