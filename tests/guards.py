"""Tensors with poison around them, for tests of kernels that get addresses: a stray store is seen, a stray load is NaN.

The poison is one bit pattern, a NaN that no arithmetic makes. Tensors are on `DEVICE`, so this works where kernels are
compiled as well as where they are interpreted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# By size in bytes: the type to write it as, and the pattern. The second is NaN as float16 and as bfloat16; for integers
# these are just large numbers.
PATTERNS = {
    1: (torch.int8, 1),
    2: (torch.int16, 0x7FD5),
    4: (torch.int32, 0x7FC55555),
    8: (torch.int64, 0x7FF8555555555555),
}
# Guards keep a tensor's alignment, and are as long as the rows of the largest tile.
ALIGNMENT = 64
GUARD_ROWS = 128

_made: list[list[Tensor]] = []


def guarded(tensor: Tensor) -> Tensor:
    """The same values, strides and alignment on DEVICE, with poison before, behind and between the rows."""
    strides = tensor.stride()
    view = _surrounded(tuple(tensor.shape), strides, tensor.dtype, tensor.storage_offset() % ALIGNMENT)
    # By position, as elements of an expanded tensor share memory, which copy_ refuses.
    positions = torch.arange(_extent(tensor.shape, strides), device=DEVICE).as_strided(tensor.shape, strides)
    _memory(view)[view.storage_offset() + positions.flatten()] = tensor.detach().to(DEVICE).flatten()
    return view


def poisoned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A contiguous tensor of poison, guarded: an output for a kernel to fill."""
    strides = torch.empty(tuple(shape), device="meta").stride()
    return _surrounded(tuple(shape), strides, dtype, 0)


def assert_guards_intact(tensor: Tensor) -> None:
    """Nothing was written around this tensor, which `guarded` or `poisoned` made."""
    kind, pattern = PATTERNS[tensor.element_size()]
    memory = _memory(tensor).view(kind)
    changed = memory != pattern
    changed.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(False)
    where = changed.nonzero().flatten() - tensor.storage_offset()
    assert not len(where), (
        f"{len(where)} elements around a tensor {list(tensor.shape)} were written; the first is {where[0]:+d} elements "
        "from its beginning"
    )


@contextlib.contextmanager
def guarded_allocations() -> Iterator[None]:
    """torch.empty, Tensor.new_empty and torch.empty_like give poison with guards around it for the time of the block.

    At its end the guards of all that was made so are checked, and of all that `guarded` and `poisoned` made inside.
    """
    _made.append([])
    try:
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
                patch.setattr(owner, name, _poisoning(getattr(owner, name)))
            yield
        for tensor in _made[-1]:
            assert_guards_intact(tensor)
    finally:
        _made.pop()


def _poisoning(allocate: Any) -> Any:
    def allocate_poisoned(*args: Any, **kwargs: Any) -> Tensor:
        plain = allocate(*args, **kwargs)
        if plain.device.type != DEVICE:
            return plain
        return _surrounded(tuple(plain.shape), plain.stride(), plain.dtype, 0)

    return allocate_poisoned


def _surrounded(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, shift: int) -> Tensor:
    """A view of poison, `shift` elements off alignment, inside a larger buffer of it."""
    kind, pattern = PATTERNS[dtype.itemsize]
    guard = GUARD_ROWS * max([1, *strides])
    guard += -guard % ALIGNMENT
    buffer = torch.full((guard + shift + _extent(shape, strides) + guard,), pattern, dtype=kind, device=DEVICE)
    view = buffer.view(dtype).as_strided(shape, strides, guard + shift)
    if _made:
        _made[-1].append(view)
    return view


def _extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last, both counted."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _memory(tensor: Tensor) -> Tensor:
    """All of the tensor's storage, flat."""
    return tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
