// One dense layer, forward.
#pragma once

#include "product.cuh"

namespace fastenc::cuda {

// Whether large tiles make enough blocks to fill a GPU.
constexpr bool wants_large_tiles(int64_t M, int64_t N) { return count_tiles<LargeTile>(M, N) >= kMultiprocessors; }

template <class T, class Tile>
constexpr int kOutLeading = leading<T>(Tile::kCols, Sum::kOuter);

// x       [M, K]  fp32 | fp16 | bf16, any strides
// weight  [N, K]  dtype of x, any strides; kSumWeight is kOuter where it is contiguous as [K, N]
// out     [M, N]  dtype of x, contiguous; preact likewise, or null
// grid    ceil(M / kRows) * ceil(N / kCols) blocks; one owns a tile of out, neighbours share rows of x
// shared  as Product, then the rounded tile on its way out
template <Arithmetic kArithmetic, class Tile>
FASTENC_KERNEL(Tile::kThreads)
dense_forward_kernel(const DenseForward args) {
  using T = Number<kArithmetic>;
  constexpr int kLeading = kOutLeading<T, Tile>;
  const int64_t tiles_n = divide_up(args.N, Tile::kCols);
  const int64_t row = block() / tiles_n * Tile::kRows, col = block() % tiles_n * Tile::kCols;
  const Source<T> x(args.x, args.M, args.K), weight(args.weight, args.N, args.K);
  using ForwardProduct = Product<kArithmetic, Tile, Sum::kInner, Sum::kInner>;

  typename Tile::Fragments acc = {};
  ForwardProduct::multiply_tiles(acc, x, row, weight, col, 0, divide_up(args.K, ForwardProduct::kStep));

  T* tile = reinterpret_cast<T*>(shared_memory());
  const T* bias = static_cast<const T*>(args.bias);
  if (bias)
    for_each(acc, [&](int, int c, float& z) {
      const int64_t n = col + Tile::warp_col() + c;
      if (n < args.N + PLANTED(BiasTooFar)) z += to_float(load_global(bias + n));
    });

  const auto store = [&](void* to) {
    put(tile + Tile::warp_row() * kLeading + Tile::warp_col(), kLeading, acc);
    if (!PLANTED(NoBarrierBeforeStore)) sync_block();
    store_tile<Tile::kThreads>(static_cast<T*>(to) + row * args.N + col, args.N, args.M - row, args.N - col, tile,
                               kLeading, Tile::kRows, Tile::kCols, thread());
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
  return {count_tiles<Tile>(M, N), Tile::kThreads,
          Product<kArithmetic, Tile, Sum::kInner, Sum::kInner>::shared_bytes(kOutLeading<Number<kArithmetic>, Tile>,
                                                                             sizeof(Number<kArithmetic>))};
}

}  // namespace fastenc::cuda
