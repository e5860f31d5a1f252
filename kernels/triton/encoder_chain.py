"""The backward pass through a narrow stack, down its layers, on chip."""

import triton
import triton.language as tl

from .activation import differentiate_dropped, dropout_scale
from .encoder_forward import add_bias, finish
from .tiles import times_matrix


@triton.jit
def encoder_chain_kernel(
    grad_out_ptr, weights, biases, saveds, grad_x_ptr, dzs, sums_ptr, seed_ptr,
    M, K,
    stride_gm, stride_gn, weight_offsets, bias_offsets, stride_sums, rows_per_program,
    strides_wn: tl.constexpr, strides_wk: tl.constexpr,
    WIDTHS: tl.constexpr, TILES: tl.constexpr, ACTIVATIONS: tl.constexpr, DROPOUTS: tl.constexpr,
    FROM_PREACT: tl.constexpr, READ: tl.constexpr, HELD: tl.constexpr,
    SUMS_WEIGHT: tl.constexpr, SUMS_BIAS: tl.constexpr, LOWEST: tl.constexpr,
    PRECISION: tl.constexpr, INT64: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dZ of each layer, from the last down to LOWEST, and what is wanted of grad_x and of the sums over the rows.

    grad_out  [M, WIDTHS[-1]]           fp32 | fp16 | bf16, any strides (in elements)
    weights   [WIDTHS[i], WIDTHS[i-1]]  dtype of grad_out, any strides; a tuple, as all in the plural
    biases    [WIDTHS[i]]               contiguous, or None
    saveds    [M, WIDTHS[i]]            contiguous; the output, or what comes before the activation if FROM_PREACT[i];
                                        None: found again from the layer below, if READ[i]; HELD[i]: from the start
    grad_x    [M, K]                    contiguous; None: not wanted
    dzs       [M, WIDTHS[i]]            contiguous; where dZ is to be written; None: nowhere
    sums      [programs, stride_sums]   fp32; from weight_offsets[i] on dZ.T @ the layer's input if SUMS_WEIGHT[i],
                                        from bias_offsets[i] on dZ.sum(0) if SUMS_BIAS[i]
    grid      (cdiv(M, rows_per_program),); one program owns rows_per_program rows, BLOCK_M at a time

    Sums are fp32; dZ and hidden outputs are rounded to the dtype of grad_out, as if they went through memory.
    """
    DEPTH: tl.constexpr = len(WIDTHS)
    WIDE: tl.constexpr = TILES[DEPTH - 1] > 128
    program = tl.program_id(0).to(tl.int64)
    first_m = program * rows_per_program
    end_m = tl.minimum(first_m + rows_per_program, M)

    sum_weights = ()
    sum_biases = ()
    for i in tl.static_range(DEPTH):
        if SUMS_WEIGHT[i]:
            sum_weights = sum_weights + (tl.zeros((TILES[i], TILES[i - 1]), tl.float32),)
        else:
            sum_weights = sum_weights + (0,)
        if SUMS_BIAS[i]:
            sum_biases = sum_biases + (tl.zeros((TILES[i],), tl.float32),)
        else:
            sum_biases = sum_biases + (0,)

    # Addresses and weights are the same for all blocks: moved out of the loop they would take more registers than there
    # are. Strides that are known make most of the addresses constants.
    for row in tl.range(first_m, end_m, BLOCK_M, disable_licm=True):
        sum_weights, sum_biases = _one_block(
            row, end_m - row, sum_weights, sum_biases,
            grad_out_ptr, weights, biases, saveds, grad_x_ptr, dzs, seed_ptr, K,
            stride_gm, stride_gn, strides_wn, strides_wk,
            WIDTHS, TILES, ACTIVATIONS, DROPOUTS, FROM_PREACT, READ, HELD, SUMS_WEIGHT, SUMS_BIAS, LOWEST, WIDE,
            PRECISION, INT64, BLOCK_M, BLOCK_N,
        )  # fmt: skip

    for i in tl.static_range(DEPTH):
        n = tl.arange(0, TILES[i])
        if SUMS_WEIGHT[i]:
            k = tl.arange(0, TILES[i - 1])
            tl.store(
                sums_ptr + program * stride_sums + weight_offsets[i] + n[:, None] * WIDTHS[i - 1] + k[None, :],
                sum_weights[i],
                mask=(n[:, None] < WIDTHS[i]) & (k[None, :] < WIDTHS[i - 1]),
            )
        if SUMS_BIAS[i]:
            tl.store(sums_ptr + program * stride_sums + bias_offsets[i] + n, sum_biases[i], mask=n < WIDTHS[i])


@triton.jit
def _one_block(
    row, rows_left, sum_weights, sum_biases,
    grad_out_ptr, weights, biases, saveds, grad_x_ptr, dzs, seed_ptr, K,
    stride_gm, stride_gn, strides_wn: tl.constexpr, strides_wk: tl.constexpr,
    WIDTHS: tl.constexpr, TILES: tl.constexpr, ACTIVATIONS: tl.constexpr, DROPOUTS: tl.constexpr,
    FROM_PREACT: tl.constexpr, READ: tl.constexpr, HELD: tl.constexpr,
    SUMS_WEIGHT: tl.constexpr, SUMS_BIAS: tl.constexpr, LOWEST: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, INT64: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    DEPTH: tl.constexpr = len(WIDTHS)
    LAST: tl.constexpr = DEPTH - 1
    DTYPE: tl.constexpr = grad_out_ptr.dtype.element_ty
    OFFSET: tl.constexpr = tl.int64 if INT64 else tl.int32
    m = tl.arange(0, BLOCK_M)
    in_m = m < rows_left
    rows = row + m.to(tl.int64)

    # Upwards: what the layers above are found again from, and what is found.
    held = ()
    for i in tl.static_range(DEPTH):
        tile = 0
        if HELD[i]:
            if saveds[i] is not None:
                tile = _load_rows(saveds[i], rows, in_m, WIDTHS[i], TILES[i])
            else:
                below = _output(
                    held[i - 1], seed_ptr, rows, i - 1,
                    WIDTHS[i - 1], TILES[i - 1], ACTIVATIONS[i - 1], DROPOUTS[i - 1], FROM_PREACT[i - 1],
                )  # fmt: skip
                z = times_matrix(
                    below, weights[i], strides_wk[i], strides_wn[i], WIDTHS[i - 1], WIDTHS[i],
                    tl.zeros((BLOCK_M, TILES[i]), tl.float32), TILES[i - 1], TILES[i], PRECISION, True, INT64,
                )  # fmt: skip
                z = add_bias(z, biases[i], WIDTHS[i], TILES[i])
                if FROM_PREACT[i]:
                    tile = z.to(DTYPE)
                else:
                    tile = _finish(z, seed_ptr, rows, i, WIDTHS[i], TILES[i], ACTIVATIONS[i], DROPOUTS[i]).to(DTYPE)
        held = held + (tile,)

    # Downwards: dZ of each layer, and from it the sums over the rows and the gradient of the layer's input.
    new_weights = ()
    new_biases = ()
    own = held[LAST]
    if READ[LAST] and not HELD[LAST]:
        own = _load_rows(saveds[LAST], rows, in_m, WIDTHS[LAST], TILES[LAST])
    grad = tl.zeros((BLOCK_M, TILES[LAST - 1] if WIDE else TILES[LAST]), tl.float32)
    if not WIDE:
        n = tl.arange(0, TILES[LAST]).to(OFFSET)
        grad = tl.load(
            grad_out_ptr + row * stride_gm + m.to(OFFSET)[:, None] * stride_gm + n[None, :] * stride_gn,
            mask=in_m[:, None] & (n[None, :] < WIDTHS[LAST]),
            other=0.0,
        ).to(tl.float32)
    for i in tl.static_range(LAST, -1, -1):
        new_weight = sum_weights[i]
        new_bias = sum_biases[i]
        below = 0
        if i > 0:
            below = held[i - 1]
            if READ[i - 1] and not HELD[i - 1]:
                below = _load_rows(saveds[i - 1], rows, in_m, WIDTHS[i - 1], TILES[i - 1])
        if i == LAST and WIDE:
            grad = _through_wide_layer(
                grad, grad_out_ptr, weights[i], saveds[i], seed_ptr, rows, m.to(OFFSET), in_m, row,
                stride_gm, stride_gn, strides_wn[i], strides_wk[i],
                i, WIDTHS[i], WIDTHS[i - 1], TILES[i - 1], ACTIVATIONS[i], DROPOUTS[i],
                DTYPE, PRECISION, INT64, BLOCK_N,
            )  # fmt: skip
        elif i >= LOWEST:
            scale = 1.0
            if DROPOUTS[i] > 0:
                scale = dropout_scale(seed_ptr, i, rows, tl.arange(0, TILES[i]), WIDTHS[i], DROPOUTS[i])
            dz = grad
            if ACTIVATIONS[i] != "identity":
                dz = differentiate_dropped(grad, own.to(tl.float32), scale, ACTIVATIONS[i], DROPOUTS[i])
            elif DROPOUTS[i] > 0:
                dz = grad * scale
            dz = tl.where(in_m[:, None], dz, 0.0)
            if SUMS_BIAS[i]:
                new_bias = sum_biases[i] + tl.sum(dz, axis=0)
            dz = dz.to(DTYPE)
            if dzs[i] is not None:
                _store_rows(dzs[i], dz, rows, in_m, WIDTHS[i], TILES[i])
            if SUMS_WEIGHT[i]:
                x = _output(
                    below, seed_ptr, rows, i - 1,
                    WIDTHS[i - 1], TILES[i - 1], ACTIVATIONS[i - 1], DROPOUTS[i - 1], FROM_PREACT[i - 1],
                )  # fmt: skip
                new_weight = tl.dot(tl.trans(dz), x, sum_weights[i], input_precision=PRECISION)
            if i > LOWEST:
                grad = times_matrix(
                    dz, weights[i], strides_wn[i], strides_wk[i], WIDTHS[i], WIDTHS[i - 1],
                    tl.zeros((BLOCK_M, TILES[i - 1]), tl.float32), TILES[i], TILES[i - 1], PRECISION, False, INT64,
                )  # fmt: skip
            elif grad_x_ptr is not None:
                _input_gradient(
                    dz, weights[0], grad_x_ptr, rows, in_m, K, strides_wn[0], strides_wk[0],
                    WIDTHS[0], TILES[0], DTYPE, PRECISION, INT64, BLOCK_M, BLOCK_N,
                )  # fmt: skip
        own = below
        new_weights = (new_weight,) + new_weights
        new_biases = (new_bias,) + new_biases
    return new_weights, new_biases


@triton.jit
def _finish(
    z, seed_ptr, rows,
    LAYER: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, ACTIVATION: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """A layer's output in fp32 from its pre-activation."""
    out = finish(z, WIDTH, TILE, ACTIVATION)
    if P > 0:
        out *= dropout_scale(seed_ptr, LAYER, rows, tl.arange(0, TILE), WIDTH, P)
    return out


@triton.jit
def _output(
    tile, seed_ptr, rows,
    LAYER: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, ACTIVATION: tl.constexpr, P: tl.constexpr,
    FROM_PREACT: tl.constexpr,
):  # fmt: skip
    """A layer's output, rounded, from what its derivative is made of."""
    if FROM_PREACT:
        return _finish(tile.to(tl.float32), seed_ptr, rows, LAYER, WIDTH, TILE, ACTIVATION, P).to(tile.dtype)
    else:
        return tile


@triton.jit
def _load_rows(ptr, rows, in_m, width: tl.constexpr, TILE: tl.constexpr):
    n = tl.arange(0, TILE)
    return tl.load(ptr + rows[:, None] * width + n[None, :], mask=in_m[:, None] & (n[None, :] < width), other=0.0)


@triton.jit
def _store_rows(ptr, tile, rows, in_m, width: tl.constexpr, TILE: tl.constexpr):
    n = tl.arange(0, TILE)
    tl.store(ptr + rows[:, None] * width + n[None, :], tile, mask=in_m[:, None] & (n[None, :] < width))


@triton.jit
def _through_wide_layer(
    grad, grad_out_ptr, weight_ptr, saved_ptr, seed_ptr, rows, m, in_m, row,
    stride_gm, stride_gn, stride_wn, stride_wk,
    LAYER: tl.constexpr, WIDTH: tl.constexpr, WIDTH_BELOW: tl.constexpr, TILE_BELOW: tl.constexpr,
    ACTIVATION: tl.constexpr, P: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, INT64: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad + dZ @ weight for a last layer that is too wide to hold, by BLOCK_N of its outputs."""
    for first_n in range(0, WIDTH, BLOCK_N):
        start = tl.cast(first_n, tl.int64)
        n = tl.arange(0, BLOCK_N).to(m.dtype)
        in_mn = in_m[:, None] & (n[None, :] < WIDTH - first_n)
        dz = tl.load(
            grad_out_ptr + row * stride_gm + start * stride_gn + m[:, None] * stride_gm + n[None, :] * stride_gn,
            mask=in_mn,
            other=0.0,
        ).to(tl.float32)
        offsets = rows[:, None] * WIDTH + (first_n + n)[None, :]
        if ACTIVATION != "identity" or P > 0:
            scale = 1.0
            saved = dz
            if ACTIVATION != "identity":
                saved = tl.load(saved_ptr + offsets, mask=in_mn, other=0.0).to(tl.float32)
            if P > 0:
                scale = dropout_scale(seed_ptr, LAYER, rows, first_n + n, WIDTH, P)
            dz = tl.where(in_mn, differentiate_dropped(dz, saved, scale, ACTIVATION, P), 0.0)
        dz = dz.to(DTYPE)
        grad = times_matrix(
            dz, weight_ptr + start * stride_wn, stride_wn, stride_wk, WIDTH - first_n, WIDTH_BELOW, grad,
            BLOCK_N, TILE_BELOW, PRECISION, False, INT64,
        )  # fmt: skip
    return grad


@triton.jit
def _input_gradient(
    dz, weight_ptr, grad_x_ptr, rows, in_m, K, stride_wn, stride_wk,
    WIDTH: tl.constexpr, TILE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, INT64: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad_x = dZ of the first layer @ its weight, by BLOCK_K columns."""
    for first_k in range(0, K, BLOCK_K):
        start = tl.cast(first_k, tl.int64)
        grad_x = times_matrix(
            dz, weight_ptr + start * stride_wk, stride_wn, stride_wk, WIDTH, K - first_k,
            tl.zeros((BLOCK_M, BLOCK_K), tl.float32), TILE, BLOCK_K, PRECISION, False, INT64,
        )  # fmt: skip
        k = first_k + tl.arange(0, BLOCK_K)
        tl.store(
            grad_x_ptr + rows[:, None] * K + k[None, :],
            grad_x.to(DTYPE),
            mask=in_m[:, None] & (k[None, :] < K),
        )
