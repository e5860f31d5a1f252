// The backward pass through a narrow stack, down its layers, on chip.
//
// A block owns consecutive rows and takes them a tile of kRows at a time. For each tile it goes from the last layer
// down to the lowest that anything is wanted of:
//
//   grad, fp32, registers --> dZ = grad * activation'(saved) --> rounded, tile G in shared memory
//                               |                                 |-> memory, if the weight's gradient is summed later
//                               v                                 |-> sums += G^T @ input    fp32, registers
//                       sums of the columns, shared               '-> grad = G @ weight      the next layer's
//
// A last layer of more than kWidest outputs goes by chunks of that many columns, which add up to the grad of the layer
// below; so does the gradient of x, out of the first layer's G.
//
// All that is read comes as tiles, by asynchronous copies, in one order: for each chunk of a layer [grad_out] [saved]
// [pieces of weight], then [input]. An input that also is what the derivative of the layer below is made of comes once.
// They pass through a ring of kChainSlots slots in shared memory. ChainFeed knows the order and keeps the ring filled,
// across layers and tiles: while a tile is used, the next ones are on their way. One barrier for each tile: it says
// that a tile is there for all, and that all are through with the one before, whose slot is filled next.
//
// Sums over rows: each 16 x 16 piece of a weight's gradient has one warp, in whose registers it stays, and each column
// of dZ one thread, so the order of every sum is fixed. In the end the block writes its sums to memory, for reduce.
//
// dZ is exactly 0 in rows and columns that only pad, and all else there is 0 as well: they add nothing, whatever the
// weights are.
#pragma once

#include "chain_feed.cuh"

namespace fastenc::cuda {

// The columns of a [kRows, width] tile that a warp has: from `first` on, `count`, a multiple of 16 or none.
struct WarpColumns {
  int first, count;

  FASTENC_DEVICE WarpColumns(int width, int warps) {
    const int each = round_up(width, 16 * warps) / warps;
    first = warp() % warps * each;
    count = width - first < each ? width - first : each;
  }
};

// function(value, number in the tile) for each number of the fragments that a lane has.
template <class T, class Function>
FASTENC_DEVICE void with_tile(typename ChainTile<T>::Fragments& fragments, const T* tile, int leading,
                              const WarpColumns& columns, Function&& function) {
  struct alignas(2 * sizeof(T)) Pair {
    T first, second;
  };
  const int group = lane() / 4, quad = lane() % 4;
  tile += (ChainTile<T>::warp_row() + group) * leading + columns.first + 2 * quad;
#pragma unroll
  for (int j = 0; j < ChainTile<T>::kFragmentCols; ++j) {
    if (8 * j >= columns.count) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Pair pair = load_shared(reinterpret_cast<const Pair*>(tile + 8 * half * leading + 8 * j));
      function(fragments[0][j][2 * half], to_float(pair.first));
      function(fragments[0][j][2 * half + 1], to_float(pair.second));
    }
  }
}

// The sums of the columns over the warp's 16 rows, to out[columns.first + ...].
template <class T>
FASTENC_DEVICE void sum_columns(const typename ChainTile<T>::Fragments& fragments, const WarpColumns& columns,
                                float* out) {
  const int group = lane() / 4, quad = lane() % 4;
#pragma unroll
  for (int j = 0; j < ChainTile<T>::kFragmentCols; ++j) {
    if (8 * j >= columns.count) continue;
    float even = fragments[0][j][0] + fragments[0][j][2], odd = fragments[0][j][1] + fragments[0][j][3];
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2) {
      even += shuffle_xor(even, mask);
      odd += shuffle_xor(odd, mask);
    }
    if (group < 2) {
      float* to = out + columns.first + 8 * j + 2 * quad + group;
      store_shared(to, (PLANTED(ChainArrivalOrder) ? load_shared(to) : 0.0f) + (group ? odd : even));
    }
  }
}

// function(piece, n, k) for each piece of a layer's weight gradient that the warp has; n, k: where it begins.
template <class Piece, class Function>
FASTENC_DEVICE void for_pieces(Piece (&pieces)[kChainPieces], const ChainLayer& layer, Function&& function) {
  const int across = static_cast<int>(divide_up(layer.in, 16));
  const int count = static_cast<int>(divide_up(layer.N, 16)) * across;
#pragma unroll
  for (int i = 0; i < kChainPieces; ++i) {
    const int piece = i * kChainWarps + warp() - layer.first_piece;
    if (piece >= 0 && piece < count) function(pieces[i], piece / across * 16, piece % across * 16);
  }
}

// out[r][c] = piece[r][c] where r < rows and c < cols; out has rows of `stride` numbers. Four lanes write a sector.
FASTENC_DEVICE void store_piece(float* out, const float (&piece)[1][2][4], int64_t rows, int64_t cols, int64_t stride) {
  struct alignas(8) Pair {
    float first, second;
  };
  const int group = lane() / 4, quad = lane() % 4;
#pragma unroll
  for (int j = 0; j < 2; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = group + 8 * half, c = 8 * j + 2 * quad;
      if (r >= rows + PLANTED(ChainSumsRowTooFar)) continue;
      float* to = out + r * stride + c;
      const Pair pair = {piece[0][j][2 * half], piece[0][j][2 * half + 1]};
      if (stride % 2 == 0 && c < cols) store_global(reinterpret_cast<Pair*>(to), pair);
      if (stride % 2 != 0 && c < cols) store_global(to, pair.first);
      if (stride % 2 != 0 && c + 1 < cols) store_global(to + 1, pair.second);
    }
}

// A block at its work.
template <Arithmetic kArithmetic>
class ChainBlock {
  using T = Number<kArithmetic>;
  using Tile = ChainTile<T>;
  using Fragments = typename Tile::Fragments;
  static constexpr int kWide = static_cast<int>(kWidest);

 public:
  FASTENC_DEVICE explicit ChainBlock(const Chain& args)
      : args_(args),
        warp_sums_(reinterpret_cast<float*>(shared_memory())),
        column_sums_(warp_sums_ + Tile::kWarpsM * kWide),
        g_(reinterpret_cast<T*>(warp_sums_ + ChainShared<T>::kColumnSums)),
        sums_(args.sums + block() * args.stride),
        begin_(block() * args.rows_per_block),
        end_(args.M - begin_ < args.rows_per_block ? args.M : begin_ + args.rows_per_block),
        feed_(args, g_ + Tile::kRows * args.leading, begin_, end_) {}

  FASTENC_DEVICE void run() {
    if (thread() < kWide)
      for (int l = 0; l <= args_.last; ++l) store_shared(column_sums_ + l * kWide + thread(), 0.0f);
    for (row_ = begin_; row_ < end_; row_ += Tile::kRows) {
      rows_ = static_cast<int>(end_ - row_ < Tile::kRows ? end_ - row_ : Tile::kRows);
      Fragments grad = {};
      for (int l = args_.last; l >= args_.lowest; --l) take_layer(l, args_.layers[l], grad);
    }
    for (int l = args_.last; l >= args_.lowest; --l) store_sums(l, args_.layers[l]);
  }

 private:
  // grad: of the layer's output, then of its input.
  FASTENC_DEVICE void take_layer(int l, const ChainLayer& layer, Fragments& grad) {
    Fragments below = {};
    for (int64_t chunk = 0; chunk < layer.N; chunk += kWidest) {
      const int width = chain_width(layer.N, chunk);
      differentiate(l, layer, chunk, width, grad);
      sum_bias(l, layer, chunk);
      if (layer.grad_preact) store(layer.grad_preact, layer.N, chunk, width, g_, args_.leading);
      if (!layer.weight.data) continue;
      for (int64_t k = 0; k < layer.in; k += kWidest) {
        const int width_below = chain_width(layer.in, k);
        const WarpColumns columns(width_below, Tile::kWarpsN);
        for (int n = 0; n < width; n += Tile::kRows) {
          tile_ = feed_.next();
          multiply<kArithmetic, Sum::kInner, Sum::kOuter>(
              below, g_ + Tile::warp_row() * args_.leading + n, args_.leading, tile_ + columns.first,
              args_.weight_leading, /* depth */ width - n < Tile::kRows ? width - n : Tile::kRows, columns.count);
        }
        if (l == 0) store_grad_x(layer, k, width_below, columns, below);
      }
    }
    if (layer.input.data) {
      tile_ = feed_.next();
      // TF32 reads G along its rows above, and across them here. Its leading suits the former; the latter goes by every
      // other row, whose numbers lie in different banks again.
      constexpr int kApart = kArithmetic == Arithmetic::kTf32 ? 2 : 1;
      for_pieces(pieces_, layer, [&](typename Tile::Piece& piece, int n, int k) {
        for (int first = 0; first < kApart; ++first)
          multiply<kArithmetic, Sum::kOuter, Sum::kOuter>(piece, g_ + first * args_.leading + n, kApart * args_.leading,
                                                          tile_ + first * args_.rows_leading + k,
                                                          kApart * args_.rows_leading, Tile::kRows / kApart);
      });
    }
#pragma unroll
    for (int j = 0; j < Tile::kFragmentCols; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) grad[0][j][e] = below[0][j][e];
  }

  // G = a chunk of the layer's dZ, and the sums of its columns by each row of warps.
  FASTENC_DEVICE void differentiate(int l, const ChainLayer& layer, int64_t chunk, int width, Fragments& grad) {
    const WarpColumns columns(width, Tile::kWarpsN);
    if (l == args_.last) {
      tile_ = feed_.next();
      with_tile<T>(grad, tile_, args_.rows_leading, columns, [](float& z, float value) { z = value; });
    }
    if (layer.saved.data) tile_ = feed_.next();
    with_activation(args_.layers[PLANTED(ChainWrongLayer) ? args_.last : l].activation, [&](auto activation) {
      if constexpr (!std::is_same_v<decltype(activation), Identity>)
        with_tile<T>(grad, tile_, args_.rows_leading, columns,
                     [](float& z, float saved) { z = decltype(activation)::backward(z, saved); });
    });
    const int cols = chain_columns(layer.N, chunk);
    for_each(grad, [&](int r, int c, float& z) {
      if (Tile::warp_row() + r >= rows_ && !PLANTED(ChainPaddedRows)) z = 0.0f;
      if (columns.first + c >= cols && !PLANTED(ChainPaddedColumns)) z = 0.0f;
    });

    if (!PLANTED(ChainNoBarrierBeforeOverwrite)) sync_block();  // all are through with the layer above's G
    put(g_ + Tile::warp_row() * args_.leading + columns.first, args_.leading, grad, columns.count);
    if (layer.bias_at != kNoSum)
      sum_columns<T>(
          grad, columns,
          PLANTED(ChainArrivalOrder) ? column_sums_ + l * kWide : warp_sums_ + Tile::warp_row() / 16 * kWide);
    if (!PLANTED(ChainNoBarrierBeforeSums)) sync_block();
  }

  // A column's sum is in shared memory, or, of a wide layer, at its place in memory from the first tile of rows on.
  FASTENC_DEVICE void sum_bias(int l, const ChainLayer& layer, int64_t chunk) {
    if (layer.bias_at == kNoSum || PLANTED(ChainArrivalOrder)) return;
    if (thread() >= chain_columns(layer.N, chunk) + PLANTED(ChainBiasTooFar)) return;
    float sum = load_shared(warp_sums_ + thread());
#pragma unroll
    for (int w = 1; w < Tile::kWarpsM; ++w) sum += load_shared(warp_sums_ + w * kWide + thread());
    if (layer.N <= kWidest) {
      float* total = column_sums_ + l * kWide + thread();
      store_shared(total, load_shared(total) + sum);
    } else {
      float* total = sums_ + layer.bias_at + chunk + thread();
      store_global(total, row_ == begin_ ? sum : load_global(total) + sum);
    }
  }

  // Columns of grad_x, through the slot of the latest piece of weight; then below = 0.
  FASTENC_DEVICE void store_grad_x(const ChainLayer& layer, int64_t k, int width, const WarpColumns& columns,
                                   Fragments& below) {
    if (!PLANTED(ChainNoBarrierBeforeStaging)) sync_block();
    put(tile_ + Tile::warp_row() * args_.weight_leading + columns.first, args_.weight_leading, below, columns.count);
    if (!PLANTED(ChainNoBarrierBeforeStore)) sync_block();
    store(args_.grad_x, layer.in, k, width, tile_, args_.weight_leading);
    for_each(below, [](int, int, float& z) { z = 0.0f; });
  }

  // The tile's rows, and columns from `col` on, of a contiguous [M, cols] matrix.
  FASTENC_DEVICE void store(void* out, int64_t cols, int64_t col, int width, const T* tile, int leading) {
    store_tile<kChainThreads>(static_cast<T*>(out) + row_ * cols + col, cols, rows_ + PLANTED(ChainStoreRowTooFar),
                              cols - col, tile, leading, Tile::kRows, width, thread());
  }

  FASTENC_DEVICE void store_sums(int l, const ChainLayer& layer) {
    if (layer.bias_at != kNoSum && layer.N <= kWidest && thread() < layer.N)
      store_global(sums_ + layer.bias_at + thread(), load_shared(column_sums_ + l * kWide + thread()));
    if (layer.input.data)
      for_pieces(pieces_, layer, [&](const typename Tile::Piece& piece, int n, int k) {
        store_piece(sums_ + layer.weight_at + n * layer.in + k, piece, layer.N - n, layer.in - k, layer.in);
      });
  }

  const Chain& args_;
  float* warp_sums_;    // [kWarpsM, kWidest]: of a tile's columns
  float* column_sums_;  // [kDeepest, kWidest]: of all tiles so far
  T* g_;
  float* sums_;
  int64_t begin_, end_, row_ = 0;  // rows: the block's, and the tile's first
  int rows_ = 0;                   // of the tile
  ChainFeed<T> feed_;
  T* tile_ = nullptr;  // the latest
  typename Tile::Piece pieces_[kChainPieces] = {};
};

// grad_out  [M, N of the last layer]  fp32 | fp16 | bf16, any strides
// weight    [N, in]  dtype of grad_out, any strides
// saved     [M, N]   dtype of grad_out, contiguous; the output, or what comes before the activation
// input     [M, in]  dtype of grad_out; contiguous, or x with any strides
// grad_x    [M, K]   dtype of grad_out, contiguous, or null; grad_preact [M, N] likewise
// sums      [blocks, stride]  fp32; from weight_at on dZ^T @ input, from bias_at on the sums of dZ's columns
// grid      ceil(M / rows_per_block) blocks; one owns that many rows, a multiple of kRows
// shared    ChainShared: the sums of columns, G, the ring
template <Arithmetic kArithmetic>
FASTENC_KERNEL(kChainThreads, 1)
encoder_chain_kernel(const Chain args) {
  ChainBlock<kArithmetic>(args).run();
}

}  // namespace fastenc::cuda
