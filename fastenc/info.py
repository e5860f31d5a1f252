"""What this machine offers: versions, processors, and which backends are usable or why they are not."""

from __future__ import annotations

import importlib
import platform
from pathlib import Path
from types import ModuleType

import torch

from . import __version__
from .backends import BACKENDS, cpu, triton


def triton_version() -> str:
    """Triton's version, or in words why it cannot be used."""
    try:
        return importlib.import_module("triton").__version__
    except ModuleNotFoundError:
        return "not installed; it comes with PyTorch's CUDA builds"
    except (ImportError, OSError) as error:
        return f"installed, but cannot be imported: {first_line(error)}"


def gpus() -> list[str]:
    """One line for each GPU that PyTorch can use."""
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute capability {p.major}.{p.minor}" for p in properties]


def usability(backend: ModuleType) -> str:
    """Whether a backend can run in this process, with what, or why not."""
    if reason := backend.why_unavailable():
        return f"not usable: {reason}"
    return f"usable: {backend.describe()}" if hasattr(backend, "describe") else "usable"


def build() -> list[tuple[str, str]]:
    """How the extensions were compiled."""
    if cpu.why_unavailable():
        return [("build", "no extension")]
    info = importlib.import_module("fastenc._C").build_info()
    commit = f", commit {info['commit']}" if "commit" in info else ""
    facts = [("build", f"{info['cxx']} {info['cxx_version']}, torch {info['torch']}{commit}; {info['cxx_flags']}")]
    if "cuda" in info:
        return [*facts, ("build, CUDA", f"nvcc {info['cuda']} for {info['cuda_archs']}; {info['cuda_flags']}")]
    return [*facts, ("build, CUDA", "none")]


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def tuned() -> list[tuple[str, str]]:
    """Where measured choices are kept, how many there are, and which hold for this GPU, Triton and these kernels."""
    from .kernels.store import STORE

    entries = STORE.entries()
    if triton.why_unavailable():
        return [("tuning cache", f"{STORE.path}: {len(entries)} entries, none of use here")]
    here = triton.tuning().environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    configs = [key for key in entries if key.startswith(f"config|{here}|")]
    choices = [entry for key, entry in entries.items() if key.startswith(f"choice|{here}|")]
    counts = f"{len(configs)} configurations and {len(choices)} choices for this GPU, of {len(entries)} entries"
    return [("tuning cache", f"{STORE.path}: {counts}")] + [
        (
            "tuned",
            f"{entry['of']}: {entry['backend']} ("
            + ", ".join(f"{key.removesuffix('_us')} {entry[key]:.4g} us" for key in sorted(entry) if key[-3:] == "_us")
            + ")",
        )
        for entry in choices
    ]


def clear_tuning() -> Path:
    """Remove the cache of what was measured; where it was."""
    from .kernels.store import STORE

    STORE.clear()
    return STORE.path


def describe() -> str:
    """A report for people, one fact a line; made to be pasted into a bug report."""
    built_with = f"built with CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    facts = [
        ("fastenc", __version__),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__}, {built_with}"),
        ("triton", triton_version()),
        *build(),
        ("CPU", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"),
    ]
    facts += [(f"GPU {index}", line) for index, line in enumerate(gpus())] or [("GPU", "none that PyTorch can use")]
    for name, backend in BACKENDS.items():
        facts.append((f"backend {name}", usability(backend)))
    facts += tuned()
    width = max(len(name) for name, _ in facts)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in facts)
