// The product of two matrices by tiles: what the dense kernels have in common.
#pragma once

#include "tile.cuh"

namespace fastenc::cuda {

// The tile of a product that a block owns: kWarpsM x kWarpsN warps, each with 16 kMT x 8 kNT of it.
template <int kWarpsM, int kWarpsN, int kMT, int kNT>
struct BlockTile {
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kRows = 16 * kMT * kWarpsM, kCols = 8 * kNT * kWarpsN;
  static constexpr int kFragmentRows = kMT, kFragmentCols = kNT;
  using Fragments = float[kMT][kNT][4];
  FASTENC_DEVICE static int warp_row() { return warp() / kWarpsN * 16 * kMT; }
  FASTENC_DEVICE static int warp_col() { return warp() % kWarpsN * 8 * kNT; }
};
using LargeTile = BlockTile<2, 4, 4, 4>;  // 128 x 128
using SmallTile = BlockTile<2, 2, 2, 4>;  // 64 x 64

constexpr int64_t kMultiprocessors = 128;  // about as many as an A100 or H100 has

template <class Tile>
constexpr int64_t count_tiles(int64_t rows, int64_t cols) {
  return divide_up(rows, Tile::kRows) * divide_up(cols, Tile::kCols);
}

// Pieces of the operands a [rows, depth] and b [cols, depth], or transposed if their Sum is kOuter, as they pass
// through shared memory: kStages stages of kStep of the depth, 64 bytes. The finished tile goes out over them.
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

  // The bytes of shared memory, where the finished tile is of numbers of `out_size` bytes in rows of out_leading.
  static constexpr int64_t shared_bytes(int out_leading, int64_t out_size) {
    const int64_t stages = int64_t{kStages} * kStageElements * sizeof(T), out = Tile::kRows * out_leading * out_size;
    return stages > out ? stages : out;
  }

  // acc = the tile from (row, col) on of the product over the depths from `begin` on, in `steps` steps.
  FASTENC_DEVICE static void multiply_tiles(typename Tile::Fragments& acc, const Source<T>& a, int64_t row,
                                            const Source<T>& b, int64_t col, int64_t begin, int64_t steps) {
    T* stages = reinterpret_cast<T*>(shared_memory());
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
  }
};

}  // namespace fastenc::cuda
