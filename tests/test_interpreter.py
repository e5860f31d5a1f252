"""The interpreter's support finds what it is there to find: each mending and each check has a kernel that needs it."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import interpreter
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from guards import DEVICE, guarded, poisoned
from triton.tools.tensor_descriptor import TensorDescriptor

only_interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="kernels are compiled where there is a GPU")


@triton.jit
def copy_kernel(x_ptr, out_ptr, M, N, stride_x, stride_out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out = x, [M, N]; grid (cdiv(M, ROWS),); one program owns ROWS rows."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    x = tl.load(x_ptr + rows[:, None] * stride_x + columns[None, :], mask=inside)
    tl.store(out_ptr + rows[:, None] * stride_out + columns[None, :], x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def loaded_kernel(x_ptr, out_ptr, N, BLOCK: tl.constexpr, MASKED: tl.constexpr, OTHER: tl.constexpr):
    """out = x, [BLOCK], where x has N elements; grid (1,)."""
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < N, other=OTHER) if MASKED else tl.load(x_ptr + i)
    tl.store(out_ptr + i, x)


@triton.jit
def stored_kernel(out_ptr, N, BLOCK: tl.constexpr):
    """out = 1, [BLOCK] of N elements, unmasked; grid (1,)."""
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.full((BLOCK,), 1.0, tl.float32))


@triton.jit
def everywhere_kernel(x_ptr, out_ptr, STORE_AT: tl.constexpr, LOAD_AT: tl.constexpr):
    """out[program * STORE_AT] = x[program * LOAD_AT]; grid of any size."""
    program = tl.program_id(0)
    tl.store(out_ptr + program * STORE_AT, tl.load(x_ptr + program * LOAD_AT))


@triton.jit
def twice_kernel(out_ptr, BLOCK: tl.constexpr):
    """out[i // 2] = i, [BLOCK // 2]; grid (1,)."""
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i // 2, i.to(tl.float32))


@triton.jit
def first_kernel(x_ptr, out_ptr, N, BLOCK: tl.constexpr):
    """out = x, [N], by the first program only; grid of any size."""
    i = tl.arange(0, BLOCK)
    mask = (i < N) & (tl.program_id(0) == 0)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=mask), mask=mask)


@triton.jit
def atomic_kernel(out_ptr):
    """out[0] += 1; grid of any size."""
    tl.atomic_add(out_ptr, 1.0)


@triton.jit
def joined_kernel(x_ptr, y_ptr, out_ptr, HALF: tl.constexpr):
    """out = x then y, each [HALF], in one load; grid (1,)."""
    i = tl.arange(0, 2 * HALF)
    tl.store(out_ptr + i, tl.load(tl.where(i < HALF, x_ptr + i, y_ptr + (i - HALF))))


@triton.jit
def sum_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """out[0] = 2 sum(x) + max(x), [BLOCK], by functions of Triton's library; grid (1,)."""
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(out_ptr, tl.sum(x, 0) + x.sum(0) + tl.max(x, 0))


@triton.jit
def sum_of_tuple_kernel(x_ptrs, out_ptr, BLOCK: tl.constexpr):
    """out = sum of the tensors x, each [BLOCK]; grid (1,)."""
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(len(x_ptrs)):
        total += tl.load(x_ptrs[k] + i)
    tl.store(out_ptr + i, total)


@triton.jit
def descriptor_kernel(x_desc, out_ptr, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TO_M: tl.constexpr):
    """out = x, [M, N] contiguous, by descriptors, where out is said to have TO_M rows; grid (1,)."""
    out_desc = tl.make_tensor_descriptor(out_ptr, [TO_M, N], [N, 1], [BLOCK_M, BLOCK_N])
    out_desc.store([0, 0], x_desc.load([0, 0]))


def numbers(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def copy(x, out, kernel=copy_kernel):
    kernel[(triton.cdiv(len(x), 4),)](x, out, *x.shape, x.stride(0), out.stride(0), ROWS=4, COLUMNS=16)


# What it refuses


@only_interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int32], ids=str)
def test_masked_lanes_without_other_are_poison(dtype):
    x, out = torch.ones(16, dtype=dtype), torch.zeros(16, dtype=dtype)
    loaded_kernel[(1,)](x, out, 10, BLOCK=16, MASKED=True, OTHER=None)
    assert (out[:10] == 1).all()
    assert out[10:].isnan().all() if dtype.is_floating_point else (out[10:] == torch.iinfo(dtype).max).all()
    loaded_kernel[(1,)](x, out, 10, BLOCK=16, MASKED=True, OTHER=0)
    assert (out[10:] == 0).all()


@only_interpreted
def test_a_load_and_a_store_past_the_end_are_caught():
    with pytest.raises(interpreter.OutOfBounds, match=r"loaded_kernel.*tl\.load: 6 of 16 lanes.*x_ptr"):
        loaded_kernel[(1,)](guarded(torch.ones(10)), torch.empty(16), 10, BLOCK=16, MASKED=False, OTHER=None)
    with pytest.raises(interpreter.OutOfBounds, match=r"element 10 of the 10 that x_ptr"):
        loaded_kernel[(1,)](torch.ones(10), torch.empty(16), 10, BLOCK=16, MASKED=False, OTHER=None)
    with pytest.raises(interpreter.OutOfBounds, match=r"stored_kernel.*tl\.store: 6 of 16 lanes.*out_ptr"):
        stored_kernel[(1,)](guarded(torch.ones(10)), 10, BLOCK=16)


@only_interpreted
def test_what_lies_between_the_rows_of_a_slice_is_out_of_bounds():
    whole = numbers(8, 32)
    part = whole[:, 3:13]
    out = torch.empty(8, 10)
    copy(part, out)
    torch.testing.assert_close(out, part, rtol=0, atol=0)
    for x, to in ((part, torch.empty(8, 11)), (numbers(8, 11), part)):
        with pytest.raises(interpreter.OutOfBounds):
            copy_kernel[(2,)](x, to, 8, 11, x.stride(0), to.stride(0), ROWS=4, COLUMNS=16)


@only_interpreted
def test_what_lies_before_is_out_of_bounds():
    memory = torch.ones(8)
    with pytest.raises(interpreter.OutOfBounds, match="before every tensor"):
        everywhere_kernel[(2,)](memory[:2], memory[2:], STORE_AT=1, LOAD_AT=-1)


@only_interpreted
def test_a_swapped_stride_is_caught():
    x, out = numbers(8, 32)[:, :10], torch.empty(8, 10)
    with pytest.raises(interpreter.OutOfBounds):
        copy_kernel[(2,)](x, out, 8, 10, out.stride(0), x.stride(0), ROWS=4, COLUMNS=16)


@only_interpreted
def test_programs_that_store_to_one_address_are_caught():
    with pytest.raises(interpreter.Race, match="where another program stored"):
        everywhere_kernel[(2,)](torch.ones(4), torch.empty(4), STORE_AT=0, LOAD_AT=1)
    everywhere_kernel[(2,)](torch.ones(4), torch.empty(4), STORE_AT=1, LOAD_AT=0)


@only_interpreted
@pytest.mark.parametrize("programs", [3, 4, 5])
def test_a_program_that_loads_what_another_stores_is_caught(programs):
    """Program i stores to x[i] and loads from x[2 i], in whatever order they run."""
    x = torch.ones(16)
    with pytest.raises(interpreter.Race, match="what another program"):
        everywhere_kernel[(programs,)](x, x, STORE_AT=1, LOAD_AT=2)


@only_interpreted
def test_a_load_and_a_store_of_two_programs_clash_in_either_order():
    units = np.arange(4)
    for first, second in (("load", "store"), ("store", "load"), ("store", "store")):
        storage = interpreter.Storage({"x": torch.ones(4)})
        getattr(storage, first)(units, 1)
        getattr(storage, second)(units, 1)
        with pytest.raises(interpreter.Race):
            getattr(storage, second)(units[3:], 2)
    storage = interpreter.Storage({"x": torch.ones(4)})
    storage.load(units, 1)
    storage.load(units, 2)
    with pytest.raises(interpreter.Race):
        storage.store(units, 2)


@only_interpreted
def test_storage_viewed_as_two_types_is_checked_in_the_shorter():
    x = torch.ones(8)
    storage = interpreter.Storage({"x": x[:4], "short": x.view(torch.int16)[10:13]})
    assert (storage.unit, storage.inside.tolist()) == (2, [True] * 8 + [False] * 2 + [True] * 3 + [False] * 3)
    begin = np.uint64(x.data_ptr())
    assert storage.units(np.array([0, 8], np.uint64) + begin, 4).tolist() == [0, 1, 4, 5]
    for address, what in ((6, "not aligned"), (16, "outside"), (24, "outside"), (32, "outside")):
        with pytest.raises(interpreter.OutOfBounds, match=what):
            storage.units(np.array([address], np.uint64) + begin, 4)


@only_interpreted
def test_a_store_with_an_address_twice_is_caught():
    with pytest.raises(interpreter.Race, match="an address twice"):
        twice_kernel[(1,)](torch.empty(8), BLOCK=16)


@only_interpreted
def test_atomics_are_refused():
    with pytest.raises(interpreter.Race, match="an atomic"):
        atomic_kernel[(1,)](torch.zeros(1))


def test_a_mask_with_a_scalar_in_it_masks():
    x, out = guarded(numbers(10)), guarded(torch.zeros(10))
    first_kernel[(3,)](x, out, 10, BLOCK=16)
    torch.testing.assert_close(out, x, rtol=0, atol=0)


@only_interpreted
def test_tensors_in_tuples_are_known_and_checked():
    parts = tuple(guarded(numbers(16, seed=seed)) for seed in range(3))
    out = poisoned((16,), torch.float32)
    sum_of_tuple_kernel[(1,)](parts, out, BLOCK=16)
    torch.testing.assert_close(out, parts[0] + parts[1] + parts[2], rtol=0, atol=0)
    with pytest.raises(interpreter.OutOfBounds, match=r"x_ptrs\[1\]"):
        sum_of_tuple_kernel[(1,)]((parts[0], parts[1][:15]), out, BLOCK=16)


@only_interpreted
def test_one_load_may_be_of_several_tensors():
    x, y, out = guarded(numbers(8)), guarded(numbers(8, seed=1)), poisoned((16,), torch.float32)
    joined_kernel[(1,)](x, y, out, HALF=8)
    torch.testing.assert_close(out, torch.cat([x, y]), rtol=0, atol=0)
    for parts in ((x[:7], y), (x, y[:7])):
        with pytest.raises(interpreter.OutOfBounds, match="1 of 8 lanes"):
            joined_kernel[(1,)](*parts, out, HALF=8)


@only_interpreted
def test_descriptors_are_checked():
    x = numbers(6, 16)
    descriptor = TensorDescriptor.from_tensor(x, [8, 16])
    out = torch.empty(8, 16)
    with interpreter.watched() as launches:
        descriptor_kernel[(1,)](descriptor, out, 6, 16, BLOCK_M=8, BLOCK_N=16, TO_M=8)
    torch.testing.assert_close(out, torch.cat([x, torch.zeros(2, 16)]), rtol=0, atol=0)
    assert (launches[0].loaded, launches[0].stored) == (6 * 16 * 4, 8 * 16 * 4)
    with pytest.raises(interpreter.OutOfBounds, match=r"tl\.store: 16 of 128 lanes"):
        descriptor_kernel[(1,)](descriptor, out[:7], 6, 16, BLOCK_M=8, BLOCK_N=16, TO_M=8)


@only_interpreted
def test_programs_run_shuffled_and_always_in_one_order():
    orders = []
    for _ in range(2):
        running = interpreter.Running("")
        running.begin((4, 3, 1))
        orders.append([running.next_program() for _ in range(12)])
    in_order = list(np.ndindex(4, 3, 1))
    assert orders[0] == orders[1]
    assert orders[0] not in (in_order, in_order[::-1])
    assert sorted(orders[0]) == in_order


@only_interpreted
def test_an_error_in_a_kernel_reaches_the_caller_and_the_next_launch_works():
    x = numbers(8, 10)
    with pytest.raises(interpreter.OutOfBounds):
        copy(x, torch.empty(8, 10)[:4])
    out = torch.empty(8, 10)
    copy(x, out)
    torch.testing.assert_close(out, x, rtol=0, atol=0)


@only_interpreted
def test_triton_may_be_imported_before():
    """torch imports it for some of its own modules."""
    code = """
        import triton, triton.language as tl, torch
        import interpreter
        import test_interpreter
        assert isinstance(tl.sum, triton.JITFunction)
        out = torch.empty(1)
        test_interpreter.sum_kernel[(1,)](torch.arange(16.0), out, BLOCK=16)
        assert out.item() == 2 * 120 + 15, out
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code)]
    subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parent)


# What it counts


@only_interpreted
def test_bytes_are_counted_once_and_as_requested():
    x = numbers(4, dtype=torch.bfloat16)
    out = torch.empty(8, dtype=torch.bfloat16)
    with interpreter.watched() as launches:
        everywhere_kernel[(8,)](x, out, STORE_AT=1, LOAD_AT=0)
        copy(numbers(6, 10), torch.empty(6, 10))
    assert launches == [
        interpreter.Launch("everywhere_kernel", (8, 1, 1), 2, 16, 16, 16, 0),
        interpreter.Launch("copy_kernel", (2, 1, 1), 240, 240, 240, 240, 0),
    ]
