"""Interpreted kernels compute what a GPU does; where there is one, the same numbers come from it."""

import interpreter
import pytest
import torch
import triton
import triton.language as tl
from guards import DEVICE, poisoned

only_interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="kernels are compiled where there is a GPU")


@triton.jit
def cast_kernel(x_ptr, out_ptr, N, BLOCK: tl.constexpr):
    """out = x, [N], in the dtype of out; grid (cdiv(N, BLOCK),)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < N).to(out_ptr.dtype.element_ty), mask=i < N)


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


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def cast(x, dtype):
    out = poisoned(x.shape, dtype)
    cast_kernel[(triton.cdiv(x.numel(), 64),)](x, out, x.numel(), BLOCK=64)
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_casts_round_to_nearest_even(dtype):
    x = numbers(1000)
    step = torch.finfo(dtype).eps
    # Halfway between two neighbours, below and above an even one; a bit more than halfway; too large; odd ones.
    x[:8] = torch.tensor([1 + step / 2, 1 + 3 * step / 2, 1 + step * 0.51, 65519.0, 1e30, torch.inf, -0.0, torch.nan])
    x[8:10] = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)  # NaN of which all bits are set
    out = cast(x, dtype)
    torch.testing.assert_close(out, x.to(dtype), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(cast(out, torch.float32), out.float(), rtol=0, atol=0, equal_nan=True)


def test_integers_and_doubles_become_bfloat16():
    for x in (torch.arange(-100, 100, device=DEVICE) * 37, numbers(100).double()):
        torch.testing.assert_close(cast(x, torch.bfloat16), x.to(torch.bfloat16), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dot_of_integers_is_exact(dtype):
    x, y = (torch.randint(-100, 100, (32, 32), device=DEVICE).to(dtype) for _ in range(2))
    out = poisoned((32, 32), torch.float32)
    with interpreter.watched() as launches:
        dot_kernel[(1,)](x, y, out, BLOCK=32, PRECISION="ieee")
    assert [launch.flops for launch in launches] == ([2 * 32**3] if interpreter.INTERPRETED else [])
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
