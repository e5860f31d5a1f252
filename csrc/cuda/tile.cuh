// Tiles: pieces of matrices in shared memory, from and to memory, and their products.
//
// A tile has rows of `leading` elements: a little longer than its width, so that what a warp reads together lies in
// different banks. An operand of a product has the index that is summed over along its rows (kSumInner) or across them
// (kSumOuter). Products are made by warps. A warp's part of a result is float[kMT][kNT][4]: kMT x kNT fragments of 16 x
// 8 in the layout of mma.m16n8, also for IEEE fp32, which has no tensor cores.
#pragma once

#include <cmath>
#include <type_traits>

#include "gpu.cuh"

namespace fastenc::cuda {

template <Arithmetic kArithmetic>
struct NumberOf {
  using Type = float;
};
template <>
struct NumberOf<Arithmetic::kHalf> {
  using Type = Half;
};
template <>
struct NumberOf<Arithmetic::kBFloat16> {
  using Type = BFloat16;
};
template <Arithmetic kArithmetic>
using Number = typename NumberOf<kArithmetic>::Type;

// Calls function(std::integral_constant<Arithmetic, ...>) with the arithmetic.
template <class Function>
auto with_arithmetic(Arithmetic arithmetic, Function&& function) {
  switch (arithmetic) {
    case Arithmetic::kTf32: return function(std::integral_constant<Arithmetic, Arithmetic::kTf32>{});
    case Arithmetic::kHalf: return function(std::integral_constant<Arithmetic, Arithmetic::kHalf>{});
    case Arithmetic::kBFloat16: return function(std::integral_constant<Arithmetic, Arithmetic::kBFloat16>{});
    default: return function(std::integral_constant<Arithmetic, Arithmetic::kIeee>{});
  }
}

constexpr int64_t kMultiprocessors = 128;  // about as many as an A100 or H100 has

enum class Sum { kInner, kOuter };

// The elements from one row of a tile to the next. width is a multiple of 16. Rows are 16 bytes longer, an odd number
// of 16-byte units; with 32-bit numbers across the sum, where lanes read down a column, 32 bytes longer.
template <class T>
FASTENC_INLINE constexpr int leading(int width, Sum sum = Sum::kInner) {
  return width + static_cast<int>((sum == Sum::kOuter && sizeof(T) == 4 ? 32 : 16) / sizeof(T));
}

FASTENC_INLINE constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
FASTENC_INLINE constexpr int round_up(int a, int b) { return (a + b - 1) / b * b; }

// The most bytes, of 16, 8 and 4, that every access to rows of this address and stride can have; 0: by elements.
template <class T>
FASTENC_INLINE int access_bytes(const void* data, int64_t row_stride, int64_t col_stride) {
  const uint64_t bits = reinterpret_cast<uintptr_t>(data) | static_cast<uint64_t>(row_stride) * sizeof(T);
  if (col_stride != 1) return 0;
  return bits % 16 == 0 ? 16 : bits % 8 == 0 ? 8 : bits % 4 == 0 ? 4 : 0;
}

// A [rows, cols] matrix to read tiles from.
template <class T>
struct Source {
  const T* data;
  int64_t row_stride, col_stride;
  int64_t rows, cols;
  int bytes;  // access_bytes

  FASTENC_DEVICE Source(const Matrix& matrix, int64_t rows, int64_t cols)
      : data(static_cast<const T*>(matrix.data)),
        row_stride(matrix.row_stride),
        col_stride(matrix.col_stride),
        rows(rows),
        cols(cols),
        bytes(access_bytes<T>(matrix.data, matrix.row_stride, matrix.col_stride)) {}
};

// How many of `most` numbers from `first` on lie before `end`.
FASTENC_DEVICE int count_left(int64_t first, int64_t end, int most) {
  return end - first < most ? static_cast<int>(end - first) : most;
}

template <int kBytes, int kThreads, class T>
FASTENC_DEVICE void copy_tile(T* tile, int tile_leading, int tile_rows, int tile_cols, const Source<T>& source,
                              int64_t row, int64_t col, int index) {
  constexpr int kEach = kBytes / static_cast<int>(sizeof(T));
  const int per_row = tile_cols / kEach;
  const int rows = count_left(row, source.rows + PLANTED(LoadRowTooFar), tile_rows);
  const int cols = count_left(col, source.cols + PLANTED(LoadColumnTooFar), tile_cols);
  const T* const from = source.data + row * source.row_stride + col;
  // Few copies of the kernel's code, and of addresses in registers: only the usual ones are unrolled.
#pragma unroll(kBytes == 16 ? 2 : 1)
  for (int i = index; i < tile_rows * per_row; i += kThreads) {
    // Eight lanes that write together write to different banks: those of a long row, or of eight rows.
    const bool along = per_row % 8 == 0;
    const int r = along ? i / per_row : i / (8 * per_row) * 8 + i % 8;
    const int c = (along ? i % per_row : i / 8 % per_row) * kEach;
    const int count = r >= rows || c >= cols ? 0 : cols - c < kEach ? cols - c : kEach;
    copy_async<kBytes>(tile + r * tile_leading + c, count > 0 ? from + r * source.row_stride + c : source.data,
                       count * static_cast<int>(sizeof(T)));
  }
}

// tile[r][c] = source[row + r][col + c], and 0 outside of the source, by kThreads threads of which this is number
// `index`. tile_rows and tile_cols are multiples of 16. It is there after the copies are committed and waited for, and
// a barrier.
template <int kThreads, class T>
FASTENC_DEVICE void load_tile(T* tile, int tile_leading, int tile_rows, int tile_cols, const Source<T>& source,
                              int64_t row, int64_t col, int index) {
  if (source.bytes == 16)
    return copy_tile<16, kThreads>(tile, tile_leading, tile_rows, tile_cols, source, row, col, index);
  if (source.bytes == 8)
    return copy_tile<8, kThreads>(tile, tile_leading, tile_rows, tile_cols, source, row, col, index);
  if (source.bytes == 4)
    return copy_tile<4, kThreads>(tile, tile_leading, tile_rows, tile_cols, source, row, col, index);
  // By elements, neighbours in memory by neighbouring threads.
  const bool down = source.row_stride == 1;
  const int rows = count_left(row, source.rows + PLANTED(LoadRowTooFar), tile_rows);
  const int cols = count_left(col, source.cols + PLANTED(LoadColumnTooFar), tile_cols);
#pragma unroll 1
  for (int i = index; i < tile_rows * tile_cols; i += kThreads) {
    const int r = down ? i % tile_rows : i / tile_cols, c = down ? i / tile_rows : i % tile_cols;
    T value = from_float<T>(0.0f);
    if (r < rows && c < cols)
      value = load_global(source.data + (row + r) * source.row_stride + (col + c) * source.col_stride);
    store_shared(tile + r * tile_leading + c, value);
  }
}

template <int kBytes, int kThreads, class T>
FASTENC_DEVICE void write_tile(T* out, int64_t stride, int64_t rows, int64_t cols, const T* tile, int tile_leading,
                               int tile_rows, int tile_cols, int index) {
  constexpr int kEach = kBytes / static_cast<int>(sizeof(T));
  const int per_row = tile_cols / kEach;
  for (int i = index; i < tile_rows * per_row; i += kThreads) {
    const int r = i / per_row, c = i % per_row * kEach;
    if (r < rows + PLANTED(StoreRowTooFar) && c < cols + PLANTED(StoreColumnTooFar))
      store_global(reinterpret_cast<Word<kBytes>*>(out + r * stride + c),
                   load_shared(reinterpret_cast<const Word<kBytes>*>(tile + r * tile_leading + c)));
  }
}

// out[r][c] = tile[r][c] where r < rows and c < cols, by kThreads threads of which this is number `index`. tile_cols is
// a multiple of 16. out has rows of `stride` elements; it points to where the tile begins, at a column that is a
// multiple of 16.
template <int kThreads, class T>
FASTENC_DEVICE void store_tile(T* out, int64_t stride, int64_t rows, int64_t cols, const T* tile, int tile_leading,
                               int tile_rows, int tile_cols, int index) {
  const int bytes = access_bytes<T>(out, stride, 1);
  if (bytes == 16)
    return write_tile<16, kThreads>(out, stride, rows, cols, tile, tile_leading, tile_rows, tile_cols, index);
  if (bytes == 8)
    return write_tile<8, kThreads>(out, stride, rows, cols, tile, tile_leading, tile_rows, tile_cols, index);
  if (bytes == 4)
    return write_tile<4, kThreads>(out, stride, rows, cols, tile, tile_leading, tile_rows, tile_cols, index);
  write_tile<sizeof(T), kThreads>(out, stride, rows, cols, tile, tile_leading, tile_rows, tile_cols, index);
}

// Fragments of 16-bit numbers: of a [16, 16] piece of an operand from (first, k) on; first counts along the index that
// is not summed over.
template <Sum kSum, class T>
FASTENC_DEVICE void load_fragments(uint32_t (&r)[4], const T* tile, int tile_leading, int first, int k) {
  const int l = lane();
  if constexpr (kSum == Sum::kInner)
    load_matrices(r, tile + (first + l % 16) * tile_leading + k + l / 16 * 8);
  else
    load_matrices_transposed(r, tile + (k + l % 8 + l / 16 * 8) * tile_leading + first + l / 8 % 2 * 8);
}

template <Sum kSum>
FASTENC_DEVICE float element(const float* tile, int tile_leading, int i, int k) {
  return load_shared(kSum == Sum::kInner ? tile + i * tile_leading + k : tile + k * tile_leading + i);
}

// Two numbers along the index that is summed over.
template <Sum kSum>
FASTENC_DEVICE void load_two(float (&out)[2], const float* tile, int tile_leading, int i, int k) {
  struct alignas(8) Two {
    float values[2];
  };
  if constexpr (kSum == Sum::kInner) {
    const Two two = load_shared(reinterpret_cast<const Two*>(tile + i * tile_leading + k));
    out[0] = two.values[0];
    out[1] = two.values[1];
  } else {
    out[0] = load_shared(tile + k * tile_leading + i);
    out[1] = load_shared(tile + (k + 1) * tile_leading + i);
  }
}

// acc[16 kMT][8 kNT] += a @ b over `depth` (a multiple of 16) of the index that is summed over. a and b point to the
// warp's first row and column. Fragments from column `columns` on are left out.
template <Arithmetic kArithmetic, Sum kSumA, Sum kSumB, int kMT, int kNT>
FASTENC_DEVICE void multiply(float (&acc)[kMT][kNT][4], const Number<kArithmetic>* a, int leading_a,
                             const Number<kArithmetic>* b, int leading_b, int depth, int columns = 8 * kNT) {
  static_assert(kNT % 2 == 0);
  const int group = lane() / 4, quad = lane() % 4;
  if constexpr (sizeof(Number<kArithmetic>) == 2) {
    for (int k = 0; k < depth; k += 16) {
      uint32_t left[kMT][4];
#pragma unroll
      for (int i = 0; i < kMT; ++i) load_fragments<kSumA>(left[i], a, leading_a, 16 * i, k);
#pragma unroll
      for (int j = 0; j < kNT; j += 2) {
        if (8 * j >= columns) continue;
        uint32_t right[4];
        load_fragments<kSumB>(right, b, leading_b, 8 * j, k);
        const uint32_t right0[2] = {right[0], right[PLANTED(WrongFragment) ? 1 : 2]}, right1[2] = {right[1], right[3]};
#pragma unroll
        for (int i = 0; i < kMT; ++i) {
          multiply_add<Number<kArithmetic>>(acc[i][j], left[i], right0);
          multiply_add<Number<kArithmetic>>(acc[i][j + 1], left[i], right1);
        }
      }
    }
  } else if constexpr (kArithmetic == Arithmetic::kTf32) {
    for (int k = 0; k < depth; k += 8) {
      uint32_t left[kMT][4];
#pragma unroll
      for (int i = 0; i < kMT; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          left[i][e] = to_tf32(element<kSumA>(a, leading_a, 16 * i + group + e % 2 * 8, k + quad + e / 2 * 4));
#pragma unroll
      for (int j = 0; j < kNT; ++j) {
        if (8 * j >= columns) continue;
        const uint32_t right[2] = {to_tf32(element<kSumB>(b, leading_b, 8 * j + group, k + quad)),
                                   to_tf32(element<kSumB>(b, leading_b, 8 * j + group, k + quad + 4))};
#pragma unroll
        for (int i = 0; i < kMT; ++i) multiply_add_tf32(acc[i][j], left[i], right);
      }
    }
  } else {
    for (int k = 0; k < depth; k += 2) {
      float left[kMT][2][2];
#pragma unroll
      for (int i = 0; i < kMT; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) load_two<kSumA>(left[i][half], a, leading_a, 16 * i + group + 8 * half, k);
#pragma unroll
      for (int j = 0; j < kNT; ++j) {
        if (8 * j >= columns) continue;
        float right[2][2];
#pragma unroll
        for (int half = 0; half < 2; ++half) load_two<kSumB>(right[half], b, leading_b, 8 * j + 2 * quad + half, k);
#pragma unroll
        for (int step = 0; step < 2; ++step)
#pragma unroll
          for (int i = 0; i < kMT; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) acc[i][j][e] = fmaf(left[i][e / 2][step], right[e % 2][step], acc[i][j][e]);
      }
    }
  }
}

// function(row, col, value) for each number of a warp's part of a result that this lane has; value can be changed.
template <int kMT, int kNT, class Function>
FASTENC_DEVICE void for_each(float (&acc)[kMT][kNT][4], Function&& function) {
  const int group = lane() / 4, quad = lane() % 4;
#pragma unroll
  for (int i = 0; i < kMT; ++i)
#pragma unroll
    for (int j = 0; j < kNT; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) function(16 * i + group + e / 2 * 8, 8 * j + 2 * quad + e % 2, acc[i][j][e]);
}

// Rounds a warp's part of a result into a tile, from (row, col) on; columns from `columns` on are left out.
template <class T, int kMT, int kNT>
FASTENC_DEVICE void put(T* tile, int tile_leading, const float (&acc)[kMT][kNT][4], int columns = 8 * kNT) {
  struct alignas(2 * sizeof(T)) Pair {
    T first, second;
  };
  const int group = lane() / 4, quad = lane() % 4;
#pragma unroll
  for (int i = 0; i < kMT; ++i)
#pragma unroll
    for (int j = 0; j < kNT; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (8 * j < columns)
          store_shared(reinterpret_cast<Pair*>(tile + (16 * i + group + 8 * half) * tile_leading + 8 * j + 2 * quad),
                       Pair{from_float<T>(acc[i][j][2 * half]), from_float<T>(acc[i][j][2 * half + 1])});
}

// For each step: load(step, stage) begins what use(step, stage) works on kStages - 1 steps later. Called by whole
// blocks; all copies have landed and all threads are through when it returns.
template <int kStages, class Load, class Use>
FASTENC_DEVICE void pipeline(int64_t steps, Load&& load, Use&& use) {
#pragma unroll 1
  for (int64_t next = 0; next < steps + kStages - 1; ++next) {
    const int64_t step = next - (kStages - 1);
    if (step >= 0) {
      // This step's copies have landed, and everyone is through with the stage that is loaded next.
      if (PLANTED(EarlyWait)) wait_copies<kStages - 1>();
      if (!PLANTED(MissingWait) && !PLANTED(EarlyWait)) wait_copies<kStages - 2>();
      if (!PLANTED(NoBarrierBeforeUse)) sync_block();
    }
    if (next < steps) load(next, static_cast<int>(next % kStages));
    commit_copies();
    if (step >= 0) use(step, static_cast<int>(step % kStages));
  }
  wait_copies<0>();
  if (!PLANTED(NoBarrierBeforeOverwrite)) sync_block();
}

}  // namespace fastenc::cuda
