// One dense layer, forward.
#pragma once

#include "pack.cuh"
#include "product.cuh"

namespace fastenc::cuda {

// Whether large tiles, which read less for each product, make enough blocks to fill a GPU, and few more columns that
// only pad: at most a quarter more than small ones.
constexpr bool wants_large_tiles(int64_t M, int64_t N) {
  return count_tiles<LargeTile>(M, N) >= kMultiprocessors &&
         4 * divide_up(N, LargeTile::kCols) * LargeTile::kCols <= 5 * divide_up(N, SmallTile::kCols) * SmallTile::kCols;
}

// x       [M, K]  fp32 | fp16 | bf16, any strides
// weight  [N, K]  dtype of x, any strides; kSumWeight is kOuter where its columns are contiguous
// out     [M, N]  dtype of x, contiguous; preact likewise, or null
// grid    ceil(M / kRows) * ceil(N / kCols) blocks; one owns a tile of out
// shared  as Product
//
// The sums leave the registers before the rest is done, so that they make room for it: a thread takes four columns of a
// row at a time through the bias and the activation.
template <Arithmetic kArithmetic, class Tile, Sum kSumWeight>
FASTENC_KERNEL(Tile::kThreads, Tile::kBlocks)
dense_forward_kernel(const DenseForward args) {
  using T = Number<kArithmetic>;
  using ForwardProduct = Product<kArithmetic, Tile, Sum::kInner, kSumWeight>;
  const TilePlace place = place_tile<Tile>(args.M, args.N);
  {
    const Matrix weight_t = {args.weight.data, args.weight.col_stride, args.weight.row_stride};
    const Source<T> x(args.x, args.M, args.K);
    const Source<T> weight =
        kSumWeight == Sum::kInner ? Source<T>(args.weight, args.N, args.K) : Source<T>(weight_t, args.K, args.N);
    ForwardProduct::multiply_tiles(x, place.row, weight, place.col, 0, divide_up(args.K, ForwardProduct::kStep));
  }

  constexpr int kEach = 4, kAcross = Tile::kCols / kEach;
  const float* const tile = reinterpret_cast<const float*>(shared_memory());
  const T* const bias = static_cast<const T*>(args.bias);
  const bool packed = allows_packs<kEach, T>(args.out, args.N) && allows_packs<kEach, T>(args.preact, args.N);
  const bool bias_packed = packed && allows_packs<kEach, T>(args.bias, 0);
  const int apart = packed ? 1 : kAcross;
  const int c = thread() % kAcross * (packed ? kEach : 1);
  const int64_t col = place.col + c;
  const int count = count_inside<kEach>(col, args.N, apart);
  float shift[kEach] = {};
  if (bias) load_numbers(shift, bias + col, apart, count + PLANTED(BiasTooFar), bias_packed);

#pragma unroll 1
  for (int r = thread() / kAcross; r < Tile::kRows; r += Tile::kThreads / kAcross) {
    if (place.row + r >= args.M + PLANTED(OutRowTooFar)) break;
    float z[kEach];
    load_sums(z, tile + r * ForwardProduct::kOutLeading + c, apart, packed);
#pragma unroll
    for (int e = 0; e < kEach; ++e) z[e] += shift[e];
    const int64_t offset = (place.row + r) * args.N + col;
    if (args.preact) store_numbers(static_cast<T*>(args.preact) + offset, z, apart, count, packed);
    with_activation(args.activation, [&](auto activation) {
#pragma unroll
      for (int e = 0; e < kEach; ++e) z[e] = decltype(activation)::forward(z[e]);
    });
    store_numbers(static_cast<T*>(args.out) + offset, z, apart, count, packed);
  }
}

template <Arithmetic kArithmetic, class Tile, Sum kSumWeight>
constexpr Geometry dense_forward_geometry(int64_t M, int64_t N) {
  return {count_tiles<Tile>(M, N), Tile::kThreads, Product<kArithmetic, Tile, Sum::kInner, kSumWeight>::kSharedBytes};
}

}  // namespace fastenc::cuda
