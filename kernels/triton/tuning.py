"""Which configuration a launch uses: the one measured on this GPU if there is one, else the default.

Nothing is measured unless asked for: `with searching():` around launches measures the candidates of each that runs.
What was measured is kept in `store.STORE`, under keys that name the GPU, Triton's version, the source of the kernels
and the problem, so that nothing measured elsewhere or for other kernels is believed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from .configs import MAX_CANDIDATES, Config
from .device import precision, target
from .store import STORE, Entry

# Milliseconds of device time that a call takes.
Timer = Callable[[Callable[[], object]], float]

# What is known of each problem met: its measured configuration, or None. Emptied by `forget`.
_known: dict[tuple[Any, ...], Config | None] = {}
_search: Search | None = None  # for all threads: autograd launches from threads of its own


def config_for(
    kernel_name: str,
    x: Tensor,
    shape: tuple[Any, ...],
    default: Callable[[], Config],
    candidates: Callable[[], list[Config]],
    run: Callable[[Config], object],
) -> Config:
    """The configuration for a launch of `kernel_name` on x's device; not to be changed by the caller.

    Args:
        shape: the number of rows, of which only the power of two that holds it counts, then whatever else tells
            problems apart.
        default: the configuration where none was measured.
        candidates: what a search measures, at most MAX_CANDIDATES.
        run: launches with a given configuration; writes to memory of its own.
    """
    problem = (kernel_name, x.dtype, precision(x.dtype), bucket(shape[0]), *shape[1:])
    key = (x.device if x.is_cuda else target(x.device), problem)
    if _search is not None and not capturing(x.device):
        config = _known[key] = _search.best(problem, x.device, default, candidates, run)
        return config
    try:
        known = _known[key]
    except KeyError:
        known = _known[key] = _config_in(STORE.get(_name("config", problem, x.device)))
    return default() if known is None else known


def bucket(M: int) -> int:
    """The power of two that M is rounded up to; 0 for 0."""
    return 1 << (M - 1).bit_length() if M > 0 else 0


def capturing(device: torch.device) -> bool:
    """Whether launches on the current stream go into a CUDA graph, where nothing can be measured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Search:
    """Measures each problem once, and keeps the best configuration of it."""

    def __init__(self, timer: Timer) -> None:
        self.timer = timer
        self.found: dict[str, Config] = {}
        self.unwritten: str | None = None  # why what was found is not in the file

    def best(
        self,
        problem: tuple[Any, ...],
        device: torch.device,
        default: Callable[[], Config],
        candidates: Callable[[], list[Config]],
        run: Callable[[Config], object],
    ) -> Config:
        name = _name("config", problem, device)
        if name not in self.found:
            self.found[name] = self._measure(name, default(), candidates(), run)
        return self.found[name]

    def _measure(self, name: str, default: Config, candidates: list[Config], run: Callable[[Config], object]) -> Config:
        configs = [default, *(candidate for candidate in candidates if candidate != default)][:MAX_CANDIDATES]
        times = [self._time(functools.partial(run, config)) for config in configs]
        fastest = min(range(len(configs)), key=times.__getitem__)
        if times[fastest] < float("inf"):  # else none ran, and the launch with the default says why
            entry = {"config": configs[fastest], "ms": times[fastest], "default_ms": times[0]}
            self.unwritten = STORE.put({name: entry}) or self.unwritten
        return configs[fastest]

    def _time(self, launch: Callable[[], object]) -> float:
        try:
            return self.timer(launch)
        except (TritonError, RuntimeError):  # does not compile for this GPU, or takes more than it has
            return float("inf")


def device_time(launch: Callable[[], object]) -> float:
    """The median of many runs of a launch, in milliseconds on the device, with a cold L2 cache."""
    return triton.testing.do_bench(launch, warmup=10, rep=50, return_mode="median")


@contextlib.contextmanager
def searching(timer: Timer = device_time) -> Iterator[Search]:
    """Measure the candidates of every launch inside the block, and keep the best: on disk, if that can be written."""
    global _search
    before, _search = _search, Search(timer)
    try:
        yield _search
    finally:
        _search = before


def forget() -> None:
    """Look everything up again, in the file."""
    _known.clear()
    STORE.forget()


def choice(kind: tuple[Any, ...], device: torch.device) -> Entry | None:
    """What `choose` kept under `kind`."""
    return STORE.get(_name("choice", kind, device))


def choose(kind: tuple[Any, ...], device: torch.device, entry: Entry) -> str | None:
    """Keep a measured choice between the kernels and something else. Why it is not in the file, or None."""
    return STORE.put({_name("choice", kind, device): entry})


def _config_in(entry: Entry | None) -> Config | None:
    config = None if entry is None else entry.get("config")
    if isinstance(config, dict) and config and all(type(value) is int for value in config.values()):
        return config
    return None


def _name(what: str, problem: tuple[Any, ...], device: torch.device) -> str:
    """The key in the file: what was measured, on what, of which problem."""
    return f"{what}|{environment(device)}|{' '.join(str(part).removeprefix('torch.') for part in problem)}"


def environment(device: torch.device) -> str:
    """What figures depend on beside the problem: GPU, architecture, Triton's version, the kernels' source."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreted"
    return f"{gpu} sm_{target(device).arch}|triton {triton.__version__}|{source_hash()}"


@functools.cache
def source_hash(folder: Path = Path(__file__).parent) -> str:
    """Changes with every change of a kernel or launcher."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
