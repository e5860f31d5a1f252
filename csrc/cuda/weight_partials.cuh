// The gradient of a dense layer's weight, in partial sums over parts of the rows.
#pragma once

#include "product.cuh"

namespace fastenc::cuda {

// The rows of a part: few enough that the blocks fill a GPU, and enough that a part is worth its start and that writing
// and reading the partial sums moves about no more than reading dZ and x. A multiple of every kStep.
constexpr int64_t weight_part_rows(int64_t M, int64_t N, int64_t K) {
  constexpr int64_t kFewest = 64;
  const int64_t wanted = divide_up(2 * kMultiprocessors, count_tiles<SmallTile>(N, K));
  const int64_t cheap = 4 * N * K / (N + K);  // rows whose numbers, of 16 bits, are as many bytes as a part's sums
  int64_t rows = divide_up(M, wanted);
  if (rows < cheap) rows = cheap;
  return divide_up(rows > kFewest ? rows : kFewest, kFewest) * kFewest;
}

template <Arithmetic kArithmetic>
using WeightProduct = Product<kArithmetic, SmallTile, Sum::kOuter, Sum::kOuter>;

// grad_preact  [M, N]  fp32 | fp16 | bf16, any strides
// x            [M, K]  dtype of grad_preact, any strides
// partials     [parts, N, K]  fp32, contiguous
// grid         parts * ceil(N / kRows) * ceil(K / kCols) blocks; one owns a tile of one part's sums, neighbours read
// the
//              same rows
// shared       as Product
template <Arithmetic kArithmetic>
FASTENC_KERNEL(SmallTile::kThreads, SmallTile::kBlocks)
weight_partials_kernel(const WeightPartials args, const int64_t part_rows) {
  using T = Number<kArithmetic>;
  using Tile = SmallTile;
  using WeightProduct = WeightProduct<kArithmetic>;
  const int64_t tiles_k = divide_up(args.K, Tile::kCols), tiles = divide_up(args.N, Tile::kRows) * tiles_k;
  const int64_t part = block() / tiles, tile = block() % tiles;
  const int64_t n = tile / tiles_k * Tile::kRows, k = tile % tiles_k * Tile::kCols;
  const int64_t begin = part * part_rows, left = args.M - begin;
  const int64_t rows = left < part_rows ? left : part_rows;
  const Source<T> grad_preact(args.grad_preact, args.M, args.N), x(args.x, args.M, args.K);

  WeightProduct::multiply_tiles(grad_preact, n, x, k, begin,
                                divide_up(rows, WeightProduct::kStep) + PLANTED(WeightPartialsOneStepTooMany));
  store_tile<Tile::kThreads>(args.partials + (part * args.N + n) * args.K + k, args.K, args.N - n, args.K - k,
                             reinterpret_cast<const float*>(shared_memory()), WeightProduct::kOutLeading, Tile::kRows,
                             Tile::kCols, thread());
}

template <Arithmetic kArithmetic>
constexpr Geometry weight_partials_geometry(int64_t parts, int64_t N, int64_t K) {
  return {parts * count_tiles<SmallTile>(N, K), SmallTile::kThreads, WeightProduct<kArithmetic>::kSharedBytes};
}

}  // namespace fastenc::cuda
