// The product of two matrices by tiles: what the dense kernels have in common.
#pragma once

#include "tile.cuh"

namespace fastenc::cuda {

// The tile of a product that a block owns: kWarpsM x kWarpsN warps, each with 16 kMT x 8 kNT of it. Registers are few
// enough for kBlocks blocks on a multiprocessor.
template <int kWarpsM, int kWarpsN, int kMT, int kNT>
struct BlockTile {
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN, kBlocks = 512 / kThreads;
  static constexpr int kRows = 16 * kMT * kWarpsM, kCols = 8 * kNT * kWarpsN;
  static constexpr int kFragmentRows = kMT, kFragmentCols = kNT;
  FASTENC_DEVICE static int warp_row() { return warp() / kWarpsN * 16 * kMT; }
  FASTENC_DEVICE static int warp_col() { return warp() % kWarpsN * 8 * kNT; }
};
using LargeTile = BlockTile<2, 4, 4, 4>;  // 128 x 128
using SmallTile = BlockTile<2, 2, 2, 4>;  // 64 x 64

template <class Tile>
constexpr int64_t count_tiles(int64_t rows, int64_t cols) {
  return divide_up(rows, Tile::kRows) * divide_up(cols, Tile::kCols);
}

// The tile of a block: blocks go down kBand rows of tiles, then on to the next column, so that those at work at the
// same time read few rows and few columns.
struct TilePlace {
  int64_t row, col;
};
template <class Tile>
FASTENC_DEVICE TilePlace place_tile(int64_t rows, int64_t cols) {
  constexpr unsigned kBand = 8;
  const unsigned tiles_m = static_cast<unsigned>(divide_up(rows, Tile::kRows));
  const unsigned tiles_n = static_cast<unsigned>(divide_up(cols, Tile::kCols));
  const unsigned number = static_cast<unsigned>(block()), band = number / (kBand * tiles_n) * kBand;
  const unsigned height = tiles_m - band < kBand ? tiles_m - band : kBand, in_band = number - band * tiles_n;
  return {int64_t{band + in_band % height} * Tile::kRows, int64_t{in_band / height} * Tile::kCols};
}

// Pieces of the operands a [rows, depth] and b [cols, depth], or transposed if their Sum is kOuter, as they pass
// through shared memory: kStages stages of kStep of the depth, 64 bytes. The finished tile lies over them.
template <Arithmetic kArithmetic, class Tile, Sum kSumA, Sum kSumB>
struct Product {
  using T = Number<kArithmetic>;
  static constexpr int kStages = 4;
  static constexpr int kStep = 64 / sizeof(T);
  static constexpr int kRowsA = kSumA == Sum::kInner ? Tile::kRows : kStep;
  static constexpr int kColsA = kSumA == Sum::kInner ? kStep : Tile::kRows;
  static constexpr int kRowsB = kSumB == Sum::kInner ? Tile::kCols : kStep;
  static constexpr int kColsB = kSumB == Sum::kInner ? kStep : Tile::kCols;
  static constexpr int kLeadingA = leading<T>(kColsA, kSumA), kLeadingB = leading<T>(kColsB, kSumB);
  static constexpr int kElementsA = kRowsA * kLeadingA, kStageElements = kElementsA + kRowsB * kLeadingB;

  static constexpr int kOutLeading = leading<float>(Tile::kCols, Sum::kOuter);
  static constexpr int64_t kStageBytes = int64_t{kStages} * kStageElements * sizeof(T);
  static constexpr int64_t kOutBytes = int64_t{Tile::kRows} * kOutLeading * sizeof(float);
  static constexpr int64_t kSharedBytes = kStageBytes > kOutBytes ? kStageBytes : kOutBytes;

  // Leaves in shared memory, in fp32 and rows of kOutLeading, the tile from (row, col) on of the product over the
  // depths from `begin` on, in `steps` steps.
  FASTENC_DEVICE static void multiply_tiles(const Source<T>& a, int64_t row, const Source<T>& b, int64_t col,
                                            int64_t begin, int64_t steps) {
    T* stages = reinterpret_cast<T*>(shared_memory());
    float acc[Tile::kFragmentRows][Tile::kFragmentCols][4] = {};
    pipeline<kStages>(
        steps,
        [&](int64_t step, int stage) {
          const int64_t depth = begin + step * kStep;
          T* tile = stages + stage * kStageElements;
          load_tile<Tile::kThreads>(tile, kLeadingA, kRowsA, kColsA, a, kSumA == Sum::kInner ? row : depth,
                                    kSumA == Sum::kInner ? depth : row, thread());
          load_tile<Tile::kThreads>(tile + kElementsA, kLeadingB, kRowsB, kColsB, b, kSumB == Sum::kInner ? col : depth,
                                    kSumB == Sum::kInner ? depth : col, thread());
        },
        [&](int64_t, int stage) {
          const T* tile = stages + stage * kStageElements;
          multiply<kArithmetic, kSumA, kSumB>(
              acc, tile + Tile::warp_row() * (kSumA == Sum::kInner ? kLeadingA : 1), kLeadingA,
              tile + kElementsA + Tile::warp_col() * (kSumB == Sum::kInner ? kLeadingB : 1), kLeadingB, kStep);
        });
    put(reinterpret_cast<float*>(stages) + Tile::warp_row() * kOutLeading + Tile::warp_col(), kOutLeading, acc);
    if (!PLANTED(NoBarrierBeforeStore)) sync_block();
  }
};

}  // namespace fastenc::cuda
