"""The emulated GPU that runs the CUDA kernels in tests: order, barriers, faults, copies, fragments, numbers, counts.

Fragments are laid out here by the formulas of the PTX manual ("Matrix Fragments for mma.m16n8k16", "... m16n8k8" and
"ldmatrix"), written anew.
"""

import ctypes
import functools

import cuda_native
import numpy as np
import pytest
import torch
from cuda_native import ARITHMETICS, ORDERS, ROOT

KINDS = {"half": torch.float16, "bfloat16": torch.bfloat16}
LANES = np.arange(32)
GROUP, QUAD = LANES // 4, LANES % 4


@functools.cache
def machine() -> ctypes.CDLL:
    path = cuda_native.library("simt_machine", [ROOT / "tests/native/simt_machine.cpp"])
    library = ctypes.CDLL(str(path))
    library.fault.restype = library.wrong_programs.restype = ctypes.c_char_p
    return library


@pytest.fixture(autouse=True)
def schedule():
    """Sets a schedule; the usual one is there before and after."""

    def set_schedule(order: str = "forward", late: bool = True, seed: int = 1) -> None:
        machine().set_schedule(ORDERS.index(order), int(late), ctypes.c_uint64(seed))

    set_schedule()
    yield set_schedule
    set_schedule()


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return array.ctypes.data_as(ctypes.c_void_p)


def wrong_programs() -> list[str]:
    return machine().wrong_programs().decode().splitlines()


# Order.


def steps(order: str, seed: int, schedule, threads: int = 96) -> np.ndarray:
    """The threads in the order in which they ran: [3, threads], where all three parts are apart."""
    numbers = np.full(3 * threads, -1, np.int32)
    schedule(order, seed=seed)
    machine().order_of_threads(threads, pointer(numbers))
    return numbers.reshape(3, threads)


def test_threads_run_in_the_order_of_their_numbers_or_against_it(schedule):
    assert (steps("forward", 1, schedule) == np.arange(96)).all()
    assert (steps("reverse", 1, schedule) == np.arange(96)[::-1]).all()


def test_a_random_order_is_another_each_time_and_the_same_for_its_seed(schedule):
    first, again, other = (steps("random", seed, schedule) for seed in (1, 1, 2))
    assert (np.sort(first, axis=1) == np.arange(96)).all()
    assert (first == again).all()
    assert (first != other).any()
    assert (first[0] != first[1]).any()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_greedy_warp_runs_ahead_as_far_as_barriers_allow(seed, schedule):
    before = steps("greedy", seed, schedule)[:2].reshape(3, 2, 32)
    for place, warp in enumerate(np.roll(np.arange(3), -seed)):
        assert (before[place] == np.arange(32 * warp, 32 * warp + 32)).all()


def test_blocks_run_in_any_order_but_forward(schedule):
    numbers = np.full(20, -1, np.int32)
    machine().order_of_blocks(20, pointer(numbers))
    assert (numbers == np.arange(20)).all()
    schedule("random", seed=3)
    machine().order_of_blocks(20, pointer(numbers))
    assert (np.sort(numbers) == np.arange(20)).all()
    assert (numbers != np.arange(20)).any()


# Faults.

FAULTS = {
    "some return before a barrier": "some have returned",
    "some return before a shuffle": "wait for each other at different places",
    "halves of a warp at different places": "lanes of a warp are apart: some at shfl.xor, some at a warp's barrier",
    "one lane at the block's barrier": "wait for each other at different places",
    "misaligned load": "misaligned",
    "misaligned store": "misaligned",
    "misaligned copy": "cp.async of 16 bytes at an address that is no multiple of that",
    "misaligned rows of ldmatrix": "no multiple of 16",
    "a copy that is not committed": "did not commit",
    "33 threads": "whole warps",
    "2048 threads": "at most 1024 threads",
    "no blocks": "a grid is too large, or empty",
    "more shared memory than every GPU has": "101377 bytes",
}


def test_there_is_a_message_for_every_wrong_program():
    assert set(FAULTS) == set(wrong_programs())


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("order", ORDERS)
def test_a_wrong_program_is_a_fault_and_the_next_one_runs(name, order, schedule):
    schedule(order)
    assert FAULTS[name] in machine().fault(name.encode()).decode()
    assert (np.bincount(steps(order, 1, schedule).ravel()) == np.full(96, 3)).all()


# Memory.


def test_shared_memory_is_nan_at_the_start_of_each_block():
    words = np.zeros((2, 50), np.uint32)
    machine().fresh_shared_memory(pointer(words), 50)
    assert (words == 0xFFFFFFFF).all()
    assert np.isnan(words.view(np.float32)).all()


def test_copies_land_when_waited_for_or_at_once_and_fill_with_zeros(schedule):
    nothing, first, second = 0xFFFFFFFF, 0x11111111, 0x00002222
    seen = np.zeros((3, 2), np.uint32)
    machine().copies(pointer(seen))
    assert seen.tolist() == [[nothing, nothing], [first, nothing], [first, second]]
    schedule(late=False)
    machine().copies(pointer(seen))
    assert seen.tolist() == [[first, second]] * 3


@pytest.mark.parametrize("mask", [1, 2, 4, 8, 16, 31])
def test_lanes_see_each_other_in_a_shuffle(mask):
    given, got = np.arange(32, dtype=np.float32), np.zeros(32, np.float32)
    machine().shuffle(pointer(given), mask, pointer(got))
    assert (got == given[LANES ^ mask]).all()


# Fragments.


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_puts_every_number_where_the_ptx_manual_says(transposed):
    matrices = np.arange(4 * 8 * 8, dtype=np.uint16).reshape(4, 8, 8)
    registers = np.zeros((32, 4), np.uint32)
    machine().ldmatrix(int(transposed), pointer(matrices), pointer(registers))
    got = registers.view(np.uint16).reshape(32, 4, 2)
    if transposed:
        matrices = matrices.swapaxes(1, 2)
    for half in range(2):
        assert (got[:, :, half] == matrices[:, GROUP, 2 * QUAD + half].T).all()


def fragments_of_16_bits(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The registers of each lane for a [16, 16] and b [16, 8], as bits: elements a0..a7 and b0..b3."""
    left, right = np.zeros((32, 8), np.uint16), np.zeros((32, 4), np.uint16)
    for i in range(8):
        row = GROUP + (0 if i in (0, 1, 4, 5) else 8)
        col = QUAD * 2 + (i & 1) + (0 if i < 4 else 8)
        left[:, i] = a[row, col]
    for i in range(4):
        right[:, i] = b[QUAD * 2 + (i & 1) + (0 if i < 2 else 8), GROUP]
    return left.view(np.uint32), right.view(np.uint32)


def fragments_of_tf32(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same for a [16, 8] and b [8, 8] of fp32: a0..a3 and b0, b1."""
    left, right = np.zeros((32, 4), np.float32), np.zeros((32, 2), np.float32)
    for i in range(4):
        left[:, i] = a[GROUP + (8 if i in (1, 3) else 0), QUAD + (4 if i >= 2 else 0)]
    for i in range(2):
        right[:, i] = b[QUAD + 4 * i, GROUP]
    return left.view(np.uint32), right.view(np.uint32)


def multiply(arithmetic: str, left: np.ndarray, right: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """sums [16, 8] plus what mma makes of the registers."""
    rows = np.stack([GROUP + (8 if i >= 2 else 0) for i in range(4)], axis=1)
    cols = np.stack([QUAD * 2 + (i & 1) for i in range(4)], axis=1)
    d = np.ascontiguousarray(sums[rows, cols])
    machine().mma(ARITHMETICS.index(arithmetic), pointer(left), pointer(right), pointer(d))
    result = np.full((16, 8), np.nan, np.float32)
    result[rows, cols] = d
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_mma_of_16_bits(kind):
    random = torch.Generator().manual_seed(5)
    a, b, c = (torch.randint(-9, 10, shape, generator=random).float() for shape in ((16, 16), (16, 8), (16, 8)))
    bits = [t.to(KINDS[kind]).view(torch.int16).numpy().view(np.uint16) for t in (a, b)]
    result = multiply(kind, *fragments_of_16_bits(*bits), c.numpy())
    assert (result == (a @ b + c).numpy()).all()


def test_mma_of_tf32():
    random = np.random.default_rng(5)
    a, b, c = (random.integers(-9, 10, shape).astype(np.float32) for shape in ((16, 8), (8, 8), (16, 8)))
    assert (multiply("tf32", *fragments_of_tf32(a, b), c) == a @ b + c).all()


def test_tensor_cores_leave_the_lower_bits_of_a_float_aside():
    a, b, c = np.zeros((16, 8), np.float32), np.zeros((8, 8), np.float32), np.zeros((16, 8), np.float32)
    a[3, 2], b[2, 5] = 1 + 2.0**-10 + 2.0**-11, 1.0
    c[3, 5] = 1.0
    result = multiply("tf32", *fragments_of_tf32(a, b), c)
    assert result[3, 5] == 2 + 2.0**-10
    assert np.count_nonzero(result) == 1


# Numbers.


@pytest.mark.parametrize("kind", KINDS)
def test_all_16_bit_numbers_as_floats(kind):
    bits = np.arange(1 << 16, dtype=np.uint16)
    got = np.zeros(bits.size, np.float32)
    machine().widen(ARITHMETICS.index(kind), pointer(bits), pointer(got), ctypes.c_int64(bits.size))
    wanted = torch.from_numpy(bits.view(np.int16)).view(KINDS[kind]).float().numpy()
    assert (np.isnan(got) == np.isnan(wanted)).all()
    finite = ~np.isnan(got)
    assert (got.view(np.uint32)[finite] == wanted.view(np.uint32)[finite]).all()


def difficult_floats() -> np.ndarray:
    """All 16-bit numbers as floats, what lies half-way between neighbours, and just beside that; and random bits."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    values = torch.cat([bits.view(kind).float() for kind in KINDS.values()]).numpy()
    subnormal = (np.arange(1 << 11, dtype=np.float32) + np.float32(0.5)) * np.float32(2.0**-24)  # of half precision
    middles = np.concatenate(
        [values.view(np.uint32) + 0x8000, values.view(np.uint32) + 0x1000, subnormal.view(np.uint32)]
    )
    random = np.random.default_rng(7).integers(0, 1 << 32, 1 << 17, dtype=np.uint32)
    return np.concatenate([values.view(np.uint32), middles, middles - 1, middles + 1, random]).view(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_to_16_bits(kind):
    floats = difficult_floats()
    got = np.zeros(floats.size, np.uint16)
    machine().narrow(ARITHMETICS.index(kind), pointer(floats), pointer(got), ctypes.c_int64(floats.size))
    rounded = torch.from_numpy(got.view(np.int16)).view(KINDS[kind])
    wanted = torch.from_numpy(floats).to(KINDS[kind])
    assert torch.equal(rounded.isnan(), wanted.isnan())
    finite = ~wanted.isnan()
    assert torch.equal(rounded.view(torch.int16)[finite], wanted.view(torch.int16)[finite])


def test_rounding_to_tf32():
    """10 bits after the first, halves away from zero."""
    floats = difficult_floats()
    got = np.zeros(floats.size, np.uint32)
    machine().round_to_tf32(pointer(floats), pointer(got), ctypes.c_int64(floats.size))
    assert (got & 0x1FFF == 0).all()
    got = got.view(np.float32)
    assert (np.isnan(got) == np.isnan(floats)).all()
    finite = np.isfinite(floats)
    exponent = np.frexp(floats[finite].astype(np.float64))[1]
    exponent = np.maximum(exponent, -125)  # subnormal numbers have that of the smallest normal ones
    unit = np.ldexp(1.0, exponent - 11)
    wanted = np.trunc(floats[finite] / unit + np.copysign(0.5, floats[finite])) * unit
    wanted[np.abs(wanted) > np.finfo(np.float32).max] *= np.inf
    assert (got[finite] == wanted).all()
    assert (got[np.isinf(floats)] == floats[np.isinf(floats)]).all()


# Counts.


def traffic(space: str, size: int, offsets: np.ndarray) -> dict[str, int]:
    counts = np.zeros(5, np.int64)
    machine().count_one_access(int(space == "shared"), size, pointer(offsets.astype(np.int32)), pointer(counts))
    return dict(zip(("accesses", "bytes", "moved", "passes", "least"), counts.tolist(), strict=True))


@pytest.mark.parametrize(
    ("size", "offsets", "passes", "least"),
    [
        (4, 4 * LANES, 1, 1),
        (4, 0 * LANES, 1, 1),  # all one word
        (4, 8 * LANES, 2, 1),  # every other bank
        (4, 128 * LANES, 32, 1),  # all in one bank
        (2, 2 * LANES, 1, 1),
        (2, 132 * LANES, 1, 1),
        (16, 16 * LANES, 4, 4),
        (16, 144 * LANES, 4, 4),  # rows of 128 bytes, 16 apart: eight lanes in all banks
        (16, 128 * LANES, 32, 4),
        (8, 8 * LANES, 2, 2),
    ],
)
def test_trips_to_the_banks_of_shared_memory(size, offsets, passes, least):
    counts = traffic("shared", size, offsets)
    assert (counts["accesses"], counts["passes"], counts["least"]) == (1, passes, least)


@pytest.mark.parametrize(
    ("size", "offsets", "asked", "moved"),
    [
        (4, 4 * LANES, 128, 128),
        (4, 4 * LANES + 4, 128, 160),
        (4, 32 * LANES, 128, 1024),
        (4, 0 * LANES, 4, 32),
        (16, 16 * LANES, 512, 512),
        (2, 2 * LANES, 64, 64),
    ],
)
def test_sectors_of_global_memory(size, offsets, asked, moved):
    counts = traffic("global", size, offsets)
    assert (counts["accesses"], counts["bytes"], counts["moved"]) == (1, asked, moved)
