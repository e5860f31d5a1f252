"""Where there is no GPU: Triton's interpreter, mended, with every load and store checked and counted.

Import this before the kernels. Then for each launch
- a load or store outside the elements of the tensors that the launch was given is OutOfBounds: past their ends, or
  between the rows of a sliced one;
- two programs that store to one address, and a program that loads what another stores, are a Race, as is one store with
  an address twice; programs run in shuffled order, always the same;
- lanes that tl.load masks off without `other` are NaN, or a large integer;
- `watched()` tells how many bytes were loaded and stored.

Where there is a GPU, importing this does nothing, and the same tests run compiled.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from threadpoolctl import ThreadpoolController

INTERPRETED = not torch.cuda.is_available()
if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton and the kernels are imported
pytest.importorskip("triton", reason="triton is not installed")

import triton.language as tl  # noqa: E402
from triton.runtime import JITFunction, interpreter  # noqa: E402

NOBODY, SEVERAL = 0, -1  # beside the numbers of programs, which begin at 1


class OutOfBounds(AssertionError):  # noqa: N818
    """An access outside of the elements of the tensors that the launch was given."""


class Race(AssertionError):  # noqa: N818
    """Accesses of which the order is not fixed, one of them a store."""


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, in bytes: each address once, as must cross the memory bus, and all that was requested.

    flops: two for each product in a tl.dot, of padding too.
    """

    kernel: str
    grid: tuple[int, ...]
    loaded: int
    stored: int
    requested_loads: int
    requested_stores: int
    flops: int


_watchers: list[list[Launch]] = []


@contextlib.contextmanager
def watched() -> Iterator[list[Launch]]:
    """The launches inside the block, in order; none where kernels are compiled."""
    launches: list[Launch] = []
    _watchers.append(launches)
    try:
        yield launches
    finally:
        _watchers.pop()


class Storage:
    """Memory that tensors of a launch lie in: which of its units belong to them, and who touched each.

    A unit is as long as an element of the smallest of their types.
    """

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.names = ", ".join(tensors)
        memory = next(iter(tensors.values())).untyped_storage()
        self.begin, self.bytes = memory.data_ptr(), memory.nbytes()
        self.unit = min(tensor.element_size() for tensor in tensors.values())
        self.inside = np.zeros(self.bytes // self.unit, bool)
        self.reader = np.zeros(len(self.inside), np.int32)
        self.writer = np.zeros(len(self.inside), np.int32)
        for tensor in tensors.values():
            ratio = tensor.element_size() // self.unit
            strides = (*(stride * ratio * self.inside.strides[0] for stride in tensor.stride()), self.inside.strides[0])
            first = self.inside[tensor.storage_offset() * ratio :]
            np.lib.stride_tricks.as_strided(first, (*tensor.shape, ratio), strides)[...] = True

    def units(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """The units of elements of `size` bytes at these addresses, [elements] int64."""
        offsets = (addresses - np.uint64(self.begin)).view(np.int64)
        if (offsets & (size - 1)).any():
            raise OutOfBounds(f"an access of {size} bytes to {self.names} is not aligned to its size")
        units = offsets // self.unit
        if size > self.unit:
            units = (units[:, None] + np.arange(size // self.unit)).ravel()
        outside = offsets > self.bytes - size
        if outside.any() or not self.inside[units].all():
            outside[~outside] = ~self.inside[units.reshape(len(offsets), -1)[~outside]].all(1)
            raise OutOfBounds(
                f"{outside.sum()} of {len(offsets)} lanes are outside of every tensor of the launch; the first is at "
                f"element {offsets[outside][0] // size} of the {self.bytes // size} that {self.names} lie in"
            )
        return units

    def load(self, units: np.ndarray, program: int) -> None:
        writers = self.writer[units]
        if ((writers != NOBODY) & (writers != program)).any():
            raise Race(f"it loads from {self.names} what another program stored")
        readers = self.reader[units]
        self.reader[units] = np.where((readers == NOBODY) | (readers == program), program, SEVERAL)

    def store(self, units: np.ndarray, program: int) -> None:
        writers, readers = self.writer[units], self.reader[units]
        if ((writers != NOBODY) & (writers != program)).any():
            raise Race(f"it stores to {self.names} where another program stored")
        if ((readers != NOBODY) & (readers != program)).any():
            raise Race(f"it stores to {self.names} what another program loads")
        lanes = np.arange(len(units), dtype=np.int32)
        self.writer[units] = lanes
        if (self.writer[units] != lanes).any():
            raise Race(f"one tl.store to {self.names} has an address twice")
        self.writer[units] = program


class Running:
    """The launch that is being interpreted."""

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel
        self.requested = {"load": 0, "store": 0}
        self.flops = 0
        self.patched: set[int] = set()

    def give(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """These tensors, by name, and no others may be loaded from and stored to."""
        by_storage: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors:
            if tensor.numel():
                by_storage.setdefault(tensor.untyped_storage().data_ptr(), {})[name] = tensor
        self.storages = [Storage(by_storage[begin]) for begin in sorted(by_storage)]
        self.begins = np.array([storage.begin for storage in self.storages], np.uint64)

    def begin(self, grid: tuple[int, int, int]) -> None:
        self.grid = grid
        self.order = list(np.ndindex(grid))
        random.Random(0).shuffle(self.order)

    def next_program(self) -> tuple[int, int, int]:
        self.index = self.order.pop()
        self.program = 1 + int(np.ravel_multi_index(self.index, self.grid))
        return self.index

    def access(self, what: str, pointers: Any, mask: np.ndarray) -> None:
        """Check and count a load or a store of the elements at `pointers` where `mask` holds."""
        addresses = pointers.data.ravel() if mask.all() else pointers.data[np.broadcast_to(mask, pointers.data.shape)]
        if not len(addresses):
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        self.requested[what] += size * len(addresses)
        first, last = np.searchsorted(self.begins, [addresses.min(), addresses.max()], "right") - 1
        try:
            if first < 0:
                raise OutOfBounds("it is before every tensor of the launch")
            for number in range(first, last + 1):
                storage = self.storages[number]
                here = addresses
                if first < last:
                    here = addresses[np.searchsorted(self.begins, addresses, "right") - 1 == number]
                getattr(storage, what)(storage.units(here, size), self.program)
        except AssertionError as error:
            raise type(error)(f"{self.kernel}, program {self.index}, tl.{what}: {error}") from None

    def finished(self) -> Launch:
        loaded = sum(int(np.count_nonzero(storage.reader)) * storage.unit for storage in self.storages)
        stored = sum(int(np.count_nonzero(storage.writer)) * storage.unit for storage in self.storages)
        requested = self.requested["load"], self.requested["store"]
        return Launch(self.kernel, self.grid, loaded, stored, *requested, self.flops)


_running = Running("")


def _tensors(name: str, arg: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in an argument of a launch: itself, in tuples, under descriptors."""
    if isinstance(arg, tuple):
        for i, part in enumerate(arg):
            yield from _tensors(f"{name}[{i}]", part)
    elif isinstance(arg, interpreter.TensorDescriptor):
        yield from _tensors(name, arg.base)
    elif hasattr(arg, "data_ptr"):
        yield name, interpreter._unwrap_tensor(arg)


def _check_launches() -> None:
    """Replace what Triton does at the beginning of launches and programs, and at loads and stores."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    launch, to_host = executor.__call__, executor._init_args_hst
    set_grid, set_program = builder.set_grid_dim, builder.set_grid_idx
    load, store, dot = builder.create_masked_load, builder.create_masked_store, builder.create_dot
    patch_language = interpreter._patch_lang
    blas = ThreadpoolController().select(user_api="blas")

    def checked_launch(self: Any, *args: Any, **kwargs: Any) -> None:
        global _running
        _running = Running(self.fn.__name__)
        try:
            # A GPU does not warn of Inf and NaN; and tiles are so small that threads only wait for each other.
            with np.errstate(all="ignore"), blas.limit(limits=1):
                launch(self, *args, **kwargs)
        except interpreter.InterpreterError as error:
            cause: BaseException = error
            while isinstance(cause, interpreter.InterpreterError) and cause.__cause__:
                cause = cause.__cause__
            raise cause from None
        for launches in _watchers:
            launches.append(_running.finished())

    def note_arguments(self: Any, args: Any, kwargs: Any) -> Any:
        host_args, host_kwargs = to_host(self, args, kwargs)
        named = {**dict(zip(self.arg_names, host_args, strict=False)), **host_kwargs}
        _running.give(tensor for name, arg in named.items() for tensor in _tensors(name, arg))
        return host_args, host_kwargs

    def patch_language_once(fn: Any) -> Any:
        """Triton does it at each call of a function in a kernel, which takes long; once for a launch is enough."""
        if id(fn.__globals__) in _running.patched:
            return interpreter._LangPatchScope()
        _running.patched.add(id(fn.__globals__))
        return patch_language(fn)

    def set_checked_grid(self: Any, *grid: int) -> None:
        _running.begin(grid)
        set_grid(self, *grid)

    def set_shuffled_program(self: Any, *_: int) -> None:
        set_program(self, *_running.next_program())

    def checked_load(self: Any, pointers: Any, mask: Any, other: Any, *hints: Any, **named_hints: Any) -> Any:
        held = _mask(mask)
        _running.access("load", pointers, held)
        if other is None and not held.all():
            other = _poison(pointers)
        return load(self, pointers, mask, other, *hints, **named_hints)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *hints: Any) -> Any:
        _running.access("store", pointers, _mask(mask))
        return store(self, pointers, value, mask, *hints)

    def counted_dot(self: Any, left: Any, right: Any, *rest: Any) -> Any:
        _running.flops += 2 * left.data.size * right.data.shape[-1]
        return dot(self, left, right, *rest)

    def refuse_atomic(self: Any, *args: Any) -> None:
        raise Race(f"{_running.kernel}: an atomic; its order, and so the last bits of a sum, change from run to run")

    executor.__call__, executor._init_args_hst = checked_launch, note_arguments
    builder.set_grid_dim, builder.set_grid_idx = set_checked_grid, set_shuffled_program
    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    builder.create_dot = counted_dot
    interpreter._patch_lang = patch_language_once
    builder.create_atomic_rmw = builder.create_atomic_cas = refuse_atomic


def _mask(mask: Any) -> np.ndarray:
    """As bools: what Triton computes with `&` may be int8. Under a descriptor the mask is the array itself."""
    return np.asarray(mask.data).astype(bool, copy=False)


def _poison(pointers: Any) -> Any:
    """NaN, or the largest integer, for each of the pointers."""
    kind = pointers.get_element_ty()
    dtype = interpreter._get_np_dtype(kind)
    if kind == tl.bfloat16:
        value: Any = 0x7FC0
    elif dtype.kind == "f":
        value = np.nan
    else:
        value = True if dtype.kind == "b" else np.iinfo(dtype).max
    return interpreter.TensorHandle(np.full(pointers.data.shape, value, dtype), kind)


@functools.cache
def _interpretable(fn: Any) -> Any:
    return interpreter.InterpretedFunction(fn)


def _interpret_library() -> None:
    """Let kernels call Triton's library where something else imported it before, and it was made for compiling."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _interpretable(self.fn)(*args, **kwargs)

    JITFunction.__call__ = call
    for name, member in [*vars(tl.tensor).items()]:
        if isinstance(member, JITFunction):
            setattr(tl.tensor, name, functools.partialmethod(member))


if INTERPRETED:
    import interpreted_numbers
    import interpreted_types

    _interpret_library()

    interpreted_numbers.mend()
    interpreted_types.keep()
    _check_launches()
