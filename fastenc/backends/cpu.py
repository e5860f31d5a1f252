"""The CPU backend: the C++ kernels of `csrc/cpu`, as the operators `fastenc_cpu::*` of the extension `fastenc._C`."""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..activation import activation_code, activation_codes

NAME = "cpu"
DEVICE = "cpu"

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (Tensor, torch.nn.Parameter)


@functools.cache
def why_unavailable() -> str | None:
    """Loads the extension; why that failed, in words, or None."""
    try:
        importlib.import_module("fastenc._C")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError):
            return "the C++ extension fastenc._C is not built; reinstall fastenc where there is a C++ compiler"
        return f"the C++ extension fastenc._C cannot be loaded ({error}); reinstall fastenc with this torch"
    return None


@functools.cache
def _extension():
    return importlib.import_module("fastenc._C")


@functools.cache
def eager_operators():
    """`torch.ops.fastenc_eager`: whole layers with their autograd in C++; None if not built for this torch.

    `dense(x, weight, bias, code)` and `encoder(x, weights, biases, codes)` choose by themselves between the kernels and
    ATen, take any leading dimensions, and follow autocast.
    """
    if why_unavailable():
        return None
    tag = re.sub(r"\W", "_", torch.__version__)
    libraries = sorted(Path(__file__).parents[1].glob(f"_eager_{tag}.*"))
    if not libraries:
        return None
    torch.ops.load_library(str(libraries[0]))
    return torch.ops.fastenc_eager


def why_not(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why these kernels cannot take x [M, K], weight [N, K] and bias [N] or None; None if they can."""
    if reason := why_unavailable():
        return reason
    if type(x) not in _PLAIN or type(weight) not in _PLAIN or x.layout != torch.strided:
        return f"x and weight are {type(x).__name__} and {type(weight).__name__}, not plain dense tensors"
    if not (x.is_cpu and weight.is_cpu):
        return f"the kernels run on the CPU; x is on {x.device}, weight on {weight.device}"
    dtype = x.dtype
    if dtype not in DTYPES or weight.dtype != dtype:
        return f"the kernels take fp32, bf16 or fp16; x is {dtype}, weight {weight.dtype}"
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        return f"shapes do not match: x {tuple(x.shape)}, weight {tuple(weight.shape)}"
    if bias is not None and (
        type(bias) not in _PLAIN or not bias.is_cpu or bias.dtype != dtype or bias.shape != weight.shape[:1]
    ):
        return f"bias is {bias.dtype} {tuple(bias.shape)} on {bias.device}; it must be {dtype} ({weight.shape[0]},)"
    return None


def verdict(x: Tensor, weights: Sequence[Tensor], activations: Sequence[str], training: bool) -> tuple[bool, str]:
    """Whether these layers are faster here than in eager PyTorch, and why in words. csrc/eager.cpp asks the same."""
    if len(weights) == 1 and leaves(x, weights[0], training, in_stack=False):
        return False, "without AVX-512 eager PyTorch's product is as fast, and needs no packing of weights"
    return True, "fastest for these arguments"


def parts(x: Tensor, weights: Sequence[Tensor], training: bool) -> list[slice]:
    """A stack cut where a layer is wide enough to be left to eager PyTorch. csrc/eager.cpp does the same."""
    cut, first = [], 0
    for i, weight in enumerate(weights):
        if leaves(x, weight, training, in_stack=len(weights) > 1):
            cut += [slice(first, i)] * (i > first) + [slice(i, i + 1)]
            first = i + 1
    return cut + [slice(first, len(weights))] * (len(weights) > first)


def leaves(x: Tensor, weight: Tensor, training: bool, in_stack: bool) -> bool:
    """Whether a layer over the rows of x is left to eager PyTorch, as without AVX-512 wide ones are."""
    if x.dtype is not torch.float32 or weight.dim() != 2 or x.dim() == 0 or (features := x.shape[-1]) == 0:
        return False
    return _extension().leaves_to_aten(x.numel() // features, *weight.shape, training, in_stack)


def leaves_steps(batch: int, weight: Tensor) -> bool:
    """Whether fp32 training steps of a stack with this layer are left to eager PyTorch, one operation after another."""
    return _extension().leaves_steps_to_aten(batch, *weight.shape)


def dense_forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save: bool) -> tuple[Tensor, Tensor]:
    """See `fastenc::dense_forward`."""
    return torch.ops.fastenc_cpu.dense_forward.default(x, weight, bias, activation_code(activation), save)


def dense_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, saved: Tensor, activation: str, output_mask: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """See `fastenc::dense_backward`."""
    return torch.ops.fastenc_cpu.dense_backward.default(
        grad_out, x, weight, saved, activation_code(activation), *map(int, output_mask)
    )


def encoder_forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], activations: Sequence[str], save: bool
) -> list[Tensor]:
    """See `fastenc::encoder_forward`."""
    return torch.ops.fastenc_cpu.encoder_forward.default(x, weights, biases, activation_codes(activations), save)


def encoder_backward(
    grad_out: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    results: Sequence[Tensor],
    activations: Sequence[str],
    output_mask: Sequence[bool],
) -> list[Tensor]:
    """See `fastenc::encoder_backward`."""
    return torch.ops.fastenc_cpu.encoder_backward.default(
        grad_out, x, weights, results, activation_codes(activations), list(map(int, output_mask))
    )


def describe() -> str:
    """What the kernels use in this process, for example "avx512, brgemm for float32 and bfloat16"."""
    return _configuration[-1] if _configuration else configure("auto", True)


_configuration: list[str] = []


def configure(isa: str, brgemm: bool) -> str:
    """Choose the instruction set ("auto", "generic", "avx2", "avx512") and whether libtorch's brgemm may be used.

    Process-wide; not while kernels run. Returns what is now in use. Raises ValueError if this CPU lacks `isa`,
    RuntimeError if there are no kernels at all.
    """
    if reason := why_unavailable():
        raise RuntimeError(f"the cpu backend is not available: {reason}")
    _configuration[:] = [torch.ops.fastenc_cpu.configure.default(isa, brgemm)]
    return _configuration[-1]


@contextlib.contextmanager
def configured(isa: str, brgemm: bool) -> Iterator[str]:
    """`configure` for a while."""
    try:
        yield configure(isa, brgemm)
    finally:
        configure("auto", True)


def peak_gflops(dtype: torch.dtype, threads: int) -> float:
    """10^9 floating-point operations a second of brgemm on `threads` threads; 0 where there is none.

    Measured now, on tiles of an encoder's size held in cache: the peak to compare the kernels with.
    """
    if why_unavailable() or dtype not in (torch.float32, torch.bfloat16):
        return 0.0
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        return torch.ops.fastenc_cpu.brgemm_gflops.default(dtype == torch.bfloat16)
    finally:
        torch.set_num_threads(before)
