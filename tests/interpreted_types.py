"""What takes Triton 3.8's interpreter a third of its time, made once: the types and shapes of the tensors in a kernel.

Each operation makes a type, looks the type's shape over, and wraps every extent of it, several times. Nothing that a
kernel can see is different afterwards.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from triton.language import core
from triton.runtime import interpreter


def keep() -> None:
    """Replace the methods of Triton that make again what they made before."""
    core.block_type.__init__ = _init_block_type
    core.block_type.name = property(lambda self: f"<{self.shape}, {self.element_ty}>")  # seldom asked for
    core.tensor.__init__ = _init_tensor
    interpreter._get_np_dtype = _numpy_type


class _Shape(NamedTuple):
    shape: core.tuple  # of plain numbers
    numel: int
    wrapped: tuple[core.tuple, core.constexpr]  # both as constants of a kernel


@functools.cache
def _shape(extents: tuple[Any, ...]) -> _Shape:
    """Raises Triton's own errors for a shape that a block may not have."""
    shape = core.tuple(core._unwrap_shape(extents))
    if not shape:
        raise TypeError("0d block_type is forbidden")
    return _Shape(shape, core.validate_block_shape(shape), _wrap(shape))


def _wrap(shape: Iterable[int]) -> tuple[core.tuple, core.constexpr]:
    return core.tuple([core.constexpr(extent) for extent in shape]), core.constexpr(math.prod(shape))


_WRAPPED_SCALAR = _wrap(())


def _init_block_type(self: core.block_type, element_ty: core.dtype, shape: Iterable[Any]) -> None:
    self.element_ty = element_ty
    self.shape, self.numel, self.wrapped = _shape(tuple(shape))


def _init_tensor(self: core.tensor, handle: Any, type: core.dtype) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = type.wrapped if type.is_block() else _WRAPPED_SCALAR


_numpy_types: dict[str, np.dtype] = {}
_look_up = interpreter._get_np_dtype


def _numpy_type(kind: core.dtype) -> np.dtype:
    scalar = kind.scalar
    if isinstance(scalar, core.pointer_type):
        return np.dtype(np.uint64)
    if scalar.name not in _numpy_types:
        _numpy_types[scalar.name] = _look_up(scalar)
    return _numpy_types[scalar.name]
