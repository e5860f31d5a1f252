// Products of tiles: libtorch's brgemm or a portable one, a kernel of dot products for a few rows, and the packing of
// operands. Included by stack_impl.h only.

namespace fastenc {
namespace FASTENC_ISA {

// Rows of a product's tile, two vectors wide, whose sums stay in registers. AVX-512 has 32 of them, others 16.
#if defined(FASTENC_AVX512)
constexpr int kTileRows = 8;
#elif defined(FASTENC_AVX2)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 4;
#endif

// C[kRows, n] (+)= A[kRows, K] @ B[K, n], n = (kVecs - 1) kLanes + last columns; `last` is kLanes unless kPart.
template <int kRows, int kVecs, bool kPart>
inline void portable_tile(int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add_C, int64_t last, const float* A,
                          const float* B, float* C) {
  const auto whole = [](int v) { return !kPart || v + 1 < kVecs; };
  Vec acc[kRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) acc[r][v] = Vec{};
  for (int64_t k = 0; k < K; ++k) {
    __builtin_prefetch(B + k * ldb + kVecs * kLanes);  // the next strip
    Vec b[kVecs];
    for (int v = 0; v < kVecs; ++v)
      b[v] = whole(v) ? load(B + k * ldb + v * kLanes) : load_part(B + k * ldb + v * kLanes, last);
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVecs; ++v) acc[r][v] += A[r * lda + k] * b[v];
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) {
      float* c = C + r * ldc + v * kLanes;
      if (whole(v))
        store(add_C ? load(c) + acc[r][v] : acc[r][v], c);
      else
        store_part(add_C ? load_part(c, last) + acc[r][v] : acc[r][v], c, last);
    }
}

// The same for any number of rows up to kRows.
template <int kRows, int kVecs, bool kPart>
inline void portable_rows(int64_t rows, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add_C, int64_t last,
                          const float* A, const float* B, float* C) {
  if (rows == kRows) return portable_tile<kRows, kVecs, kPart>(K, lda, ldb, ldc, add_C, last, A, B, C);
  if constexpr (kRows > 1) portable_rows<kRows - 1, kVecs, kPart>(rows, K, lda, ldb, ldc, add_C, last, A, B, C);
}

// For any M. Tiles are of about equal heights: a last one of few rows would leave the multipliers idle.
template <int kVecs, bool kPart>
inline void portable_strip(int64_t M, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add_C, int64_t last,
                           const float* A, const float* B, float* C) {
  int64_t tiles = ceil_div(M, kTileRows);
  for (int64_t m = 0; m < M; --tiles) {
    const int64_t rows = ceil_div(M - m, tiles);
    portable_rows<kTileRows, kVecs, kPart>(rows, K, lda, ldb, ldc, add_C, last, A + m * lda, B, C + m * ldc);
    m += rows;
  }
}

// C[M, N] (+)= A[M, K] @ B[K, N], row-major, in strips of B that stay in the L1 cache. An element's sum does not depend
// on M or N.
inline void portable_gemm(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add_C,
                          const float* A, const float* B, float* C) {
  constexpr int64_t kWidth = 2 * kLanes;
  int64_t n = 0;
  for (; n + kWidth <= N; n += kWidth) portable_strip<2, false>(M, K, lda, ldb, ldc, add_C, kLanes, A, B + n, C + n);
  if (n + kLanes < N)
    portable_strip<2, true>(M, K, lda, ldb, ldc, add_C, N - n - kLanes, A, B + n, C + n);
  else if (n + kLanes == N)
    portable_strip<1, false>(M, K, lda, ldb, ldc, add_C, kLanes, A, B + n, C + n);
  else if (n < N)
    portable_strip<1, true>(M, K, lda, ldb, ldc, add_C, N - n, A, B + n, C + n);
}

// Long sums are cut, as BLAS libraries do: the error of a sum grows with the number of terms added one after the other.
constexpr int64_t kLongestSum = 160;

inline void gemm(const Runtime& runtime, int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc,
                 bool add_C, const float* A, const float* B, float* C) {
  const int64_t pieces = std::max<int64_t>(1, ceil_div(K, kLongestSum)), piece = ceil_div(K, pieces);
  for (int64_t k = 0; k < K; k += piece) {
    const int64_t depth = std::min(piece, K - k);
    const bool add = add_C || k > 0;
    if (runtime.brgemm_float != nullptr)
      runtime.brgemm_float(M, N, depth, lda, ldb, ldc, add, A + k, B + k * ldb, C, /* is_vnni */ false);
    else
      portable_gemm(M, N, depth, lda, ldb, ldc, add, A + k, B + k * ldb, C);
  }
}

// K is even, N in whole vectors, and B in VNNI order: pairs of rows as 32-bit words, ldb words apart. Without a brgemm
// for it both operands are widened, a strip of B at a time, and multiplied as fp32: the products of bf16 are exact
// there.
inline void gemm(const Runtime& runtime, int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc,
                 bool add_C, const BFloat16* A, const BFloat16* B, float* C) {
  if (runtime.brgemm_bfloat16 != nullptr)
    return runtime.brgemm_bfloat16(M, N, K, lda, ldb, ldc, add_C, reinterpret_cast<const uint16_t*>(A),
                                   reinterpret_cast<const uint16_t*>(B), C, /* is_vnni */ true);
  constexpr int64_t kRows = 32, kWidth = 2 * kLanes;
  float a[kRows * kLongestSum], b[kLongestSum * kWidth];
  const int64_t pieces = std::max<int64_t>(1, ceil_div(K, kLongestSum)), piece = round_up(ceil_div(K, pieces), 2);
  for (int64_t m = 0; m < M; m += kRows)
    for (int64_t k = 0; k < K; k += piece) {
      const int64_t rows = std::min(kRows, M - m), depth = std::min(piece, K - k);
      const bool add = add_C || k > 0;
      for (int64_t r = 0; r < rows; ++r) convert_row(A + (m + r) * lda + k, a + r * kLongestSum, depth);
      for (int64_t n = 0; n < N; n += kWidth) {
        const int64_t width = std::min(kWidth, N - n);
        for (int64_t i = 0; i < depth; i += 2)
          for (int64_t j = 0; j < width; j += kLanes) {
            IntVec words;
            std::memcpy(&words, B + (k + i) * ldb + 2 * (n + j), sizeof words);
            store(math::bit_cast<Vec>(words << 16), b + i * kWidth + j);
            store(math::bit_cast<Vec>(words & -0x10000), b + (i + 1) * kWidth + j);
          }
        const auto strip = width == kWidth ? portable_strip<2, false> : portable_strip<1, false>;
        strip(rows, depth, kLongestSum, kWidth, ldc, add, kLanes, a, b, C + m * ldc + n);
      }
    }
}

// The depth of a product as its operands are packed: even for bf16, whose B holds pairs.
template <class Op>
FASTENC_INLINE int64_t packed_depth(int64_t K) {
  return std::is_same_v<Op, BFloat16> ? round_up(K, 2) : K;
}

// C[r, n] = dot(A[r, :], B[n, :]) for kRows x kCols of them.
template <int kRows, int kCols, class TA, class TB>
inline void dot_tile(int64_t K, const TA* A, int64_t lda, const TB* B, int64_t ldb, float* C, int64_t ldc) {
  Vec acc[kRows][kCols] = {};
  int64_t k = 0;
  for (; k + kLanes <= K; k += kLanes) {
    Vec a[kRows];
    for (int r = 0; r < kRows; ++r) a[r] = load(A + r * lda + k);
    for (int n = 0; n < kCols; ++n) {
      const Vec b = load(B + n * ldb + k);
      for (int r = 0; r < kRows; ++r) acc[r][n] += a[r] * b;
    }
  }
  if (k < K)
    for (int n = 0; n < kCols; ++n) {
      const Vec b = load_part(B + n * ldb + k, K - k);
      for (int r = 0; r < kRows; ++r) acc[r][n] += load_part(A + r * lda + k, K - k) * b;
    }
  for (int r = 0; r < kRows; ++r)
    for (int n = 0; n < kCols; ++n) C[r * ldc + n] = sum(acc[r][n]);
}

template <int kRows, class TA, class TB>
inline void dot_rows(int64_t N, int64_t K, const TA* A, int64_t lda, const TB* B, int64_t ldb, float* C, int64_t ldc) {
  constexpr int kCols = kRows == 1 ? 8 : kRows == 2 || kTileRows == 8 ? 4 : 2;  // so that registers hold the sums
  int64_t n = 0;
  for (; n + kCols <= N; n += kCols) dot_tile<kRows, kCols>(K, A, lda, B + n * ldb, ldb, C + n, ldc);
  for (; n < N; ++n) dot_tile<kRows, 1>(K, A, lda, B + n * ldb, ldb, C + n, ldc);
}

// C[M, N] = A[M, K] @ B[N, K]^T: both read along their rows, nothing packed. For few rows or few columns.
template <class TA, class TB>
inline void gemm_nt(int64_t M, int64_t N, int64_t K, const TA* A, int64_t lda, const TB* B, int64_t ldb, float* C,
                    int64_t ldc) {
  int64_t m = 0;
  for (; m + 4 <= M; m += 4) dot_rows<4>(N, K, A + m * lda, lda, B, ldb, C + m * ldc, ldc);
  for (; m + 2 <= M; m += 2) dot_rows<2>(N, K, A + m * lda, lda, B, ldb, C + m * ldc, ldc);
  for (; m < M; ++m) dot_rows<1>(N, K, A + m * lda, lda, B, ldb, C + m * ldc, ldc);
}

// C[M, N] += A[M, K] @ B[K, N] for few rows: B is read once, along its rows.
template <class TA, class TB>
inline void add_few_rows(int64_t M, int64_t N, int64_t K, const TA* A, int64_t lda, const TB* B, int64_t ldb, float* C,
                         int64_t ldc) {
  for (int64_t k = 0; k < K; k += 4) {
    const int64_t count = std::min<int64_t>(4, K - k);
    for (int64_t r = 0; r < M; ++r) {
      float a[4] = {};
      for (int64_t i = 0; i < count; ++i) a[i] = to_float(A[r * lda + k + i]);
      float* c = C + r * ldc;
      int64_t j = 0;
      for (; count == 4 && j + kLanes <= N; j += kLanes) {
        const TB* b = B + k * ldb + j;
        const Vec sum01 = a[0] * load(b) + a[1] * load(b + ldb);
        const Vec sum23 = a[2] * load(b + 2 * ldb) + a[3] * load(b + 3 * ldb);
        store(load(c + j) + (sum01 + sum23), c + j);
      }
      for (; j < N; ++j)
        for (int64_t i = 0; i < count; ++i) c[j] += a[i] * to_float(B[(k + i) * ldb + j]);
    }
  }
}

// out[M, N] = A_t[M, K] @ B[K, N] for small K, a sum of K outer products: out is written once, along its rows.
template <class TA, class T>
inline void outer_products(int64_t K, int64_t M, int64_t N, const TA* A_t, int64_t lda, const float* B, int64_t ldb,
                           T* out) {
  for (int64_t m = 0; m < M; ++m)
    for (int64_t j = 0; j < N; j += kLanes) {
      Vec total = to_float(A_t[m * lda]) * load(B + j);
      for (int64_t k = 1; k < K; ++k) total += to_float(A_t[m * lda + k]) * load(B + k * ldb + j);
      store_part(total, out + m * N + j, std::min(kLanes, N - j));
    }
}

// The transpose of W[N, K], rows [0, N <= kPanel), as operand B: [K, ld] (VNNI for bf16), zero behind N.
template <class T, class Op>
inline void pack_transposed(const T* W, int64_t N, int64_t K, Op* dst, int64_t ld) {
  if constexpr (std::is_same_v<Op, BFloat16>) {
    static_assert(std::is_same_v<T, BFloat16>);
    // A pair of bf16 is a 32-bit word, so VNNI order is a transpose of words.
    float* words = reinterpret_cast<float*>(dst);
    if (K % 2 == 0) {
      transpose(reinterpret_cast<const float*>(W), K / 2, N, K / 2, words, ld);
      return;
    }
    BFloat16 rows[kPanel * kPanel];
    for (int64_t k = 0; k < K; k += kPanel) {
      const int64_t count = std::min(kPanel, K - k);
      for (int64_t n = 0; n < N; ++n) {
        convert_row(W + n * K + k, rows + n * kPanel, count);
        if (count % 2) rows[n * kPanel + count].bits = 0;
      }
      transpose(reinterpret_cast<const float*>(rows), kPanel / 2, N, ceil_div(count, 2), words + k / 2 * ld, ld);
    }
  } else if constexpr (std::is_same_v<T, float>) {
    transpose(W, K, N, K, dst, ld);
  } else {
    float rows[kPanel * kPanel];
    for (int64_t k = 0; k < K; k += kPanel) {
      const int64_t count = std::min(kPanel, K - k);
      for (int64_t n = 0; n < N; ++n) convert_row(W + n * K + k, rows + n * kPanel, count);
      transpose(rows, kPanel, N, count, dst + k * ld, ld);
    }
  }
}

// Elements [col, col + count) of a row, contiguous: in place if they are, else gathered into buffer.
template <class T>
inline const T* contiguous_row(const Matrix& matrix, int64_t row, int64_t col, int64_t count, T* buffer) {
  const T* src = static_cast<const T*>(matrix.data) + row * matrix.row_stride + col * matrix.col_stride;
  if (matrix.col_stride == 1) return src;
  for (int64_t i = 0; i < count; ++i) buffer[i] = src[i * matrix.col_stride];
  return buffer;
}

// Contiguous rows of bf16, whole vectors of them, as operand B in VNNI order: two by two, zero beside a last odd one.
inline void pair_rows(const BFloat16* src, int64_t ld_src, int64_t rows, int64_t cols, uint32_t* words,
                      int64_t ld_words) {
  for (int64_t r = 0; r < rows; r += 2)
    for (int64_t j = 0; j < cols; j += kLanes) {
      const IntVec even = load_bits(src + r * ld_src + j);
      const IntVec odd = r + 1 < rows ? load_bits(src + (r + 1) * ld_src + j) : IntVec{};
      const IntVec pairs = even | (odd << 16);
      std::memcpy(words + r / 2 * ld_words + j, &pairs, sizeof pairs);
    }
}

// The rows x cols (<= kPanel) part of a matrix at (row, col) as operand B: [rows, ld] (VNNI for bf16), zero behind
// cols.
template <class T, class Op>
inline void pack_block(const Matrix& matrix, int64_t row, int64_t rows, int64_t col, int64_t cols, Op* dst,
                       int64_t ld) {
  T gathered[2][kPanel];
  if constexpr (std::is_same_v<Op, BFloat16>) {
    uint32_t* words = reinterpret_cast<uint32_t*>(dst);
    const BFloat16 zeros[kPanel] = {};
    for (int64_t r = 0; r < rows; r += 2) {
      const BFloat16* even = contiguous_row(matrix, row + r, col, cols, gathered[0]);
      const BFloat16* odd = r + 1 < rows ? contiguous_row(matrix, row + r + 1, col, cols, gathered[1]) : zeros;
      int64_t j = 0;
      for (; j + kLanes <= cols; j += kLanes) {
        const IntVec pairs = load_bits(even + j) | (load_bits(odd + j) << 16);
        std::memcpy(words + r / 2 * ld + j, &pairs, sizeof pairs);
      }
      for (; j < ld; ++j)
        words[r / 2 * ld + j] = j < cols ? even[j].bits | static_cast<uint32_t>(odd[j].bits) << 16 : 0u;
    }
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      convert_row(contiguous_row(matrix, row + r, col, cols, gathered[0]), dst + r * ld, cols);
      for (int64_t j = cols; j < ld; ++j) dst[r * ld + j] = 0.0f;
    }
  }
}

}  // namespace FASTENC_ISA
}  // namespace fastenc
