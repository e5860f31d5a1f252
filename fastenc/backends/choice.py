"""What `auto` chooses between a GPU backend and eager PyTorch: as measured by `fastenc.tune`, else by `rule`.

Backends are asked in the order of KERNELS. One says yes if it is faster than eager PyTorch and not slower than those
after it that are usable: those before it could not take the layers, or were slower. What was measured was so for all of
them at once; what was not in that measurement is not chosen.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import gpu, rule

KERNELS = {"cuda": rule.CUDA, "triton": rule.TRITON}


class Verdict(NamedTuple):
    """Whether the kernels are chosen where `auto` chooses, and why in words."""

    chosen: bool
    reason: str


def verdict(
    backend: str,
    is_narrow: Callable[[Sequence[int]], bool],
    x: Tensor,
    weights: Sequence[Tensor],
    activations: Sequence[str],
    training: bool,
) -> Verdict:
    """Whether these layers are to run on the backend of this name, which takes them.

    is_narrow: whether its kernels take a stack of layers with the outputs given to it.
    """
    return _verdict(backend, is_narrow, problem_of(x, weights, activations, training), x.device)


def problem_of(x: Tensor, weights: Sequence[Tensor], activations: Sequence[str], training: bool) -> rule.Problem:
    """What a verdict depends on, beside the device."""
    return rule.Problem(
        x.shape[0],
        (x.shape[1], *(weight.shape[0] for weight in weights)),
        tuple(activations),
        x.dtype,
        x.dtype != torch.float32 or gpu.allows_tf32(),
        training,
        rule.as_if_captured.get() or (x.is_cuda and torch.cuda.is_current_stream_capturing()),
    )


@functools.lru_cache(maxsize=4096)
def _verdict(
    backend: str, is_narrow: Callable[[Sequence[int]], bool], problem: rule.Problem, device: torch.device
) -> Verdict:
    later = list(KERNELS)[list(KERNELS).index(backend) + 1 :]
    measured = tuning().choice(_kind(problem), device) if tuning() else None
    if measured is not None:
        times = {name: measured[f"{name}_us"] for name in ("eager", *KERNELS) if f"{name}_us" in measured}
        ours = times.get(backend, float("inf"))
        chosen = ours < times["eager"] and all(ours <= times.get(name, ours) for name in later)
        named = (f"{name} {time:.4g}" for name, time in times.items())
        return Verdict(chosen, f"measured, in us: {', '.join(named).replace('eager', 'eager PyTorch')}")
    if len(problem.activations) > 1 and not is_narrow(problem.widths[1:]):
        return Verdict(False, "too wide or too deep a stack for one kernel")
    ratio = _modelled(backend, problem, device)
    words = f"modelled, not measured: eager PyTorch takes {ratio:.2g} times as long"
    for name in later:
        if _modelled(name, problem, device) > ratio and _is_usable(name):
            return Verdict(False, f"{words}, and {name} less")
    return Verdict(ratio * rule.GAIN > 1, words)


@functools.lru_cache(maxsize=4096)
def none_wins(problem: rule.Problem, device: torch.device) -> bool:
    """Whether no usable backend says yes to such layers. False too where none is usable: that is worth a word."""
    usable = [name for name in KERNELS if _is_usable(name)]
    return bool(usable) and not any(_verdict(name, _backend(name).is_narrow, problem, device).chosen for name in usable)


def _modelled(backend: str, problem: rule.Problem, device: torch.device) -> float:
    return rule.ratio(problem, gpu.arch(device), KERNELS[backend])


def _is_usable(backend: str) -> bool:
    return _backend(backend).why_unavailable() is None


def _backend(name: str) -> Any:
    return importlib.import_module(f"fastenc.backends.{name}")


def choose(problem: rule.Problem, device: torch.device, microseconds: Mapping[str, float]) -> str | None:
    """Keep what was measured, for as many rows up to a power of two. Why it is not on disk, in words, or None.

    microseconds: of "eager", and of each backend measured; of equals the first is chosen.
    """
    _verdict.cache_clear()
    none_wins.cache_clear()
    fastest = min(microseconds, key=microseconds.__getitem__)
    times = {f"{name}_us": time for name, time in microseconds.items()}
    entry: dict[str, Any] = {"backend": fastest, **times, "of": str(problem)}
    return tuning().choose(_kind(problem), device, entry)


def _kind(problem: rule.Problem) -> tuple[Any, ...]:
    build = gpu.build()
    return (torch.__version__, build.get("cuda"), build.get("commit"), *problem._replace(M=tuning().bucket(problem.M)))


@functools.cache
def tuning() -> Any:
    """The module `fastenc.kernels.tuning`; None where Triton, whose timers it has, cannot be imported."""
    try:
        return importlib.import_module("fastenc.kernels.tuning")
    except Exception:  # whatever a broken installation raises; the Triton backend says what
        return None


def forget() -> None:
    """Decide afresh, by what the cache on disk holds now."""
    _verdict.cache_clear()
    none_wins.cache_clear()
    if tuning():
        tuning().forget()
