// One dense layer, forward.
#pragma once

#include "tile.cuh"

namespace fastenc::cuda {

// The tile of a product that a block owns: kWarpsM x kWarpsN warps, each with 16 kMT x 8 kNT of it.
template <int kWarpsM, int kWarpsN, int kMT, int kNT>
struct BlockTile {
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kRows = 16 * kMT * kWarpsM, kCols = 8 * kNT * kWarpsN;
  static constexpr int kFragmentRows = kMT, kFragmentCols = kNT;
  FASTENC_DEVICE static int warp_row() { return warp() / kWarpsN * 16 * kMT; }
  FASTENC_DEVICE static int warp_col() { return warp() % kWarpsN * 8 * kNT; }
};
using LargeTile = BlockTile<2, 4, 4, 4>;  // 128 x 128
using SmallTile = BlockTile<2, 2, 2, 4>;  // 64 x 64

constexpr int kStages = 4;
// Columns of an operand that one stage holds: 64 bytes.
template <class T>
constexpr int kStep = 64 / sizeof(T);

// Whether large tiles make enough blocks to fill a GPU.
constexpr bool wants_large_tiles(int64_t rows, int64_t cols) {
  constexpr int64_t kEnough = 128;  // about the number of multiprocessors of an A100 or H100
  return divide_up(rows, LargeTile::kRows) * divide_up(cols, LargeTile::kCols) >= kEnough;
}

template <Arithmetic kArithmetic, class Tile>
struct DenseForwardShared {
  using T = Number<kArithmetic>;
  static constexpr int kLeading = leading<T>(kStep<T>);
  static constexpr int kOutLeading = leading<T>(Tile::kCols, Sum::kOuter);
  static constexpr int kStageElements = (Tile::kRows + Tile::kCols) * kLeading;
  static constexpr int64_t kStageBytes = int64_t{kStages} * kStageElements * sizeof(T);
  static constexpr int64_t kOutBytes = int64_t{Tile::kRows} * kOutLeading * sizeof(T);
  static constexpr int64_t kBytes = kStageBytes > kOutBytes ? kStageBytes : kOutBytes;
};

// x       [M, K]  fp32 | fp16 | bf16, any strides
// weight  [N, K]  dtype of x, any strides
// out     [M, N]  dtype of x, contiguous; preact likewise, or null
// grid    ceil(M / kRows) * ceil(N / kCols) blocks; one owns a tile of out, neighbours share rows of x
// shared  kStages pieces of x and of weight, kStep columns each; then, over them, the rounded tile on its way out
template <Arithmetic kArithmetic, class Tile>
FASTENC_KERNEL(Tile::kThreads)
dense_forward_kernel(const DenseForward args) {
  using T = Number<kArithmetic>;
  using Shared = DenseForwardShared<kArithmetic, Tile>;
  const int64_t tiles_n = divide_up(args.N, Tile::kCols);
  const int64_t row = block() / tiles_n * Tile::kRows, col = block() % tiles_n * Tile::kCols;
  const Source<T> x(args.x, args.M, args.K), weight(args.weight, args.N, args.K);
  T* stages = reinterpret_cast<T*>(shared_memory());

  float acc[Tile::kFragmentRows][Tile::kFragmentCols][4] = {};
  pipeline<kStages>(
      divide_up(args.K, kStep<T>),
      [&](int64_t step, int stage) {
        T* tile = stages + stage * Shared::kStageElements;
        load_tile<Tile::kThreads>(tile, Shared::kLeading, Tile::kRows, kStep<T>, x, row, step * kStep<T>, thread());
        load_tile<Tile::kThreads>(tile + Tile::kRows * Shared::kLeading, Shared::kLeading, Tile::kCols, kStep<T>,
                                  weight, col, step * kStep<T>, thread());
      },
      [&](int64_t, int stage) {
        const T* tile = stages + stage * Shared::kStageElements;
        multiply<kArithmetic, Sum::kInner, Sum::kInner>(
            acc, tile + Tile::warp_row() * Shared::kLeading, Shared::kLeading,
            tile + (Tile::kRows + Tile::warp_col()) * Shared::kLeading, Shared::kLeading, kStep<T>);
      });

  const T* bias = static_cast<const T*>(args.bias);
  if (bias)
    for_each(acc, [&](int, int c, float& z) {
      const int64_t n = col + Tile::warp_col() + c;
      if (n < args.N + PLANTED(BiasTooFar)) z += to_float(load_global(bias + n));
    });

  const auto store = [&](void* to) {
    put(stages + Tile::warp_row() * Shared::kOutLeading + Tile::warp_col(), Shared::kOutLeading, acc);
    if (!PLANTED(NoBarrierBeforeStore)) sync_block();
    store_tile<Tile::kThreads>(static_cast<T*>(to) + row * args.N + col, args.N, args.M - row, args.N - col, stages,
                               Shared::kOutLeading, Tile::kRows, Tile::kCols, thread());
  };
  if (args.preact) {
    store(args.preact);
    if (!PLANTED(NoBarrierBeforeOverwrite)) sync_block();
  }
  with_activation(args.activation, [&](auto activation) {
    for_each(acc, [&](int, int, float& z) { z = decltype(activation)::forward(z); });
  });
  store(args.out);
}

template <Arithmetic kArithmetic, class Tile>
constexpr Geometry dense_forward_geometry(int64_t M, int64_t N) {
  return {divide_up(M, Tile::kRows) * divide_up(N, Tile::kCols), Tile::kThreads,
          DenseForwardShared<kArithmetic, Tile>::kBytes};
}

inline Status dense_forward(const DenseForward& args, Stream stream) {
  if (args.M == 0 || args.N == 0) return 0;
  return with_arithmetic(args.arithmetic, [&](auto arithmetic) {
    constexpr Arithmetic kArithmetic = decltype(arithmetic)::value;
    if (wants_large_tiles(args.M, args.N))
      return launch<dense_forward_kernel<kArithmetic, LargeTile>>(
          dense_forward_geometry<kArithmetic, LargeTile>(args.M, args.N), stream, args);
    return launch<dense_forward_kernel<kArithmetic, SmallTile>>(
        dense_forward_geometry<kArithmetic, SmallTile>(args.M, args.N), stream, args);
  });
}

}  // namespace fastenc::cuda
