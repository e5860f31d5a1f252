"""What a figure was measured on, and the most that this machine can do."""

from __future__ import annotations

import importlib
import os
import platform
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fastenc
from fastenc import backends

from . import cuda
from .harness import Case, Sample, dtype_name, sample, threads

SIZES = {"cpu": (128, 256, 512, 1024), "cuda": (2048, 4096, 8192)}
QUICK_SIZES = {"cpu": (128, 256), "cuda": (1024,)}


@dataclass(frozen=True)
class Peak:
    """The highest rate of matrix products seen at one dtype and number of threads, and where it was seen."""

    gflops: float
    source: str

    def raised_to(self, gflops: float, source: str) -> Peak:
        return Peak(gflops, source) if gflops > self.gflops else self


BACKENDS = getattr(backends, "BACKENDS", {})


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """Processors, versions, load and time, as JSON can hold them. Call it before the machine is made busy."""
    return {
        "cpu": cpu_model(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "gpu": cuda.describe_gpu() if device == "cuda" else None,
        "torch": torch.__version__,
        "fastenc": fastenc.__version__,
        "backends": {name: backend.why_unavailable() or "usable" for name, backend in BACKENDS.items()},
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name; where Linux does not tell, what Python knows of it."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def load_warning(machine: dict[str, Any]) -> str | None:
    """A sentence if something else kept the machine busy in the last minute: figures are then not to be trusted."""
    load = machine["load_average"]
    if load is None or load[0] < 0.5:
        return None
    return f"load average {load[0]:.1f} at the start: the machine was not idle, so expect figures to be off"


def measure_peak(dtype: torch.dtype, number: int, sizes: tuple[int, ...], device: str = "cpu") -> Peak:
    """The best of torch.mm over square matrices and, where fastenc measures it, of its own kernel."""
    peak = Peak(0.0, "")
    take: Sample = sample if device == "cpu" else cuda.sample_calls
    with threads(number):
        for size in sizes:
            a, b, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
            calls = max(1, 2**24 // size**3)
            deadline = time.monotonic() + 0.1
            product = partial(torch.mm, a, b, out=out)
            best = take(product, calls, time.perf_counter_ns)
            while time.monotonic() < deadline:
                best = min(best, take(product, calls, time.perf_counter_ns))
            peak = peak.raised_to(2 * size**3 / best, f"torch.mm of {size} x {size} matrices")
    own = own_peak(dtype, number) if device == "cpu" else None
    return peak if own is None else peak.raised_to(own, "fastenc's own kernel")


def own_peak(dtype: torch.dtype, number: int) -> float | None:
    """What `fastenc.backends.cpu.peak_gflops(dtype, threads)` measures; None where this build has no such kernel."""
    try:
        backend = importlib.import_module("fastenc.backends.cpu")
    except ModuleNotFoundError:
        return None
    measure = getattr(backend, "peak_gflops", None)
    return None if measure is None else measure(dtype, number)


def peak_name(case: Case) -> str:
    """What the peak of a case is called in a report: one for each dtype and number of threads, or GPU."""
    return f"{dtype_name(case.dtype)}, {case.processor}"
