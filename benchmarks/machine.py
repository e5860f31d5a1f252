"""What a figure was measured on, and the most that this machine can do."""

from __future__ import annotations

import importlib
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch

import fastenc
from fastenc import backends

from . import cuda
from .harness import Case, Sample, dtype_name, sample, threads

SIZES = {"cpu": (128, 256, 512, 1024), "cuda": (2048, 4096, 8192)}
QUICK_SIZES = {"cpu": (128, 256), "cuda": (1024,)}
# Of the buffers that are copied: from what the first cache holds to what none does.
BUFFERS = {"cpu": tuple(2**n for n in range(15, 30, 2)), "cuda": (2**22, 2**26, 2**30)}
QUICK_BUFFERS = {"cpu": (2**17, 2**23), "cuda": (2**22,)}


@dataclass(frozen=True)
class Peak:
    """The highest rate seen, 1e9 a second, and where it was seen."""

    rate: float
    source: str

    def raised_to(self, other: Peak) -> Peak:
        return other if other.rate > self.rate else self


@dataclass(frozen=True)
class Peaks:
    """The most that the machine can do, as measured.

    products: GFLOP/s of matrix products, by `product_key`.
    traffic: GB/s read and written together, by processor, then by the size of what is copied, in bytes.
    """

    products: dict[str, Peak] = field(default_factory=dict)
    traffic: dict[str, dict[int, Peak]] = field(default_factory=dict)

    def raised_to(self, other: Peaks) -> Peaks:
        """The higher of both, rate by rate."""
        products = {key: peak.raised_to(other.products[key]) for key, peak in self.products.items()}
        traffic = {
            key: {size: peak.raised_to(other.traffic[key][size]) for size, peak in peaks.items()}
            for key, peaks in self.traffic.items()
        }
        return Peaks(products, traffic)

    def bandwidth(self, processor: str, size: int) -> Peak:
        """GB/s for something of `size` bytes: the highest rate of any buffer as large, or of the largest."""
        peaks = self.traffic[processor]
        return max((peak for buffer, peak in peaks.items() if buffer >= min(size, max(peaks))), key=lambda p: p.rate)


BACKENDS = getattr(backends, "BACKENDS", {})


def describe_machine(device: str = "cpu", tf32: bool = False) -> dict[str, Any]:
    """Processors, versions, load and time, as JSON can hold them. Call it before the machine is made busy."""
    return {
        "cpu": cpu_model(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "caches": caches(),
        "memory": memory(),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "gpu": cuda.describe_gpu() if device == "cuda" else None,
        "float32": "TF32 allowed on a GPU" if tf32 else "IEEE",
        "torch": torch.__version__,
        "numpy": numpy.__version__,
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


def caches(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> dict[str, int]:
    """Bytes of each cache that holds data, by name; nothing where Linux does not tell."""
    found = {}
    for folder in sorted(root.glob("index*")):
        level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            found[f"L{level}"] = int(size.removesuffix("K")) * 1024
    return found


def memory(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes of memory; None where Linux does not tell."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal"))


def measure_peaks(cases: Sequence[Case], quick: bool) -> Peaks:
    """The peaks that the cases can be compared with."""
    sizes, buffers = (QUICK_SIZES, QUICK_BUFFERS) if quick else (SIZES, BUFFERS)
    products = {product_key(case): (case.dtype, case.threads, sizes[case.device], case.device) for case in cases}
    traffic = {case.processor: (case.threads, buffers[case.device], case.device) for case in cases}
    return Peaks(
        {key: measure_products(*kind) for key, kind in products.items()},
        {key: measure_traffic(*kind) for key, kind in traffic.items()},
    )


def measure_products(dtype: torch.dtype, number: int, sizes: tuple[int, ...], device: str = "cpu") -> Peak:
    """GFLOP/s: the best of torch.mm over square matrices and, where fastenc measures it, of its own kernel."""
    peak = Peak(0.0, "")
    with threads(number):
        for size in sizes:
            a, b, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
            best = shortest(partial(torch.mm, a, b, out=out), max(1, 2**24 // size**3), device)
            peak = peak.raised_to(Peak(2 * size**3 / best, f"torch.mm of {size} x {size} matrices"))
    own = own_peak(dtype, number) if device == "cpu" else None
    return peak if own is None else peak.raised_to(Peak(own, "fastenc's own kernel"))


def measure_traffic(number: int, buffers: tuple[int, ...], device: str = "cpu") -> dict[int, Peak]:
    """GB/s of copying half of each buffer onto its other half, reads and writes counted, as STREAM counts them."""
    peaks = {}
    with threads(number):
        for size in buffers:
            source, target = torch.zeros(size // 4, device=device).chunk(2)
            best = shortest(partial(target.copy_, source), max(1, 2**22 // size), device)
            peaks[size] = Peak(size / best, f"copying within {size >> 10:,} KiB")
    return peaks


def shortest(call: Callable[[], object], calls: int, device: str) -> float:
    """The fewest nanoseconds that a call takes, over a tenth of a second."""
    take: Sample = sample if device == "cpu" else cuda.sample_calls
    best = take(call, calls, time.perf_counter_ns)
    deadline = time.monotonic() + 0.1
    while time.monotonic() < deadline:
        best = min(best, take(call, calls, time.perf_counter_ns))
    return best


def own_peak(dtype: torch.dtype, number: int) -> float | None:
    """What `fastenc.backends.cpu.peak_gflops(dtype, threads)` measures; None where this build has no such kernel."""
    try:
        backend = importlib.import_module("fastenc.backends.cpu")
    except ModuleNotFoundError:
        return None
    measure = getattr(backend, "peak_gflops", None)
    return None if measure is None else measure(dtype, number)


def product_key(case: Case) -> str:
    """One for each dtype and number of threads, or GPU."""
    return f"{dtype_name(case.dtype)}, {case.processor}"
