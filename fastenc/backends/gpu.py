"""What the two GPU backends share: which GPUs and tensors their kernels take."""

from __future__ import annotations

import functools
import importlib
from typing import cast

import torch
from torch import Tensor

LEAST_CAPABILITY = (8, 0)  # the first with bf16 on tensor cores and asynchronous copies
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (Tensor, torch.nn.Parameter)


@functools.cache
def why_no_gpu() -> str | None:
    """Why no GPU of this process can run the kernels, in words, or None."""
    if torch.version.hip:
        return "this PyTorch is built for AMD GPUs, on which the kernels have never run"
    if not torch.cuda.is_available():
        built = (
            "has no GPU that it can use; nvidia-smi tells if the driver runs" if torch.version.cuda else "has no CUDA"
        )
        return f"this PyTorch {built}"
    return why_not_gpu(torch.cuda.current_device())


@functools.cache
def why_not_gpu(index: int) -> str | None:
    """As `why_no_gpu`, of one GPU."""
    if torch.version.hip:
        return why_no_gpu()
    capability = torch.cuda.get_device_capability(index)
    if capability >= LEAST_CAPABILITY:
        return None
    name = torch.cuda.get_device_name(index)
    return f"the kernels need compute capability 8.0 or higher; {name} has {capability[0]}.{capability[1]}"


def why_not(x: Tensor, weight: Tensor, bias: Tensor | None, on_cpu: bool) -> str | None:
    """Why the kernels cannot take x [M, K], weight [N, K] and bias [N] or None; None if they can.

    on_cpu: whether they are interpreted or emulated, on tensors of the CPU.
    """
    if type(x) not in _PLAIN or type(weight) not in _PLAIN or x.layout != torch.strided:
        return f"x and weight are {type(x).__name__} and {type(weight).__name__}, not plain dense tensors"
    device = x.device
    if x.is_cuda:
        if reason := why_not_gpu(cast(int, device.index)):
            return reason
    elif not (x.is_cpu and on_cpu):
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


@functools.cache
def build() -> dict[str, str]:
    """What is known of how the extensions were built; nothing where they are not."""
    try:
        return importlib.import_module("fastenc._C").build_info()
    except ImportError:
        return {}


@functools.cache
def arch(device: torch.device) -> int:
    """10 * major + minor of the compute capability; of an A100 for the CPU, where kernels run for tests."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def allows_tf32() -> bool:
    """Whether PyTorch's setting lets products in fp32 be made in TF32."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"
