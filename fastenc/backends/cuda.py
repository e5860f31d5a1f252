"""The CUDA backend: the C++ kernels of `csrc/cuda`, as the operators `fastenc_cuda::*` of the extension
`fastenc._C_cuda`, for NVIDIA GPUs. In tests the same operators take CPU tensors, on which the kernels are emulated.

Narrow stacks are ours in both directions, as are dense layers where `rule.fuses` says that one kernel takes less time.
Where it does not, cuBLAS makes the products, through ATen: forward `F.linear` and PyTorch's activation, backward our
one pass that writes dZ and sums the bias's gradient, then two `torch.mm`. That holds for a forced backend as well.

Of cuBLASLt's epilogues, which `torch._addmm_activation` offers, relu's gives 0 for NaN where PyTorch gives NaN
(NVIDIA developer forum, topic 329783), and so is not used. That of gelu (by tanh) is, in inference, as it gives no
pre-activation, and for the 16-bit types, as it is not said how exact it is.

The operators wait for nothing and allocate by PyTorch alone: there is nothing to do to capture them in a CUDA graph.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..activation import activation_code, activation_codes
from . import choice, gpu, reference, rule, stack

NAME = "cuda"
DEVICE = "cuda"

WIDEST = 128  # as kWidest and kDeepest of csrc/cuda/launch.h
DEEPEST = 8
FROM_SOURCE = "reinstall fastenc from source: pip install --no-build-isolation <folder>"


def why_unavailable() -> str | None:
    """Why no kernel can run in this process, in words, or None. Loads the extension where there is a GPU for it."""
    if emulated():
        return None
    return gpu.why_no_gpu() or _why_not_loaded() or _why_not_built_for(torch.cuda.current_device())


@functools.cache
def emulated() -> bool:
    """Whether the operators were built over csrc/simt and take CPU tensors."""
    there = hasattr(torch.ops.fastenc_cuda, "dense_forward")
    return there and torch._C._dispatch_has_kernel_for_dispatch_key("fastenc_cuda::dense_forward", "CPU")


@functools.cache
def _why_not_loaded() -> str | None:
    """Loads the extension; why that failed, in words, or None."""
    cuda = torch.version.cuda or ""
    major = cuda.partition(".")[0]
    built_with = gpu.build().get("cuda")
    if built_with is None:
        return f"the CUDA kernels are not built; where there is an nvcc of CUDA {major}, {FROM_SOURCE}"
    if built_with.partition(".")[0] != major:
        return (
            f"the CUDA kernels are built for CUDA {built_with}, and this PyTorch is for {cuda}; "
            f"where there is an nvcc of CUDA {major}, {FROM_SOURCE}"
        )
    try:
        importlib.import_module("fastenc._C_cuda")
    except ImportError as error:
        return f"the CUDA kernels cannot be loaded ({error}); {FROM_SOURCE}"
    return None


@functools.cache
def _why_not_built_for(index: int) -> str | None:
    """Why the extension has no code for this GPU, in words, or None."""
    listed = gpu.build()["cuda_archs"]
    capability = torch.cuda.get_device_capability(index)
    for arch in re.split(r"[;, ]+", listed):
        known = re.fullmatch(r"(\d+)\.(\d+)(a?)f?(\+PTX)?", arch)
        if known is None:
            return None  # a name, such as Ampere, that PyTorch knows
        least = int(known[1]), int(known[2])
        same_major = capability[0] == least[0] and not known[3]
        if capability == least or (capability > least and (same_major or known[4])):
            return None
    wanted = ".".join(map(str, capability))
    return (
        f"the CUDA kernels are built for GPUs {listed}, and {torch.cuda.get_device_name(index)} has compute capability "
        f"{wanted}; set TORCH_CUDA_ARCH_LIST={wanted} and {FROM_SOURCE}"
    )


def describe() -> str:
    """What the kernels are in this process, for example "built with CUDA 13.0.88 for 8.0;9.0+PTX"."""
    if emulated():
        return "emulated on CPU tensors"
    build = gpu.build()
    return f"built with CUDA {build['cuda']} for {build['cuda_archs']}"


def why_not(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why these kernels cannot take x [M, K], weight [N, K] and bias [N] or None; None if they can."""
    if x.is_cuda and (reason := _why_not_loaded() or _why_not_built_for(cast(int, x.device.index))):
        return reason
    return gpu.why_not(x, weight, bias, x.is_cpu and emulated())


def verdict(x: Tensor, weights: Sequence[Tensor], activations: Sequence[str], training: bool) -> choice.Verdict:
    """Whether these layers are faster here than in eager PyTorch, see `choice`."""
    if x.dtype.itemsize == 2 and not (_lies_well(x) and all(map(_lies_well, weights))):
        return choice.Verdict(False, "x or a weight lies in memory so that 16-bit numbers must be loaded one by one")
    return choice.verdict(NAME, is_narrow, x, weights, activations, training)


def _lies_well(matrix: Tensor) -> bool:
    """Whether the kernels can copy 4 bytes or more at once: rows together, at even distances from an even place."""
    return matrix.stride(1) == 1 and matrix.stride(0) % 2 == 0 and matrix.data_ptr() % 4 == 0


def is_narrow(widths: Sequence[int]) -> bool:
    """Whether one kernel takes a stack with these outputs [N_1, ..., N_L]; the last may be wide, as may the input."""
    return 2 <= len(widths) <= DEEPEST and min(widths) > 0 and max(widths[:-1]) <= WIDEST


def parts(x: Tensor, weights: Sequence[Tensor], training: bool) -> list[slice]:
    """A stack cut into what runs in one kernel: runs of narrow layers, and single ones."""
    return stack.parts(tuple(weight.shape[0] if weight.dim() else 0 for weight in weights), is_narrow)


def dense_forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save: bool) -> tuple[Tensor, Tensor]:
    """See `fastenc::dense_forward`."""
    (M, K), N, tf32 = x.shape, weight.shape[0], gpu.allows_tf32()
    if _fuses(M, N, K, activation, x.dtype, tf32, x.device)[0]:
        return _operators.dense_forward(x, weight, bias, activation_code(activation), save, tf32)
    if activation == "gelu_tanh" and not save and bias is not None and x.dtype.itemsize == 2:
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=True), x.new_empty(0)
    return reference.dense_forward(x, weight, bias, activation, save)


def dense_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, saved: Tensor, activation: str, output_mask: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """See `fastenc::dense_backward`."""
    (M, K), N, tf32 = x.shape, weight.shape[0], gpu.allows_tf32()
    code = activation_code(activation)
    want_x, want_weight, want_bias = output_mask
    if _fuses(M, N, K, activation, x.dtype, tf32, x.device)[1]:
        return _operators.dense_backward(grad_out, x, weight, saved, code, want_x, want_weight, want_bias, tf32)
    products = want_x or want_weight
    grad_preact, grad_bias = grad_out, grad_out.new_empty(0)
    if want_bias or (products and activation != "identity"):
        writes = products and activation != "identity"
        dz, grad_bias = _operators.preact_gradient(grad_out, saved, code, writes, want_bias)
        grad_preact = dz if writes else grad_out
    return (
        torch.mm(grad_preact, weight) if want_x else grad_out.new_empty(0),
        torch.mm(grad_preact.t(), x) if want_weight else grad_out.new_empty(0),
        grad_bias,
    )


@functools.lru_cache(maxsize=4096)
def _fuses(
    M: int, N: int, K: int, activation: str, dtype: torch.dtype, tf32: bool, device: torch.device
) -> tuple[bool, bool]:
    """`rule.fuses` of a dense layer; where nothing is to be computed, the operators know what to give."""
    if 0 in (M, N, K):
        return True, True
    tensor_cores = dtype != torch.float32 or tf32
    problem = rule.Problem(M, (K, N), (activation,), dtype, tensor_cores, training=True, captured=True)
    return rule.fuses(problem, gpu.arch(device), rule.CUDA)


def encoder_forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], activations: Sequence[str], save: bool
) -> list[Tensor]:
    """See `fastenc::encoder_forward`. One launch for a narrow stack; others go layer by layer."""
    if not is_narrow([weight.shape[0] for weight in weights]):
        return stack.forward(dense_forward, x, weights, biases, activations, save)
    codes = activation_codes(activations)
    return _operators.encoder_forward(x, weights, biases, codes, save, gpu.allows_tf32())


def encoder_backward(
    grad_out: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    results: Sequence[Tensor],
    activations: Sequence[str],
    output_mask: Sequence[bool],
) -> list[Tensor]:
    """See `fastenc::encoder_backward`."""
    if not is_narrow([weight.shape[0] for weight in weights]):
        return stack.backward(dense_backward, grad_out, x, weights, results, activations, output_mask)
    wanted = list(map(int, output_mask))
    codes = activation_codes(activations)
    return _operators.encoder_backward(grad_out, x, weights, results, codes, wanted, gpu.allows_tf32())


class _Operators:
    """The overloads of `torch.ops.fastenc_cuda`, each looked up when first asked for."""

    def __getattr__(self, name: str) -> Any:
        operator = getattr(torch.ops.fastenc_cuda, name).default
        setattr(self, name, operator)
        return operator


class _Named:
    """The same, each call of which Nsight Systems shows."""

    def __getattr__(self, name: str) -> Any:
        operator = getattr(_plain, name)

        def named(first: Tensor, *args: Any) -> Any:
            with torch.cuda.nvtx.range(f"fastenc {name} {list(first.shape)}"):
                return operator(first, *args)

        return named


_plain = _Operators()
_operators: _Operators | _Named = _plain


def name_launches(on: bool) -> None:
    """Show the launches of these kernels in Nsight Systems, as NVTX ranges with the operator's name and the shape of
    its first tensor: `nsys profile --trace=cuda,nvtx python program.py`. In all threads, from here on; off by default,
    when it costs nothing.
    """
    global _operators
    _operators = _Named() if on else _plain
