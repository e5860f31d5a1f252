"""The operators `torch.ops.fastenc.*` and the choice of backend. The only user of `torch.library`.

`M` rows, `K` in features, `N` out features; `x [M, K]`, `weight [N, K]`, `bias [N]`.

- `dense_forward(x, weight, bias?, activation, save) -> (out, preact)`: `out = activation(x @ weight.T + bias)`;
  `preact` is the value before the activation if the derivative needs it and `save`, else empty.
- `dense_backward(grad_out, x, weight, saved, activation, output_mask) -> (grad_x, grad_weight, grad_bias)`: `saved`
  is `preact` if there is one, else `out`; what the mask leaves out is an empty tensor.
- `encoder_forward(x, weights, biases, activations, save) -> results`: the stack. With `save`, the outputs of all
  layers, then the pre-activations of those that need them; without, the last output alone.
- `encoder_backward(grad_out, x, weights, results, activations, output_mask) -> grads`: `output_mask` and `grads` are
  x, then weight and bias of each layer.

The everyday path in `functional.py` calls a backend's functions directly; these operators are what tracing
(`torch.compile`, `torch.export`) and vmap see. They choose their backend when they run.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import Library

from .activation import ACTIVATIONS, get_activation
from .backends import BACKENDS, choice, reference, rule

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


_library = Library("fastenc", "DEF")
_library.define("dense_forward(Tensor x, Tensor weight, Tensor? bias, str activation, bool save) -> (Tensor, Tensor)")
_library.define(
    "dense_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor saved, str activation, bool[3] output_mask) "
    "-> (Tensor, Tensor, Tensor)"
)
_library.define(
    "encoder_forward(Tensor x, Tensor[] weights, Tensor?[] biases, str[] activations, bool save) -> Tensor[]"
)
_library.define(
    "encoder_backward(Tensor grad_out, Tensor x, Tensor[] weights, Tensor[] results, str[] activations, "
    "bool[] output_mask) -> Tensor[]"
)


def _dense_forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save: bool):
    backend = select(x, [weight], [bias], [activation], save) or reference
    return backend.dense_forward(x, weight, bias, activation, save)


def _dense_backward(grad_out, x, weight, saved, activation, output_mask):
    backend = select(x, [weight], [None], [activation], True) or reference
    return backend.dense_backward(grad_out, x, weight, saved, activation, output_mask)


def _encoder_forward(x, weights, biases, activations, save):
    backend = select(x, weights, biases, activations, save) or reference
    return backend.encoder_forward(x, weights, biases, activations, save)


def _encoder_backward(grad_out, x, weights, results, activations, output_mask):
    backend = select(x, weights, [None] * len(weights), activations, True) or reference
    if backend is reference:
        return _reference_encoder_backward(grad_out, x, weights, results, activations, output_mask)
    return backend.encoder_backward(grad_out, x, weights, results, activations, output_mask)


def _reference_encoder_backward(grad_out, x, weights, results, activations, output_mask):
    grad_results: list[Tensor | None] = [None] * len(results)
    grad_results[len(weights) - 1] = grad_out
    grads = reference.encoder_backward(grad_results, x, weights, results, activations, output_mask)
    return [x.new_empty(0) if grad is None else grad for grad in grads]


def _dense_forward_fake(x, weight, bias, activation, save):
    out = x.new_empty((x.shape[0], weight.shape[0]))
    needs_preact = save and get_activation(activation).saves_preact
    return out, torch.empty_like(out) if needs_preact else x.new_empty(0)


def _dense_backward_fake(grad_out, x, weight, saved, activation, output_mask):
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return tuple(x.new_empty(shape if wanted else 0) for shape, wanted in zip(shapes, output_mask, strict=True))


def _encoder_forward_fake(x, weights, biases, activations, save):
    outs = [x.new_empty((x.shape[0], weight.shape[0])) for weight in weights]
    preacts = [
        torch.empty_like(out)
        for out, activation in zip(outs, activations, strict=True)
        if get_activation(activation).saves_preact
    ]
    return outs + preacts if save else outs[-1:]


def _encoder_backward_fake(grad_out, x, weights, results, activations, output_mask):
    shapes = [x.shape]
    for weight in weights:
        shapes += [weight.shape, weight.shape[:1]]
    return [x.new_empty(shape if wanted else 0) for shape, wanted in zip(shapes, output_mask, strict=True)]


def _again() -> bool:
    """Whether the backward pass that runs now is to be differentiated again: then by the formulas of `reference`.

    torch.compile cannot differentiate twice, and traces with gradients on.
    """
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _dense_setup(ctx, inputs, output) -> None:
    x, weight, bias, activation, save = inputs
    out, preact = output
    saves_preact = get_activation(activation).saves_preact
    if saves_preact and not save:
        preact = torch.nn.functional.linear(x, weight, bias)
    ctx.set_materialize_grads(False)
    ctx.activation = activation
    ctx.save_for_backward(x, weight, preact if saves_preact else None if activation == "identity" else out)


def _dense_forward_backward(ctx, grad_out, grad_preact):
    x, weight, saved = ctx.saved_tensors
    saved = grad_out if saved is None else saved
    mask = [bool(wanted) for wanted in ctx.needs_input_grad[:3]]
    if not get_activation(ctx.activation).saves_preact:
        grad_preact = None  # of an empty tensor
    if grad_out is None and grad_preact is None:
        return None, None, None, None, None
    if grad_preact is None and not _again():
        grads = torch.ops.fastenc.dense_backward(grad_out, x, weight, saved, ctx.activation, mask)
    else:
        if grad_out is not None:
            from_out = get_activation(ctx.activation).backward(grad_out, saved)
            grad_preact = from_out if grad_preact is None else grad_preact + from_out
        grads = reference.linear_backward(grad_preact, x, weight, mask)
    return *(grad if wanted else None for grad, wanted in zip(grads, mask, strict=True)), None, None


def _encoder_setup(ctx, inputs, output) -> None:
    x, weights, _biases, activations, save = inputs
    ctx.set_materialize_grads(False)
    ctx.save = save
    ctx.activations = activations
    ctx.depth = len(weights)
    ctx.count = len(output)
    ctx.save_for_backward(x, *weights, *output)


def _encoder_forward_backward(ctx, grad_results):
    if not ctx.save:
        raise RuntimeError("fastenc::encoder_forward was called with save=False; its gradient needs save=True")
    x, *rest = ctx.saved_tensors
    weights, results = rest[: ctx.depth], rest[ctx.depth :]
    needs_x, *needs_lists = ctx.needs_input_grad[:3]
    # A list without tensors (no layer has a bias) counts as one input, which needs nothing.
    needs_weights, needs_biases = ([needs] * ctx.depth if isinstance(needs, bool) else needs for needs in needs_lists)
    mask = [bool(needs_x)]
    for needs_weight, needs_bias in zip(needs_weights, needs_biases, strict=True):
        mask += [bool(needs_weight), bool(needs_bias)]
    only_last = all(grad is None for i, grad in enumerate(grad_results) if i != ctx.depth - 1)
    if only_last and grad_results[ctx.depth - 1] is not None and not _again():
        grads = torch.ops.fastenc.encoder_backward(
            grad_results[ctx.depth - 1], x, weights, results, ctx.activations, mask
        )
    else:
        grads = reference.encoder_backward(grad_results, x, weights, results, ctx.activations, mask)
    grads = [grad if wanted else None for grad, wanted in zip(grads, mask, strict=True)]
    of_biases = None if isinstance(needs_lists[1], bool) else grads[2::2]
    return grads[0], grads[1::2], of_biases, None, None


def _dense_forward_vmap(info, in_dims, x, weight, bias, activation, save):
    dims = in_dims[:3]
    if dims[1] is None and dims[2] is None:
        # Only x is batched: more rows of one product.
        x = x.movedim(dims[0], 0)
        rows = x.shape[:2]
        out, preact = torch.ops.fastenc.dense_forward(x.reshape(-1, x.shape[-1]), weight, bias, activation, save)
        out = out.unflatten(0, rows)
        preact = preact.unflatten(0, rows) if preact.dim() > 1 else preact
    else:
        x, weight, bias = (
            t if t is None else t.movedim(dim, 0) if dim is not None else t.expand(info.batch_size, *t.shape)
            for t, dim in zip((x, weight, bias), dims, strict=True)
        )
        out, preact = reference.dense_forward(x, weight, bias, activation, save)
    return (out, preact), (0, 0 if preact.dim() > 1 else None)


for _name, _run, _fake in (
    ("dense_forward", _dense_forward, _dense_forward_fake),
    ("dense_backward", _dense_backward, _dense_backward_fake),
    ("encoder_forward", _encoder_forward, _encoder_forward_fake),
    ("encoder_backward", _encoder_backward, _encoder_backward_fake),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastenc::{_name}", _fake, lib=_library)
torch.library.register_autograd(
    "fastenc::dense_forward", _dense_forward_backward, setup_context=_dense_setup, lib=_library
)
torch.library.register_autograd(
    "fastenc::encoder_forward", _encoder_forward_backward, setup_context=_encoder_setup, lib=_library
)
torch.library.register_vmap("fastenc::dense_forward", _dense_forward_vmap, lib=_library)


@functools.cache
def describe_kernels() -> str | None:
    """Give the CPU's kernels, `torch.ops.fastenc_cpu`, fakes, so that a compiler can call them by themselves.

    They are the operators above, but for activations and masks as numbers. Why there are none, in words, or None.
    """
    if reason := BACKENDS["cpu"].why_unavailable():
        return reason
    names = tuple(ACTIVATIONS)
    fakes: dict[str, Callable[..., Any]] = {
        "dense_forward": lambda x, w, b, code, save: _dense_forward_fake(x, w, b, names[code], save),
        "dense_backward": lambda grad, x, w, saved, code, *mask: _dense_backward_fake(grad, x, w, saved, code, mask),
        "encoder_forward": lambda x, w, b, codes, save: _encoder_forward_fake(x, w, b, [names[c] for c in codes], save),
        "encoder_backward": _encoder_backward_fake,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"fastenc_cpu::{name}", fake)
    return None
