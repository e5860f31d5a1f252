"""The Triton backend: the kernels of `fastenc.kernels`, for NVIDIA GPUs; interpreted, for tests, on CPU tensors."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..activation import get_activation
from . import choice, gpu, stack

NAME = "triton"
DEVICE = "cuda"

LEAST_TRITON = (3, 7)  # the first that PyTorch 2.13 brings


def why_unavailable() -> str | None:
    """Why no kernel can run in this process, in words, or None. Imports Triton."""
    if reason := _why_not_imported():
        return reason
    reason = gpu.why_no_gpu()
    return None if reason and _kernels().interpreted() else reason


@functools.cache
def _why_not_imported() -> str | None:
    try:
        version = importlib.import_module("triton").__version__
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return 'triton is not installed; it comes with PyTorch\'s CUDA builds, or run: pip install "triton>=3.7"'
        return f"triton is installed, but cannot be imported ({error}); reinstall it"
    except Exception as error:  # whatever a broken installation raises
        return f"triton is installed, but cannot be imported ({error}); reinstall it"
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < LEAST_TRITON:
        least = ".".join(map(str, LEAST_TRITON))
        return f'triton {version} is too old for the kernels; run: pip install "triton>={least}"'
    try:
        _kernels()
    except Exception as error:
        return f"the kernels cannot be imported with triton {version} ({error}); install another version of it"
    return None


@functools.cache
def _kernels() -> SimpleNamespace:
    """The launchers, and what else of `fastenc.kernels` is used here; imported when first asked."""
    from ..kernels import device, tuning
    from ..kernels.dense_backward import dense_backward
    from ..kernels.dense_forward import dense_forward
    from ..kernels.encoder_backward import encoder_backward
    from ..kernels.encoder_forward import encoder_forward
    from ..kernels.encoder_plan import is_narrow

    return SimpleNamespace(
        interpreted=device.interpreted,
        tuning=tuning,
        dense_forward=dense_forward,
        dense_backward=dense_backward,
        encoder_forward=encoder_forward,
        encoder_backward=encoder_backward,
        is_narrow=is_narrow,
    )


def describe() -> str:
    """What runs the kernels in this process, for example "triton 3.8.0"."""
    version = importlib.import_module("triton").__version__
    return f"triton {version}, interpreted on CPU tensors" if _kernels().interpreted() else f"triton {version}"


def why_not(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why these kernels cannot take x [M, K], weight [N, K] and bias [N] or None; None if they can."""
    if reason := _why_not_imported():
        return reason
    return gpu.why_not(x, weight, bias, x.is_cpu and _kernels().interpreted())


def verdict(x: Tensor, weights: Sequence[Tensor], activations: Sequence[str], training: bool) -> choice.Verdict:
    """Whether these layers are faster here than in eager PyTorch, see `choice`."""
    return choice.verdict(NAME, is_narrow, x, weights, activations, training)


def is_narrow(widths: Sequence[int]) -> bool:
    """Whether one kernel takes a stack with these outputs; the last may be wide, as may the input."""
    return _kernels().is_narrow(widths)


def tuning() -> Any:
    """The module `fastenc.kernels.tuning`."""
    return _kernels().tuning


def parts(x: Tensor, weights: Sequence[Tensor], training: bool) -> list[slice]:
    """A stack cut into what runs in one kernel: runs of narrow layers, and single ones."""
    return stack.parts(tuple(weight.shape[0] if weight.dim() else 0 for weight in weights), is_narrow)


def _on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Launch on the device of the first argument: Triton launches on the current one."""

    @functools.wraps(launch)
    def guarded(first: Tensor, *args: Any) -> Any:
        if first.is_cuda and first.get_device() != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return launch(first, *args)
        return launch(first, *args)

    return guarded


@_on_its_device
def dense_forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save: bool) -> tuple[Tensor, Tensor]:
    """See `fastenc::dense_forward`."""
    return _kernels().dense_forward(x, weight, bias, activation, save)


@_on_its_device
def dense_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, saved: Tensor, activation: str, output_mask: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """See `fastenc::dense_backward`."""
    return _kernels().dense_backward(grad_out.resolve_neg(), x, weight, saved, activation, output_mask)


@_on_its_device
def encoder_forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], activations: Sequence[str], save: bool
) -> list[Tensor]:
    """See `fastenc::encoder_forward`. One launch for a narrow stack; others go layer by layer."""
    kernels = _kernels()
    if kernels.is_narrow([weight.shape[0] for weight in weights]):
        return kernels.encoder_forward(x, weights, biases, activations, "all" if save else "nothing")
    return stack.forward(kernels.dense_forward, x, weights, biases, activations, save)


@_on_its_device
def encoder_train(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[str],
    dropouts: Sequence[float],
    seed: Tensor | None,
) -> list[Tensor | None]:
    """A narrow stack, or one layer, with what its gradients need and no more: as `encoder_forward`, or None.

    dropouts: of each layer's output, the probability of dropping; seed: int64 [1], None without dropout.
    """
    kernels = _kernels()
    if len(weights) == 1:
        out, preact = kernels.dense_forward(x, weights[0], biases[0], activations[0], True, dropouts[0], seed)
        return [out, preact] if get_activation(activations[0]).saves_preact else [out]
    return kernels.encoder_forward(x, weights, biases, activations, "needed", dropouts, seed)


@_on_its_device
def encoder_train_backward(
    grad_out: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    results: Sequence[Tensor | None],
    activations: Sequence[str],
    output_mask: Sequence[bool],
    dropouts: Sequence[float],
    seed: Tensor | None,
) -> list[Tensor]:
    """As `encoder_backward`, from what `encoder_train` kept."""
    kernels = _kernels()
    grad_out = grad_out.resolve_neg()
    if len(weights) == 1:
        saved = results[-1]
        return list(
            kernels.dense_backward(
                grad_out, x, weights[0], saved, activations[0], tuple(output_mask), dropouts[0], seed
            )
        )
    return kernels.encoder_backward(grad_out, x, weights, biases, results, activations, output_mask, dropouts, seed)


@_on_its_device
def encoder_backward(
    grad_out: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    results: Sequence[Tensor],
    activations: Sequence[str],
    output_mask: Sequence[bool],
) -> list[Tensor]:
    """See `fastenc::encoder_backward`."""
    kernels = _kernels()
    grad_out = grad_out.resolve_neg()
    if kernels.is_narrow([weight.shape[0] for weight in weights]):
        # All was saved, so that nothing is found again from the biases.
        return kernels.encoder_backward(grad_out, x, weights, [None] * len(weights), results, activations, output_mask)
    return stack.backward(kernels.dense_backward, grad_out, x, weights, results, activations, output_mask)
