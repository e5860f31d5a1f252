"""The interpreter's support finds what it is there to find: each mending and each check has a kernel that needs it."""

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
def sum_of_tuple_kernel(x_ptrs, out_ptr, BLOCK: tl.constexpr):
    """out = sum of the tensors x, each [BLOCK]; grid (1,)."""
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(len(x_ptrs)):
        total += tl.load(x_ptrs[k] + i)
    tl.store(out_ptr + i, total)


@triton.jit
def dot_kernel(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """out = x @ y, all [BLOCK, BLOCK]; grid (1,)."""
    i = tl.arange(0, BLOCK)
    at = i[:, None] * BLOCK + i[None, :]
    out = tl.dot(tl.load(x_ptr + at), tl.load(y_ptr + at), input_precision=PRECISION)
    tl.store(out_ptr + at, out)


@triton.jit
def arithmetic_kernel(x_ptr, y_ptr, out_ptr, below_ptr, BLOCK: tl.constexpr):
    """out = -(x + y * x), in the dtype of x and y, and below = x < y; all [BLOCK]; grid (1,)."""
    i = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(out_ptr + i, -(x + y * x))
    tl.store(below_ptr + i, (x < y).to(tl.int32))


@triton.jit
def erf_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """out = erf(x), [BLOCK]; grid (1,)."""
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.erf(tl.load(x_ptr + i)))


@triton.jit
def descriptor_kernel(x_desc, out_ptr, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TO_M: tl.constexpr):
    """out = x, [M, N] contiguous, by descriptors, where out is said to have TO_M rows; grid (1,)."""
    out_desc = tl.make_tensor_descriptor(out_ptr, [TO_M, N], [N, 1], [BLOCK_M, BLOCK_N])
    out_desc.store([0, 0], x_desc.load([0, 0]))


def numbers(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def copy(x, out, kernel=copy_kernel):
    kernel[(triton.cdiv(len(x), 4),)](x, out, *x.shape, x.stride(0), out.stride(0), ROWS=4, COLUMNS=16)


# What the interpreter computes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_casts_round_to_nearest_even(dtype):
    x = numbers(64, 16)
    step = torch.finfo(dtype).eps
    # Halfway between two neighbours, below and above an even one; a bit more than halfway; too large; odd ones.
    x[0, :8] = torch.tensor(
        [1 + step / 2, 1 + 3 * step / 2, 1 + step * 0.51, 65519.0, 1e30, torch.inf, -0.0, torch.nan]
    )
    x[1, :2] = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)  # NaN of which all bits are set
    out = poisoned(x.shape, dtype)
    copy(x, out)
    torch.testing.assert_close(out, x.to(dtype), rtol=0, atol=0, equal_nan=True)
    back = poisoned(x.shape, torch.float32)
    copy(out, back)
    torch.testing.assert_close(back, out.float(), rtol=0, atol=0, equal_nan=True)


def test_integers_and_doubles_become_bfloat16():
    for x in (torch.arange(-40, 24, device=DEVICE).view(4, 16) * 37, numbers(4, 16).double()):
        out = poisoned(x.shape, torch.bfloat16)
        copy(x, out)
        torch.testing.assert_close(out, x.to(torch.bfloat16), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dot_of_integers_is_exact(dtype):
    x, y = (torch.randint(-100, 100, (32, 32), device=DEVICE).to(dtype) for _ in range(2))
    out = poisoned((32, 32), torch.float32)
    dot_kernel[(1,)](x, y, out, BLOCK=32, PRECISION="ieee")
    torch.testing.assert_close(out.double(), x.double() @ y.double(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dot_of_short_floats_sums_in_fp32(dtype):
    """100^2 + 31 * 1 has no neighbour in bfloat16 nearer than 64, in float16 nearer than 8."""
    x, y = torch.ones(32, 32, dtype=dtype, device=DEVICE), torch.ones(32, 32, dtype=dtype, device=DEVICE)
    x[:, 0] = y[0] = 100
    out = poisoned((32, 32), torch.float32)
    dot_kernel[(1,)](x, y, out, BLOCK=32, PRECISION="ieee")
    assert (out == 10031).all()


def test_dot_reads_as_much_of_fp32_as_its_precision_says():
    """1 + 2^-12 is 1 in TF32, which has 10 bits behind the point."""
    x = torch.full((16, 16), 1 + 2**-12, device=DEVICE)
    y = torch.eye(16, device=DEVICE)
    for precision, expected in (("ieee", 1 + 2**-12), ("tf32", 1.0)):
        out = poisoned((16, 16), torch.float32)
        dot_kernel[(1,)](x, y, out, BLOCK=16, PRECISION=precision)
        assert (out == expected).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_arithmetic(dtype):
    x, y = torch.tensor([1.5, -2.0, 0.25, -0.5] * 4), torch.tensor([3.0, 1.0, -4.0, 0.5] * 4)
    x, y = x.to(DEVICE, dtype), y.to(DEVICE, dtype)
    out, below = poisoned((16,), dtype), poisoned((16,), torch.int32)
    arithmetic_kernel[(1,)](x, y, out, below, BLOCK=16)
    torch.testing.assert_close(out, -(x + y * x), rtol=0, atol=0)
    torch.testing.assert_close(below.bool(), x < y)


@only_interpreted
def test_erf_is_rounded_once():
    x = numbers(64)
    out = poisoned((64,), torch.float32)
    erf_kernel[(1,)](x, out, BLOCK=64)
    torch.testing.assert_close(out, torch.erf(x.double()).float(), rtol=0, atol=0)


@only_interpreted
def test_dot_of_less_than_a_gpu_can_is_refused():
    x = torch.ones(8, 8, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="K >= 16"):
        dot_kernel[(1,)](x, x, torch.empty(8, 8), BLOCK=8, PRECISION="ieee")


# What the interpreter refuses


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


# What it counts


@only_interpreted
def test_bytes_are_counted_once_and_as_requested():
    x = numbers(4, dtype=torch.bfloat16)
    out = torch.empty(8, dtype=torch.bfloat16)
    with interpreter.watched() as launches:
        everywhere_kernel[(8,)](x, out, STORE_AT=1, LOAD_AT=0)
        copy(numbers(6, 10), torch.empty(6, 10))
    assert launches == [
        interpreter.Launch("everywhere_kernel", (8, 1, 1), 2, 16, 16, 16),
        interpreter.Launch("copy_kernel", (2, 1, 1), 240, 240, 240, 240),
    ]
