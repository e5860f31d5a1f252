"""The Triton backend: the kernels of `fastenc.kernels`, for NVIDIA GPUs; interpreted, for tests, on CPU tensors."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..activation import get_activation
from . import rule

NAME = "triton"
DEVICE = "cuda"

LEAST_TRITON = (3, 7)  # the first that PyTorch 2.13 brings
LEAST_CAPABILITY = (8, 0)  # the first with bf16 on tensor cores and asynchronous copies
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (Tensor, torch.nn.Parameter)


def why_unavailable() -> str | None:
    """Why no kernel can run in this process, in words, or None. Imports Triton."""
    if reason := _why_not_imported():
        return reason
    reason = _why_no_gpu()
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
def _why_no_gpu() -> str | None:
    if torch.version.hip:
        return "this PyTorch is built for AMD GPUs, on which the kernels have never run"
    if not torch.cuda.is_available():
        built = (
            "has no GPU that it can use; nvidia-smi tells if the driver runs" if torch.version.cuda else "has no CUDA"
        )
        return f"this PyTorch {built}"
    return _why_not_gpu(torch.cuda.current_device())


@functools.cache
def _why_not_gpu(index: int) -> str | None:
    if torch.version.hip:
        return _why_no_gpu()
    capability = torch.cuda.get_device_capability(index)
    if capability >= LEAST_CAPABILITY:
        return None
    name = torch.cuda.get_device_name(index)
    return f"the kernels need compute capability 8.0 or higher; {name} has {capability[0]}.{capability[1]}"


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
        target=device.target,
        precision=device.precision,
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
    if type(x) not in _PLAIN or type(weight) not in _PLAIN or x.layout != torch.strided:
        return f"x and weight are {type(x).__name__} and {type(weight).__name__}, not plain dense tensors"
    device = x.device
    if x.is_cuda:
        if reason := _why_not_gpu(cast(int, device.index)):
            return reason
    elif not (x.is_cpu and _kernels().interpreted()):
        return f"the kernels run on CUDA tensors; x is on {device}"
    if weight.device != device:
        return f"x is on {device} and weight on {weight.device}; they must be on one device"
    dtype = x.dtype
    if dtype not in DTYPES or weight.dtype != dtype:
        return f"the kernels take fp32, bf16 or fp16; x is {dtype}, weight {weight.dtype}"
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        return f"shapes do not match: x {tuple(x.shape)}, weight {tuple(weight.shape)}"
    if x.is_neg() or weight.is_neg() or (bias is not None and bias.is_neg()):
        return "x, weight or bias is a view of the imaginary part of a conjugate, negated when it is read"
    if bias is not None and (
        type(bias) not in _PLAIN or bias.device != device or bias.dtype != dtype or bias.shape != weight.shape[:1]
    ):
        return (
            f"bias is {bias.dtype} {tuple(bias.shape)} on {bias.device}; "
            f"it must be {dtype} ({weight.shape[0]},) on {device}"
        )
    return None


class Verdict(NamedTuple):
    """Whether the kernels are chosen where `auto` chooses, and why in words."""

    chosen: bool
    reason: str


def verdict(x: Tensor, weights: Sequence[Tensor], activations: Sequence[str], training: bool) -> Verdict:
    """Whether these layers are faster here than in eager PyTorch: as measured by `fastenc.tune`, else by `rule`."""
    return _verdict(problem_of(x, weights, activations, training), x.device)


def problem_of(x: Tensor, weights: Sequence[Tensor], activations: Sequence[str], training: bool) -> rule.Problem:
    """What a verdict depends on, beside the device."""
    kernels = _kernels()
    return rule.Problem(
        x.shape[0],
        (x.shape[1], *(weight.shape[0] for weight in weights)),
        tuple(activations),
        x.dtype,
        x.dtype != torch.float32 or kernels.precision(x.dtype) == "tf32",
        training,
        rule.as_if_captured.get() or kernels.tuning.capturing(x.device),
    )


@functools.lru_cache(maxsize=4096)
def _verdict(problem: rule.Problem, device: torch.device) -> Verdict:
    measured = _kernels().tuning.choice(_kind(problem), device)
    if measured is not None:
        times = f"measured: {measured['triton_us']:.4g} us, eager PyTorch {measured['eager_us']:.4g}"
        return Verdict(measured["backend"] == NAME, times)
    if len(problem.activations) > 1 and not _kernels().is_narrow(problem.widths[1:]):
        return Verdict(False, "too wide or too deep a stack for one kernel")
    ratio = rule.ratio(problem, _kernels().target(device).arch)
    words = f"modelled, not measured: eager PyTorch takes {ratio:.2g} times as long"
    return Verdict(ratio * rule.GAIN > 1, words)


def choose(problem: rule.Problem, device: torch.device, triton_us: float, eager_us: float) -> str | None:
    """Keep what was measured, for as many rows up to a power of two. Why it is not on disk, in words, or None."""
    _verdict.cache_clear()
    return _kernels().tuning.choose(
        _kind(problem),
        device,
        {
            "backend": NAME if triton_us < eager_us else "eager",
            "triton_us": triton_us,
            "eager_us": eager_us,
            "of": str(problem),
        },
    )


def _kind(problem: rule.Problem) -> tuple[Any, ...]:
    return (torch.__version__, *problem._replace(M=_kernels().tuning.bucket(problem.M)))


def tuning() -> Any:
    """The module `fastenc.kernels.tuning`."""
    return _kernels().tuning


def forget() -> None:
    """Decide afresh, by what the cache on disk holds now."""
    _verdict.cache_clear()
    _kernels().tuning.forget()


@functools.lru_cache(maxsize=1024)
def parts(widths: tuple[int, ...]) -> list[slice]:
    """A stack with these outputs, cut into what runs in one kernel: runs of narrow layers, and single ones."""
    cut, first = [], 0
    while first < len(widths):
        ends = range(first + 2, len(widths) + 1)
        end = max((end for end in ends if _kernels().is_narrow(widths[first:end])), default=first + 1)
        cut.append(slice(first, end))
        first = end
    return cut


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
    outs, preacts = [], []
    for weight, bias, activation in zip(weights, biases, activations, strict=True):
        x, preact = kernels.dense_forward(x, weight, bias, activation, save)
        outs.append(x)
        if get_activation(activation).saves_preact:
            preacts.append(preact)
    return outs + preacts if save else outs[-1:]


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
    depth = len(weights)
    grads = [x.new_empty(0)] * (2 * depth + 1)
    preact_index = len(results)
    for i in reversed(range(depth)):
        saved = results[i]
        if get_activation(activations[i]).saves_preact:
            preact_index -= 1
            saved = results[preact_index]
        needs_below = any(output_mask[: 2 * i + 1])
        grad_out, grads[2 * i + 1], grads[2 * i + 2] = kernels.dense_backward(
            grad_out,
            x if i == 0 else results[i - 1],
            weights[i],
            saved,
            activations[i],
            (needs_below, output_mask[2 * i + 1], output_mask[2 * i + 2]),
        )
        if not needs_below:
            return grads
    grads[0] = grad_out
    return grads
