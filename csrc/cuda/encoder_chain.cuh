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

#include "tile.cuh"

namespace fastenc::cuda {

constexpr int kChainWarps = 8, kChainThreads = 32 * kChainWarps;
constexpr int kChainSlots = 4;
constexpr int kChainPieces = 12;  // of weight gradients, in a warp's registers
constexpr int kNoSum = -1;

// A tile of rows and how the warps share it: kWarpsM x kWarpsN. Tiles of 16- and of 32-bit numbers are as many bytes.
template <class T>
struct ChainTile {
  static constexpr int kRows = sizeof(T) == 2 ? 64 : 32;
  static constexpr int kWarpsM = kRows / 16, kWarpsN = kChainWarps / kWarpsM;
  static constexpr int kFragmentCols = static_cast<int>(kWidest) / 8 / kWarpsN;
  using Fragments = float[1][kFragmentCols][4];
  using Piece = float[1][2][4];
  FASTENC_DEVICE static int warp_row() { return warp() / kWarpsN * 16; }
};

struct ChainLayer {
  int64_t N, in;  // in: the outputs of the layer below, or K
  ActivationKind activation;
  Matrix weight;      // [N, in]; no data: the gradient of the layer's input is not wanted
  Matrix saved;       // [M, N]; no data: the derivative needs nothing, or `input` of the layer above is it
  Matrix input;       // [M, in]; no data: the weight's gradient is not summed here
  void* grad_preact;  // [M, N] contiguous, or null: dZ is not wanted
  int first_piece;    // the pieces of the weight's gradient are numbered from here on
  int64_t weight_at;  // where in a block's sums it is, [N, in]
  int64_t bias_at;    // [N]; kNoSum: not wanted
};

struct Chain {
  int64_t M, rows_per_block;
  int last, lowest;           // layers
  int tile_leading, leading;  // of the tiles in the ring, and of G
  Matrix grad_out;            // [M, N of the last layer]
  void* grad_x;               // [M, K] contiguous, or null
  float* sums;                // [blocks, stride]
  int64_t stride;
  ChainLayer layers[kDeepest];
};

// The numbers of a tile's columns from `col` on, padded.
FASTENC_INLINE constexpr int chain_width(int64_t cols, int64_t col) {
  return round_up(static_cast<int>(cols - col < kWidest ? cols - col : kWidest), 16);
}

template <class T>
class ChainFeed {
 public:
  FASTENC_DEVICE ChainFeed(const Chain& args, T* ring, int64_t begin, int64_t end)
      : args_(args), ring_(ring), end_(end), row_(begin), layer_(args.last) {
    for (int i = 0; i < kChainSlots - 1; ++i) load();
  }

  // The next tile.
  FASTENC_DEVICE T* next() {
    if (PLANTED(ChainEarlyWait)) wait_copies<kChainSlots - 1>();
    if (!PLANTED(ChainMissingWait) && !PLANTED(ChainEarlyWait)) wait_copies<kChainSlots - 2>();
    if (!PLANTED(ChainNoBarrierBeforeUse)) sync_block();
    load();
    T* tile = slot(used_);
    used_ = (used_ + 1) % kChainSlots;
    return tile;
  }

 private:
  static constexpr int kRows = ChainTile<T>::kRows;
  enum Part { kGradOut, kSaved, kWeight, kInput };

  FASTENC_DEVICE T* slot(int number) const { return ring_ + number * kRows * args_.tile_leading; }

  FASTENC_DEVICE void load() {
    if (row_ < end_) {
      const ChainLayer& layer = args_.layers[layer_];
      const bool weight = part_ == kWeight;
      const Matrix& matrix = weight              ? layer.weight
                             : part_ == kGradOut ? args_.grad_out
                             : part_ == kSaved   ? layer.saved
                                                 : layer.input;
      const int64_t cols = part_ == kGradOut || part_ == kSaved ? layer.N : layer.in;
      const int64_t col = weight ? k_ : part_ == kInput ? 0 : chunk_;
      const int64_t left = layer.N - n_;
      load_tile<kChainThreads>(slot(loaded_), args_.tile_leading,
                               weight && left < kRows ? round_up(static_cast<int>(left), 16) : kRows,
                               chain_width(cols, col), Source<T>(matrix, weight ? layer.N : args_.M, cols),
                               weight ? n_ : row_, col, thread());
      loaded_ = (loaded_ + 1) % kChainSlots;
      do step();
      while (!exists());
    }
    commit_copies();
  }

  FASTENC_DEVICE bool exists() const {
    const ChainLayer& layer = args_.layers[layer_];
    return part_ == kGradOut || (part_ == kSaved    ? layer.saved.data
                                 : part_ == kWeight ? layer.weight.data
                                                    : layer.input.data) != nullptr;
  }

  FASTENC_DEVICE void step() {
    const ChainLayer& layer = args_.layers[layer_];
    if (part_ == kGradOut) {
      part_ = kSaved;
    } else if (part_ == kSaved) {
      part_ = kWeight;
      n_ = chunk_;
      k_ = 0;
    } else if (part_ == kWeight) {
      n_ += kRows;
      if (layer.weight.data) {
        if (n_ < layer.N && n_ < chunk_ + kWidest) return;
        n_ = chunk_;
        k_ += kWidest;
        if (k_ < layer.in) return;
      }
      chunk_ += kWidest;
      part_ = chunk_ < layer.N ? kGradOut : kInput;
    } else {
      chunk_ = 0;
      part_ = layer_ > args_.lowest ? kSaved : kGradOut;
      if (layer_ == args_.lowest) row_ += kRows;
      layer_ = layer_ > args_.lowest ? layer_ - 1 : args_.last;
    }
  }

  const Chain& args_;
  T* ring_;
  int64_t end_;
  int loaded_ = 0, used_ = 0;  // slots
  // What is loaded next: of which rows, of which layer, which columns of it, and which rows and columns of a weight.
  int64_t row_;
  int layer_;
  Part part_ = kGradOut;
  int64_t chunk_ = 0, n_ = 0, k_ = 0;
};

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

// out[r][c] = piece[r][c] where r < rows and c < cols; out has rows of `stride` numbers.
FASTENC_DEVICE void store_piece(float* out, float (&piece)[1][2][4], int64_t rows, int64_t cols, int64_t stride) {
  for_each(piece, [&](int r, int c, float value) {
    if (r < rows && c < cols) store_global(out + r * stride + c, value);
  });
}

template <class T>
struct ChainShared {
  // Sums of the columns: of a tile by each row of warps, and of all tiles so far by each layer.
  static constexpr int kColumnSums = (ChainTile<T>::kWarpsM + static_cast<int>(kDeepest)) * static_cast<int>(kWidest);
  static constexpr int64_t bytes(int tile_leading, int leading) {
    return int64_t{kColumnSums} * sizeof(float) +
           int64_t{ChainTile<T>::kRows} * (kChainSlots * tile_leading + leading) * sizeof(T);
  }
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
  using T = Number<kArithmetic>;
  using Tile = ChainTile<T>;
  constexpr int kWide = static_cast<int>(kWidest);
  float* warp_sums = reinterpret_cast<float*>(shared_memory());  // [kWarpsM, kWidest]
  float* column_sums = warp_sums + Tile::kWarpsM * kWide;        // [kDeepest, kWidest]
  T* g = reinterpret_cast<T*>(warp_sums + ChainShared<T>::kColumnSums);
  const int64_t begin = block() * args.rows_per_block, left = args.M - begin;
  const int64_t end = begin + (left < args.rows_per_block ? left : args.rows_per_block);
  float* sums = args.sums + block() * args.stride;

  ChainFeed<T> feed(args, g + Tile::kRows * args.leading, begin, end);
  typename Tile::Piece pieces[kChainPieces] = {};
  if (thread() < kWide)
    for (int l = 0; l <= args.last; ++l) store_shared(column_sums + l * kWide + thread(), 0.0f);

  for (int64_t row = begin; row < end; row += Tile::kRows) {
    const int rows = static_cast<int>(end - row < Tile::kRows ? end - row : Tile::kRows);
    typename Tile::Fragments grad = {};
    T* tile = nullptr;  // the latest
    for (int l = args.last; l >= args.lowest; --l) {
      const ChainLayer& layer = args.layers[l];
      typename Tile::Fragments below = {};
      for (int64_t chunk = 0; chunk < layer.N; chunk += kWidest) {
        const int width = chain_width(layer.N, chunk);
        const WarpColumns columns(width, Tile::kWarpsN);
        if (l == args.last) {
          tile = feed.next();
          with_tile<T>(grad, tile, args.tile_leading, columns, [](float& z, float value) { z = value; });
        }
        if (layer.saved.data) tile = feed.next();
        const int cols = static_cast<int>(layer.N - chunk < kWidest ? layer.N - chunk : kWidest);
        with_activation(args.layers[PLANTED(ChainWrongLayer) ? args.last : l].activation, [&](auto activation) {
          if constexpr (!std::is_same_v<decltype(activation), Identity>)
            with_tile<T>(grad, tile, args.tile_leading, columns,
                         [](float& z, float saved) { z = decltype(activation)::backward(z, saved); });
        });
        for_each(grad, [&](int r, int c, float& z) {
          if (Tile::warp_row() + r >= rows && !PLANTED(ChainPaddedRows)) z = 0.0f;
          if (columns.first + c >= cols && !PLANTED(ChainPaddedColumns)) z = 0.0f;
        });

        if (!PLANTED(ChainNoBarrierBeforeOverwrite)) sync_block();  // all are through with the layer above's G
        put(g + Tile::warp_row() * args.leading + columns.first, args.leading, grad, columns.count);
        if (layer.bias_at != kNoSum)
          sum_columns<T>(
              grad, columns,
              PLANTED(ChainArrivalOrder) ? column_sums + l * kWide : warp_sums + Tile::warp_row() / 16 * kWide);
        if (!PLANTED(ChainNoBarrierBeforeSums)) sync_block();
        if (layer.bias_at != kNoSum && thread() < cols + PLANTED(ChainBiasTooFar) && !PLANTED(ChainArrivalOrder)) {
          float sum = load_shared(warp_sums + thread());
#pragma unroll
          for (int w = 1; w < Tile::kWarpsM; ++w) sum += load_shared(warp_sums + w * kWide + thread());
          float* total = sums + layer.bias_at + chunk + thread();
          if (layer.N <= kWidest) {
            float* of_layer = column_sums + l * kWide + thread();
            store_shared(of_layer, load_shared(of_layer) + sum);
          } else {
            store_global(total, row == begin ? sum : load_global(total) + sum);
          }
        }
        if (layer.grad_preact)
          store_tile<kChainThreads>(static_cast<T*>(layer.grad_preact) + row * layer.N + chunk, layer.N,
                                    rows + PLANTED(ChainStoreRowTooFar), layer.N - chunk, g, args.leading, Tile::kRows,
                                    width, thread());

        if (!layer.weight.data) continue;
        for (int64_t k = 0; k < layer.in; k += kWidest) {
          const int width_below = chain_width(layer.in, k);
          const WarpColumns columns_below(width_below, Tile::kWarpsN);
          for (int n = 0; n < width; n += Tile::kRows) {
            tile = feed.next();
            multiply<kArithmetic, Sum::kInner, Sum::kOuter>(
                below, g + Tile::warp_row() * args.leading + n, args.leading, tile + columns_below.first,
                args.tile_leading, width - n < Tile::kRows ? width - n : Tile::kRows, columns_below.count);
          }
          if (l > 0) continue;
          // A piece of grad_x, through the slot of the last piece of weight.
          if (!PLANTED(ChainNoBarrierBeforeStaging)) sync_block();
          put(tile + Tile::warp_row() * args.tile_leading + columns_below.first, args.tile_leading, below,
              columns_below.count);
          if (!PLANTED(ChainNoBarrierBeforeStore)) sync_block();
          store_tile<kChainThreads>(static_cast<T*>(args.grad_x) + row * layer.in + k, layer.in,
                                    rows + PLANTED(ChainStoreRowTooFar), layer.in - k, tile, args.tile_leading,
                                    Tile::kRows, width_below, thread());
          for_each(below, [](int, int, float& z) { z = 0.0f; });
        }
      }
      if (layer.input.data) {
        tile = feed.next();
        for_pieces(pieces, layer, [&](typename Tile::Piece& piece, int n, int k) {
          multiply<kArithmetic, Sum::kOuter, Sum::kOuter>(piece, g + n, args.leading, tile + k, args.tile_leading,
                                                          Tile::kRows);
        });
      }
#pragma unroll
      for (int j = 0; j < Tile::kFragmentCols; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) grad[0][j][e] = below[0][j][e];
    }
  }

  for (int l = args.last; l >= args.lowest; --l) {
    const ChainLayer& layer = args.layers[l];
    if (layer.bias_at != kNoSum && layer.N <= kWidest && thread() < layer.N)
      store_global(sums + layer.bias_at + thread(), load_shared(column_sums + l * kWide + thread()));
    if (layer.input.data)
      for_pieces(pieces, layer, [&](typename Tile::Piece& piece, int n, int k) {
        store_piece(sums + layer.weight_at + n * layer.in + k, piece, layer.N - n, layer.in - k, layer.in);
      });
  }
}

}  // namespace fastenc::cuda
