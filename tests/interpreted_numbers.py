"""What Triton 3.8's interpreter computes otherwise than a GPU, mended: bfloat16, rounding, TF32, precision of sums.

bfloat16 is kept as its bits in uint16. Triton's own code then adds, compares and multiplies those as integers, and cuts
where a GPU rounds. Here arithmetic on it is done in fp32 and rounded to nearest even, as a GPU does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

SHORT_FLOATS = (tl.bfloat16, tl.float16, tl.float32)


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits, uint16, as fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """fp32 to bfloat16 bits, to the nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded).reshape(values.shape)


def to_tf32(values: np.ndarray) -> np.ndarray:
    """fp32 with the 13 low bits cleared: Triton compiles no conversion, and tensor cores leave these bits unread."""
    return (np.ascontiguousarray(values).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def mend() -> None:
    """Replace the methods of Triton's InterpreterBuilder that compute otherwise than a GPU."""
    InterpreterBuilder.cast_impl = _cast
    InterpreterBuilder.create_dot = _dot
    for name in ("binary_op", "unary_op", "create_fma", "create_clampf"):
        setattr(InterpreterBuilder, name, _in_fp32(getattr(InterpreterBuilder, name)))
    InterpreterBuilder.create_erf = _erf
    # Off on a GPU too, but for debugging; here it would only take time.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    interpreter.interpreter_builder.codegen_fns["min_dot_size"] = _min_dot_size


def _floats(handle: TensorHandle) -> np.ndarray:
    return widen(handle.data) if handle.dtype.scalar == tl.bfloat16 else handle.data


def _cast(self: InterpreterBuilder, source: TensorHandle, kind: tl.dtype) -> TensorHandle:
    values = _floats(source)
    if kind.scalar == tl.bfloat16:
        return TensorHandle(to_bfloat16(values.astype(np.float32)), tl.bfloat16)
    return TensorHandle(values.astype(interpreter._get_np_dtype(kind)), kind.scalar)


def _in_fp32(method: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """The method, with bfloat16 arguments widened and the result, if fp32 then, rounded."""

    @wraps(method)
    def widened(self: InterpreterBuilder, *args: Any) -> TensorHandle:
        short = [isinstance(arg, TensorHandle) and arg.dtype.scalar == tl.bfloat16 for arg in args]
        if not any(short):
            return method(self, *args)
        wide = (
            TensorHandle(widen(a.data), tl.float32) if is_short else a for a, is_short in zip(args, short, strict=True)
        )
        out = method(self, *wide)
        if out.data.dtype == np.float32:
            out = TensorHandle(to_bfloat16(out.data), tl.bfloat16)
        return out

    return widened


_triton_dot = InterpreterBuilder.create_dot


def _dot(
    self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, start: TensorHandle, precision: Any, imprecise: Any
) -> TensorHandle:
    """Short floats are multiplied and summed in fp32, and rounded once if the result is shorter."""
    if a.dtype.scalar not in SHORT_FLOATS:
        return _triton_dot(self, a, b, start, precision, imprecise)
    left, right = (_floats(operand).astype(np.float32, copy=False) for operand in (a, b))
    if a.dtype.scalar == tl.float32 and precision == interpreter._ir.INPUT_PRECISION.TF32:
        left, right = to_tf32(left), to_tf32(right)
    out = np.matmul(left, right) + _floats(start)
    return _cast(self, TensorHandle(out.astype(np.float32, copy=False), tl.float32), start.dtype.scalar)


def _erf(self: InterpreterBuilder, arg: TensorHandle) -> TensorHandle:
    """In fp64, then rounded: the same numbers as Triton's loop over math.erf, at once."""
    values = torch.from_numpy(np.ascontiguousarray(arg.data, np.float64))
    return TensorHandle(torch.erf(values).numpy().astype(arg.data.dtype).reshape(arg.data.shape), arg.dtype.scalar)


def _min_dot_size(left: tl.dtype, right: tl.dtype) -> tuple[int, int, int]:
    """The least M, N and K of a dot on a GPU."""
    return 1, 1, {8: 32, 32: 8, 64: 4}.get(left.scalar.primitive_bitwidth, 16)
