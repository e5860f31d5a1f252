"""Products and loads of the small matrices that a narrow stack keeps on chip."""

import triton
import triton.language as tl


@triton.jit
def load_matrix(
    ptr, stride_row, stride_column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INT64: tl.constexpr
):
    """A matrix [rows, columns] of any strides as a tile [ROWS, COLUMNS], 0 beyond its edges."""
    OFFSET: tl.constexpr = tl.int64 if INT64 else tl.int32
    row = tl.arange(0, ROWS).to(OFFSET)
    column = tl.arange(0, COLUMNS).to(OFFSET)
    return tl.load(
        ptr + row[:, None] * stride_row + column[None, :] * stride_column,
        mask=(row[:, None] < rows) & (column[None, :] < columns),
        other=0.0,
    )


@triton.jit
def times_matrix(
    a, ptr, stride_k, stride_n, rows, columns, acc,
    K: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr, TRANSPOSED: tl.constexpr,
    INT64: tl.constexpr,
):  # fmt: skip
    """acc + a @ b, where a [BLOCK_M, K] is a tile and b [rows, columns] lies in memory, its tile is [K, N].

    TRANSPOSED: b's second dimension is the one that is contiguous in memory, most often: load it in that order.
    fp32 operands take many registers, without tensor cores all of them at once: they go by as few columns of a as here.
    """
    BLOCK_M: tl.constexpr = a.shape[0]
    MOST: tl.constexpr = 128 if a.dtype != tl.float32 else 16 if PRECISION == "ieee" else 32
    if K > MOST:
        HALF: tl.constexpr = K // 2
        left, right = tl.split(tl.permute(tl.reshape(a, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        acc = times_matrix(left, ptr, stride_k, stride_n, rows, columns, acc, HALF, N, PRECISION, TRANSPOSED, INT64)
        ptr += HALF * stride_k
        return times_matrix(
            right, ptr, stride_k, stride_n, rows - HALF, columns, acc, HALF, N, PRECISION, TRANSPOSED, INT64
        )
    else:
        if TRANSPOSED:
            b = tl.trans(load_matrix(ptr, stride_n, stride_k, columns, rows, N, K, INT64))
        else:
            b = load_matrix(ptr, stride_k, stride_n, rows, columns, K, N, INT64)
        return tl.dot(a, b, acc, input_precision=PRECISION)
