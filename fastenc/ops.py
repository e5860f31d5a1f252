"""The choice of backend: which kernels run which layers, forced, recorded, or each where it is fastest."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .backends import BACKENDS, choice, rule

CHOICES = ("auto", *BACKENDS)

_forced: ContextVar[str] = ContextVar("fastenc_backend", default="auto")
_recorder: ContextVar[list[Decision] | None] = ContextVar("fastenc_recorder", default=None)
_ON_DEVICE = {
    device: [backend for backend in BACKENDS.values() if device == backend.DEVICE] for device in ("cpu", "cuda")
}


class Decision(NamedTuple):
    """Which backend runs some layers, and why."""

    rows: int
    widths: tuple[int, ...]  # of the input, then of each layer
    activations: tuple[str, ...]
    biases: tuple[bool, ...]  # whether each layer has one
    dtype: torch.dtype
    backend: str
    reason: str

    @property
    def shapes(self) -> str:
        """For people, for example "32 rows, 784-128-64, float32"."""
        return f"{self.rows} rows, {'-'.join(map(str, self.widths))}, {str(self.dtype).removeprefix('torch.')}"

    def __str__(self) -> str:
        return f"{self.shapes}: {self.backend} ({self.reason})"


class use_backend:  # noqa: N801 - used as a function and in a with statement
    """Run the fused layers on `name`: "auto" (each where it is fastest), "cpu", "cuda", "triton" or "reference".

    "cuda" and "triton" are our kernels for GPUs, in C++ and in Triton; "reference" is ATen, on any device.
    `use_backend("reference")` holds from here on, in this thread; `with use_backend("reference"):` for the block.
    A forced backend that cannot take some arguments is not used for them (`explain` says why).

    Raises:
        ValueError: there is no such backend.
        RuntimeError: the backend cannot run in this process; the message says why.
    """

    def __init__(self, name: str) -> None:
        if name not in CHOICES:
            raise ValueError(f"unknown backend {name!r}; choose one of {', '.join(CHOICES)}")
        if name != "auto" and (reason := BACKENDS[name].why_unavailable()):
            raise RuntimeError(f"backend {name!r} is not available: {reason}")
        self._token = _forced.set(name)

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exc: object) -> None:
        _forced.reset(self._token)


@contextlib.contextmanager
def record() -> Iterator[list[Decision]]:
    """Collect the decisions made meanwhile in this thread."""
    records: list[Decision] = []
    token = _recorder.set(records)
    try:
        yield records
    finally:
        _recorder.reset(token)


def forced_backend() -> str:
    """What `use_backend` asks for in this thread; "auto" by default."""
    return _forced.get()


@contextlib.contextmanager
def as_if_captured() -> Iterator[None]:
    """Choose backends meanwhile, in this thread, as within a CUDA graph: in the steps before one is recorded."""
    token = rule.as_if_captured.set(True)
    try:
        yield
    finally:
        rule.as_if_captured.reset(token)


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"fastenc runs on eager PyTorch: {reason}", RuntimeWarning, stacklevel=4)


def everyday():
    """The operators for CPU tensors that choose for themselves, if nothing is forced or recorded and they are there."""
    if _forced.get() != "auto" or _recorder.get() is not None:
        return None
    return BACKENDS["cpu"].eager_operators()


def select(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[str],
    training: bool,
    drops: bool = False,
) -> ModuleType | None:
    """The backend to run these layers on; None for plain eager PyTorch. x is [M, K].

    training: whether gradients follow; drops: whether dropout is to be part of it. On a GPU this is on the path of
    every call: what it costs, each layer pays.
    """
    forced = _forced.get()
    candidates = _ON_DEVICE.get(x.device.type, []) if forced == "auto" else [BACKENDS[forced]]
    if forced == "auto" and x.is_cuda and _recorder.get() is None and _none_wins(x, weights, activations, training):
        return None  # without asking for reasons that nobody reads
    reasons, unavailable = [], []
    for backend in candidates:
        reason = _why_not(backend, x, weights, biases)
        if reason is not None:
            if forced == "auto" and (lacks := backend.why_unavailable()):
                unavailable.append(lacks)
        elif drops and not hasattr(backend, "encoder_train"):
            reason = "its kernels have no dropout, so that the layers run one by one"
        elif forced != "auto":
            return _decide(x, weights, biases, activations, backend, "asked for")
        else:
            chosen, reason = backend.verdict(x, weights, activations, training)
            if chosen:
                return _decide(x, weights, biases, activations, backend, reason)
        reasons.append(f"{backend.NAME}: {reason}")
    if unavailable and len(unavailable) == len(candidates):
        _warn_once("; ".join(unavailable))
    reason = "; ".join(reasons) or f"there are no kernels for tensors on {x.device}"
    return _decide(x, weights, biases, activations, None, reason)


def _none_wins(x: Tensor, weights: Sequence[Tensor], activations: Sequence[str], training: bool) -> bool:
    """Whether eager PyTorch is chosen for these layers whatever else there is to say of them. False: not known."""
    if x.dim() != 2 or any(weight.dim() != 2 for weight in weights):
        return False
    return choice.none_wins(choice.problem_of(x, weights, activations, training), x.device)


def parts(x: Tensor, weights: Sequence[Tensor], training: bool) -> list[slice] | None:
    """How to cut a stack so that each part can run in one kernel; None for not at all."""
    forced = _forced.get()
    for backend in _ON_DEVICE.get(x.device.type, []) if forced == "auto" else [BACKENDS[forced]]:
        by_choice = backend.DEVICE == "cpu"  # GPU kernels take no longer stack, those of the CPU would
        if hasattr(backend, "parts") and backend.why_unavailable() is None and (forced == "auto" or not by_choice):
            found = backend.parts(x, weights, training)
            return found if len(found) > 1 else None
    return None


def _why_not(backend: ModuleType, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> str | None:
    if reason := backend.why_not(x, weights[0], biases[0]):
        return reason
    for below, weight, bias in zip(weights, weights[1:], biases[1:], strict=False):
        # The layers above take what the ones below give: a stand-in of the right width, dtype and device.
        if reason := backend.why_not(below.detach().t(), weight, bias):
            return reason
    return None


def _decide(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[str],
    backend: ModuleType | None,
    reason: str,
) -> ModuleType | None:
    recorder = _recorder.get()
    if recorder is not None:
        if backend is not None and hasattr(backend, "describe"):
            reason = f"{reason}; {backend.describe()}"
        recorder.append(
            Decision(
                x.shape[0],
                (x.shape[-1], *(weight.shape[0] for weight in weights)),
                tuple(activations),
                tuple(bias is not None for bias in biases),
                x.dtype,
                backend.NAME if backend else "eager PyTorch",
                reason,
            )
        )
    return backend
