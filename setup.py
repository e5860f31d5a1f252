"""Builds fastenc. What pyproject.toml cannot say: the C++ extensions, and when to leave them out.

    fastenc._C                  the CPU kernels and the training engine, on torch's stable ABI and pybind11: one build
                                serves every torch from 2.13 on, and the Python that it was built with
    fastenc._eager_<version>    their autograd in C++, for that one version of torch; any other leaves it aside
    fastenc._C_cuda             the CUDA kernels, where torch has CUDA and there is an nvcc of its major version; on the
                                stable ABI too. No GPU is needed or looked for

Environment variables, all optional:
    FASTENC_EXTENSION=0     build no extension (the package then runs on eager PyTorch)
    FASTENC_EXTENSION=1     fail if an extension cannot be built, instead of leaving it out
    FASTENC_CUDA=0          leave the CUDA kernels out
    FASTENC_CUDA=1          fail if the CUDA kernels cannot be built
    TORCH_CUDA_ARCH_LIST    the GPUs to compile for, such as "8.0" or "9.0;12.0+PTX": each costs its share of time;
                            by default 8.0, 8.6, 8.9, 9.0, 10.0 and 12.0, as far as nvcc knows them, and PTX for newer
    CUDA_HOME=folder        the toolkit to prefer to those on PATH, in /usr/local and in pip's nvidia packages
    MAX_JOBS=n              compilers to run at once; by default as many as cores and memory allow
    CXX=compiler            by default the first of c++, g++ and clang++
    DEBUG=1                 -O1 -g; for nvcc -O3 -g -lineinfo, which Nsight and compute-sanitizer read
"""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup

BYTES_PER_JOB = 1.5e9
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020d000000000000"  # torch 2.13's
CUDA_ARCHS = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")


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


class Toolkit(NamedTuple):
    home: Path  # has bin/nvcc
    version: str  # such as "13.0.88"

    @property
    def major(self) -> str:
        return self.version.partition(".")[0]


def output_of(*command: str | Path) -> str:
    """What a command prints, errors too; nothing if it cannot be run."""
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
    except OSError:
        return ""


def find_toolkits() -> list[Toolkit]:
    """The CUDA toolkits of this machine, the preferred one first."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    pip = importlib.util.find_spec("nvidia")
    compilers = [
        *(Path(home, "bin", "nvcc") for home in homes),
        *(Path(folder, "nvcc") for folder in os.get_exec_path()),
        *sorted(Path("/usr/local").glob("cuda*/bin/nvcc"), reverse=True),
        *(
            path
            for folder in (pip and pip.submodule_search_locations) or ()
            for path in Path(folder).glob("cu*/bin/nvcc")
        ),
    ]
    toolkits = []
    for nvcc in filter(Path.is_file, compilers):
        # The nvcc on PATH may be a script or a link in a folder that has nothing else of the toolkit.
        top = re.search(r"^#\$ TOP=(.+)$", output_of(nvcc, "--dryrun", "-x", "cu", "/dev/null"), re.MULTILINE)
        version = re.search(r"\bV(\d+(\.\d+)+)", output_of(nvcc, "--version"))
        if top and version:
            toolkits.append(Toolkit(Path(top[1]).resolve(), version[1]))
    return toolkits


def choose_toolkit(toolkits: Sequence[Toolkit], torch_version: str, torch_cuda: str) -> Toolkit | str:
    """The toolkit for a torch with CUDA `torch_cuda`, or why there is none."""
    major = torch_cuda.partition(".")[0]
    for toolkit in toolkits:
        if toolkit.major == major:
            return toolkit
    if not toolkits:
        return f"there is no nvcc; install the CUDA {major} toolkit, or set CUDA_HOME"
    return (
        f"nvcc is of CUDA {toolkits[0].version} and torch {torch_version} of CUDA {torch_cuda}; install the CUDA "
        f"{major} toolkit, or a torch with CUDA {toolkits[0].major} and fastenc by pip install --no-build-isolation"
    )


def default_archs(codes: str) -> str:
    """The architectures to compile for by default, of those that `nvcc --list-gpu-code` lists."""
    return ";".join(arch for arch in CUDA_ARCHS if f"sm_{arch.replace('.', '')}" in codes.split()) + "+PTX"


def commit() -> str | None:
    """The commit of this source tree, "-dirty" if it is changed; None outside a checkout."""
    described = output_of("git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12")
    found = re.fullmatch(r"[0-9a-f]+(-dirty)?", described.strip())
    return found[0] if found and os.path.exists(".git") else None  # .git: not that of a checkout around this folder


def write_if_new(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def build_extension_command(compiler: str) -> type:
    """The build_ext command: torch's, but an extension that is `optional` and cannot be compiled is left out."""
    from torch.utils import cpp_extension

    class BuildExtension(cpp_extension.BuildExtension):
        def run(self) -> None:
            self.in_place = bool(self.inplace)
            self.built: list[Extension] = []
            self.left_out: list[str] = []
            # Of an earlier build with another torch, maybe from other sources.
            for old in glob.glob(os.path.join(self.build_lib, "fastenc", "_eager_*")):
                os.remove(old)
            if not any(ext.name == "fastenc._C_cuda" for ext in self.extensions):
                self.remove("fastenc._C_cuda")
            super().run()
            if self.built:
                say(f"built with {compiler}: {', '.join(ext.purpose for ext in self.built)}")
            for sentence in self.left_out:
                say(f"left out: {sentence}")

        def build_extensions(self) -> None:
            # The CUDA part apart, as torch refuses all if nvcc cannot take this compiler; and first, as _C tells of it.
            every = self.extensions
            of_cuda = [ext for ext in every if ext.name == "fastenc._C_cuda"]
            of_cpu = [ext for ext in every if ext not in of_cuda]
            for self.extensions in filter(None, (of_cuda, of_cpu)):
                with self.leaving_out(self.extensions):
                    super().build_extensions()
            self.extensions = every

        def build_extension(self, ext: Extension) -> None:
            with self.leaving_out([ext]):
                if ext.name == "fastenc._C":
                    self.write_build_info(ext)
                super().build_extension(ext)
                self.built.append(ext)

        def write_build_info(self, ext: Extension) -> None:
            """What csrc/build_info.cpp includes; as macros on the command line it would recompile every file."""
            facts = {"cxx": compiler, **ext.facts, "commit": commit()}
            for built in self.built:
                facts |= built.facts
            lines = [f"FACT({name}, {json.dumps(value)})\n" for name, value in facts.items() if value]
            folder = Path(self.build_temp).resolve()
            write_if_new(folder / "build_info.inc", "".join(lines))
            ext.include_dirs.append(str(folder))

        def remove(self, name: str) -> None:
            """Remove what an earlier build has left of the extension."""
            for folder in (os.path.join(self.build_lib, "fastenc"), *(["fastenc"] if self.in_place else [])):
                for stale in glob.glob(os.path.join(folder, name.removeprefix("fastenc.") + ".*")):
                    os.remove(stale)

        @contextlib.contextmanager
        def leaving_out(self, extensions: Sequence[Extension]) -> Iterator[None]:
            try:
                yield
            except Exception as error:  # compilers and torch's builder fail in many ways
                if not all(ext.optional for ext in extensions):
                    raise
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                for ext in extensions:
                    self.remove(ext.name)
                    self.left_out.append(f"{ext.purpose}, as compiling failed ({reason}); {ext.instead}")

    return BuildExtension


def extension_arguments(wanted: str, cuda: str) -> dict:
    """setup()'s arguments for the extensions; none if they are not to be built, or nothing can compile them.

    Args:
        wanted: what FASTENC_EXTENSION says, "auto" if nothing.
        cuda: what FASTENC_CUDA says, "auto" if nothing.
    """
    for name, value in {"FASTENC_EXTENSION": wanted, "FASTENC_CUDA": cuda}.items():
        if value not in ("0", "1", "auto"):
            raise SystemExit(f"fastenc: {name} is {value!r}; set it to 0 or 1, or leave it unset")
    if wanted == "0":
        say("no extension built, as FASTENC_EXTENSION=0 asks")
        return {}
    required = "FASTENC_EXTENSION=1" if wanted == "1" else "FASTENC_CUDA=1" if cuda == "1" else None
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
    debug = os.environ.get("DEBUG") == "1"
    flags = [
        *(["-O1", "-g"] if debug else ["-O3", "-g0"]),
        "-std=c++20",
        "-fvisibility=hidden",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-ffp-contract=fast",
        "-Wno-psabi",
    ]
    # optional: setuptools copies into the source folder what was built, and does not miss what was left out.
    common = {
        "depends": sorted(path for end in ("h", "cuh") for path in glob.glob(f"csrc/**/*.{end}", recursive=True)),
        "py_limited_api": True,
        "optional": not required,
    }
    kernels = cpp_extension.CppExtension(
        "fastenc._C",
        sorted(["csrc/ops.cpp", "csrc/engine.cpp", "csrc/build_info.cpp", *glob.glob("csrc/cpu/*.cpp")]),
        extra_compile_args={"cxx": [*flags, STABLE_ABI]},
        **{**common, "py_limited_api": False},  # pybind11 has none
    )
    kernels.libraries.remove("torch_python")
    kernels.purpose = "the CPU kernels (for torch 2.13 and newer)"
    kernels.instead = "fastenc will run on eager PyTorch"
    kernels.facts = {"cxx_flags": " ".join([*flags, STABLE_ABI]), "torch": torch.__version__}
    autograd = cpp_extension.CppExtension(
        # fastenc/backends/cpu.py looks for this name.
        "fastenc._eager_" + re.sub(r"\W", "_", torch.__version__),
        ["csrc/eager.cpp"],
        extra_compile_args={"cxx": flags},
        **common,
    )
    autograd.purpose = f"their autograd in C++ (for torch {torch.__version__}, found here, alone)"
    autograd.instead = "autograd runs in Python"
    extensions = [kernels, autograd]

    toolkit = "FASTENC_CUDA=0 asks for that"
    if cuda != "0":
        toolkit = "torch has no CUDA; install one that has, and fastenc by pip install --no-build-isolation"
        if torch.version.cuda:
            toolkit = choose_toolkit(find_toolkits(), torch.__version__, torch.version.cuda)
    if isinstance(toolkit, Toolkit):
        extensions.append(cuda_extension(toolkit, compiler, debug, common))
    elif cuda == "1":
        raise SystemExit(f"fastenc: FASTENC_CUDA=1, but {toolkit}")
    elif torch.version.cuda:
        say(f"no CUDA kernels built: {toolkit}")
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": build_extension_command(compiler)},
    }


def cuda_extension(toolkit: Toolkit, compiler: str, debug: bool, common: dict) -> Extension:
    """fastenc._C_cuda; sets what torch's builder reads: the toolkit's folder and the architectures."""
    from torch.utils import cpp_extension

    cpp_extension.CUDA_HOME = str(toolkit.home)
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        codes = output_of(toolkit.home / "bin" / "nvcc", "--list-gpu-code")
        os.environ["TORCH_CUDA_ARCH_LIST"] = default_archs(codes)
    archs = os.environ["TORCH_CUDA_ARCH_LIST"]
    # CXX may be "ccache g++ -pthread"; nvcc takes a program alone.
    host = next(word for word in reversed(compiler.split()) if not word.startswith("-"))
    flags = [
        *(["-O3", "-g", "-lineinfo"] if debug else ["-O3"]),
        "-std=c++20",
        "-ccbin",
        host,
        "-Xcompiler",
        "-fvisibility=hidden",
        "-Xfatbin=-compress-all",  # an eighth of the size
        "-DUSE_CUDA",
        STABLE_ABI,
    ]
    sources = sorted(glob.glob("csrc/cuda/*.cu"))
    # Where there are more cores than files: the architectures of a file at once.
    threads = max(1, int(os.environ["MAX_JOBS"]) // len(sources))
    pip = importlib.util.find_spec("nvidia")
    folders = [toolkit.home / "lib64", toolkit.home / "lib"]
    folders += [Path(folder, f"cu{toolkit.major}", "lib") for folder in (pip and pip.submodule_search_locations) or ()]
    extension = cpp_extension.CppExtension(
        "fastenc._C_cuda",
        sources,
        extra_compile_args={"nvcc": [*flags, f"--threads={threads}"]},
        # torch's own libraries, loaded when ours is. By its full name, as pip's package has no libcudart.so.
        libraries=["torch_cuda", f":libcudart.so.{toolkit.major}"],
        library_dirs=[str(folder) for folder in folders if folder.is_dir()],
        **common,
    )
    extension.purpose = f"the CUDA kernels (for torch with CUDA {toolkit.major}, on GPUs {archs})"
    extension.instead = "on GPUs, Triton or eager PyTorch takes their place"
    extension.facts = {"cuda": toolkit.version, "cuda_archs": archs, "cuda_flags": " ".join(flags)}
    return extension


def do_without(reason: str, required: str | None) -> dict:
    if required:
        raise SystemExit(f"fastenc: {required}, but {reason}")
    say(f"no extension built: {reason}; fastenc will run on eager PyTorch")
    return {}


if __name__ == "__main__":
    setup(**extension_arguments(*(os.environ.get(name) or "auto" for name in ("FASTENC_EXTENSION", "FASTENC_CUDA"))))
