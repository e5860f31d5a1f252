// The tiles that a block of the encoder chain reads, and how the block is cut into warps.
#pragma once

#include "tile.cuh"

namespace fastenc::cuda {

constexpr int kChainWarps = 8, kChainThreads = 32 * kChainWarps;
constexpr int kChainSlots = 4;
constexpr int kChainPieces = 11;  // of weight gradients, in a warp's registers
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
  int last, lowest;                           // layers
  int weight_leading, rows_leading, leading;  // of the tiles of weights and of rows in the ring, and of G
  Matrix grad_out;                            // [M, N of the last layer]
  void* grad_x;                               // [M, K] contiguous, or null
  float* sums;                                // [blocks, stride]
  int64_t stride;
  ChainLayer layers[kDeepest];
};

// How many of `cols` columns a tile has that begins at `col`; padded, as it is in shared memory.
FASTENC_INLINE constexpr int chain_columns(int64_t cols, int64_t col) {
  return static_cast<int>(cols - col < kWidest ? cols - col : kWidest);
}
FASTENC_INLINE constexpr int chain_width(int64_t cols, int64_t col) { return round_up(chain_columns(cols, col), 16); }

template <class T>
struct ChainShared {
  // Sums of the columns: of a tile by each row of warps, and of all tiles so far by each layer.
  static constexpr int kColumnSums = (ChainTile<T>::kWarpsM + static_cast<int>(kDeepest)) * static_cast<int>(kWidest);
  static constexpr int64_t bytes(int weight_leading, int leading) {
    return int64_t{kColumnSums} * sizeof(float) +
           int64_t{ChainTile<T>::kRows} * (kChainSlots * weight_leading + leading) * sizeof(T);
  }
};

// All that a block reads, tile by tile, from a ring that it keeps filled. The order, for each tile of rows and each
// layer from the last down: for each chunk of the layer [grad_out, of the last layer] [saved] [pieces of weight], then
// [input]. What has no data is left out.
template <class T>
class ChainFeed {
 public:
  FASTENC_DEVICE ChainFeed(const Chain& args, T* ring, int64_t begin, int64_t end)
      : args_(args), ring_(ring), end_(end), row_(begin), layer_(args.last) {
    for (int i = 0; i < kChainSlots - 1; ++i) load();
  }

  // The next tile, there for all threads, which are all through with the one before.
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

  FASTENC_DEVICE T* slot(int number) const { return ring_ + number * kRows * args_.weight_leading; }

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
      load_tile<kChainThreads>(slot(loaded_), weight ? args_.weight_leading : args_.rows_leading,
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

}  // namespace fastenc::cuda
