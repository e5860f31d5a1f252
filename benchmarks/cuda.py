"""Timing on a GPU: calls as a loop makes them, kernels alone, and both sides as CUDA graphs."""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastenc.training.recorder import CudaRecorder

CALLS, KERNELS, GRAPHS = "calls", "kernels", "graphs"
WAYS = {
    CALLS: "as a loop makes them: the host's clock, synchronised before and after; launches count, the L2 is warm",
    KERNELS: "CUDA events around each call, the L2 flushed before: the GPU's time, unless launching takes longer",
    GRAPHS: "as `kernels`, with each side recorded in a CUDA graph: nothing of the host counts",
}
WARM_UP = 3  # calls before recording, as PyTorch's documentation has it

_SMI = ("driver_version", "pstate", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")


def sample_calls(call: Callable[[], object], calls: int, clock: Callable[[], int]) -> float:
    """Nanoseconds per call over `calls` calls in a row, by the host's clock."""
    torch.cuda.synchronize()
    start = clock()
    for _ in range(calls):
        call()
    torch.cuda.synchronize()
    return (clock() - start) / calls


def sample_kernels(call: Callable[[], object], calls: int, clock: Callable[[], int]) -> float:
    """Nanoseconds per call by CUDA events, each with a flushed L2; writing the flush covers the launch of the call."""
    flush = l2_flush()
    starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(calls)] for _ in range(2))
    for start, end in zip(starts, ends, strict=True):
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return sum(start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)) * 1e6 / calls


SAMPLES = {CALLS: sample_calls, KERNELS: sample_kernels, GRAPHS: sample_kernels}


@functools.cache
def l2_flush() -> Tensor:
    """Memory that, once written, leaves nothing else in the L2."""
    size = torch.cuda.get_device_properties().L2_cache_size
    with torch.inference_mode(False):  # kept for calls outside of it
        return torch.empty(2 * size, dtype=torch.uint8, device="cuda")


def recorded(call: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
    """`call` as a CUDA graph: each replay gives the same tensors, with new values in them."""
    recorder, device = CudaRecorder(), torch.device("cuda", torch.cuda.current_device())
    results: list[tuple[Tensor, ...]] = []
    with recorder.stream(device):
        for _ in range(WARM_UP):
            call()
        replay = recorder.record(lambda: results.append(call()))

    def replayed() -> tuple[Tensor, ...]:
        replay()
        return results[0]

    return replayed


def describe_gpu() -> dict[str, Any]:
    """Name, memory, versions, clocks and the setting of float32 products, as JSON can hold them."""
    properties = torch.cuda.get_device_properties()
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
        "cuda": torch.version.cuda,
        "float32": torch.backends.cuda.matmul.fp32_precision,
        **clocks(torch.cuda.current_device()),
    }


def clocks(index: int) -> dict[str, str]:
    """Driver, state, clocks and power limit, as nvidia-smi tells them; what it does not tell is left out."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    values = done.stdout.strip().split(", ")
    return dict(zip(_SMI, values, strict=True)) if done.returncode == 0 and len(values) == len(_SMI) else {}
