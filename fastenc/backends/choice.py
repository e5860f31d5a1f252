"""What `auto` chooses between a GPU backend and eager PyTorch: as measured by `fastenc.tune`, else by `rule`.

One measurement compares all that were there, and the fastest of them is taken. Where nothing was measured, each is
compared with eager PyTorch by the rule, and the first in the order of `BACKENDS` that is faster is taken: by the rule
that is the better one, as launches from C++ cost the host less than Triton's.
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
    measured = tuning().choice(_kind(problem), device) if tuning() else None
    if measured is not None:
        names = {"eager": "eager PyTorch", **{name: name for name in KERNELS if name != backend}}
        others = [f"{name} {measured[f'{key}_us']:.4g}" for key, name in names.items() if f"{key}_us" in measured]
        ours = measured.get(f"{backend}_us")
        words = f"measured: {', '.join(others)}" if ours is None else f"measured: {ours:.4g} us, {', '.join(others)}"
        return Verdict(measured["backend"] == backend, words)
    if len(problem.activations) > 1 and not is_narrow(problem.widths[1:]):
        return Verdict(False, "too wide or too deep a stack for one kernel")
    ratio = rule.ratio(problem, gpu.arch(device), KERNELS[backend])
    words = f"modelled, not measured: eager PyTorch takes {ratio:.2g} times as long"
    return Verdict(ratio * rule.GAIN > 1, words)


def choose(problem: rule.Problem, device: torch.device, microseconds: Mapping[str, float]) -> str | None:
    """Keep what was measured, for as many rows up to a power of two. Why it is not on disk, in words, or None.

    microseconds: of "eager", and of each backend measured; of equals the first is chosen.
    """
    _verdict.cache_clear()
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
    if tuning():
        tuning().forget()
