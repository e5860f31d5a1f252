// Vectors of kLanes floats: loads, stores and conversions of fp32, bf16 and fp16, transposes. Included by stack_impl.h
// only.

namespace fastenc {
namespace FASTENC_ISA {

using Vec = math::Lanes<kLanes>::Floats;
using IntVec = math::Integers<Vec>;

FASTENC_INLINE float to_float(float value) { return value; }
FASTENC_INLINE float to_float(BFloat16 value) { return math::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }
FASTENC_INLINE float to_float(Half value) {
  // Exponent and mantissa shifted into place, then rescaled by 2^112: denormals come out right by themselves.
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  const uint32_t scaled =
      math::bit_cast<uint32_t>(math::bit_cast<float>(magnitude) * math::bit_cast<float>(uint32_t{0x77800000u}));
  const uint32_t special = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : scaled;  // Inf and NaN
  return math::bit_cast<float>(special | sign);
}

// Round to nearest, ties to even; NaN stays NaN.
FASTENC_INLINE void from_float(float value, float* out) { *out = value; }
FASTENC_INLINE void from_float(float value, BFloat16* out) {
  const uint32_t bits = math::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}
FASTENC_INLINE void from_float(float value, Half* out) {
  const uint32_t bits = math::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal: rebias the exponent and round off 13 bits. Denormal: let an addition do the rounding.
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t denormal = math::bit_cast<uint32_t>(math::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? denormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // rounds to Inf
  half = magnitude > 0x7f800000u ? 0x7e00u : half;   // NaN
  out->bits = static_cast<uint16_t>(half | sign);
}

FASTENC_INLINE Vec load(const float* src) {
  Vec value;
  std::memcpy(&value, src, sizeof value);
  return value;
}

template <class T>
FASTENC_INLINE Vec load(const T* src) {
  float lanes[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) lanes[i] = to_float(src[i]);
  return load(lanes);
}

FASTENC_INLINE void store(Vec value, float* dst) { std::memcpy(dst, &value, sizeof value); }

template <class T>
FASTENC_INLINE void store(Vec value, T* dst) {
  float lanes[kLanes];
  store(value, lanes);
  for (int64_t i = 0; i < kLanes; ++i) from_float(lanes[i], dst + i);
}

// bf16 as integers: compilers make good vector code of these on every machine.
FASTENC_INLINE IntVec load_bits(const BFloat16* src) {
  using Bits = uint16_t __attribute__((vector_size(2 * kLanes)));
  Bits bits;
  std::memcpy(&bits, src, sizeof bits);
  return __builtin_convertvector(bits, IntVec);
}

// Rounded to bf16, in the low half of each lane.
FASTENC_INLINE IntVec round_to_bfloat16(Vec value) {
  const IntVec bits = math::bit_cast<IntVec>(value);
  const IntVec rounded = ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) & 0xffff;
  return value != value ? IntVec{} + 0x7fc0 : rounded;
}

FASTENC_INLINE Vec load(const BFloat16* src) { return math::bit_cast<Vec>(load_bits(src) << 16); }

FASTENC_INLINE void store_bits(IntVec lanes, BFloat16* dst) {
  using Bits = uint16_t __attribute__((vector_size(2 * kLanes)));
  const Bits bits = __builtin_convertvector(lanes, Bits);
  std::memcpy(dst, &bits, sizeof bits);
}

FASTENC_INLINE void store(Vec value, BFloat16* dst) { store_bits(round_to_bfloat16(value), dst); }

#if defined(FASTENC_AVX512)
FASTENC_INLINE Vec load(const Half* src) {
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(src)));
}
FASTENC_INLINE void store(Vec value, Half* dst) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(FASTENC_AVX2)
FASTENC_INLINE Vec load(const Half* src) {
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src)));
}
FASTENC_INLINE void store(Vec value, Half* dst) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(dst), _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
}
#endif

// 0, 1, 2, ...
FASTENC_INLINE IntVec lane_numbers() {
  constexpr int32_t kNumbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  IntVec numbers;
  std::memcpy(&numbers, kNumbers, sizeof numbers);
  return numbers;
}

// All bits set in the first `count` lanes, none behind them.
FASTENC_INLINE IntVec first_lanes(int64_t count) { return lane_numbers() < static_cast<int32_t>(count); }

// Fewer than kLanes elements, zero behind them.
template <class T>
FASTENC_INLINE Vec load_part(const T* src, int64_t count) {
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = to_float(src[i]);
  return load(lanes);
}

// The first `count` lanes, up to all.
template <class T>
FASTENC_INLINE void store_part(Vec value, T* dst, int64_t count) {
  if (count == kLanes) return store(value, dst);
  float lanes[kLanes];
  store(value, lanes);
  for (int64_t i = 0; i < count; ++i) from_float(lanes[i], dst + i);
}

#if defined(FASTENC_AVX512)
FASTENC_INLINE Vec load_part(const float* src, int64_t count) {
  return (Vec)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), src);
}
FASTENC_INLINE void store_part(Vec value, float* dst, int64_t count) {
  _mm512_mask_storeu_ps(dst, static_cast<__mmask16>((1u << count) - 1), (__m512)value);
}
#elif defined(FASTENC_AVX2)
FASTENC_INLINE Vec load_part(const float* src, int64_t count) {
  return (Vec)_mm256_maskload_ps(src, (__m256i)first_lanes(count));
}
FASTENC_INLINE void store_part(Vec value, float* dst, int64_t count) {
  _mm256_maskstore_ps(dst, (__m256i)first_lanes(count), (__m256)value);
}
#endif

// The first `count` lanes, zero behind them.
FASTENC_INLINE Vec zero_behind(Vec value, int64_t count) {
  return math::bit_cast<Vec>(math::bit_cast<IntVec>(value) & first_lanes(count));
}

// The lanes' sum, halves added to each other.
template <int kCount = kLanes>
FASTENC_INLINE float sum(typename math::Lanes<kCount>::Floats value) {
  if constexpr (kCount == 4) {
    return (value[0] + value[2]) + (value[1] + value[3]);
  } else {
    typename math::Lanes<kCount / 2>::Floats halves[2];
    std::memcpy(halves, &value, sizeof value);
    return sum<kCount / 2>(halves[0] + halves[1]);
  }
}

template <class From, class To>
inline void convert_row(const From* src, To* dst, int64_t count) {
  if constexpr (std::is_same_v<From, To> && !std::is_same_v<From, float>) {
    std::memcpy(dst, src, static_cast<size_t>(count) * sizeof(To));
  } else {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(load(src + i), dst + i);
    if (i < count) store_part(load_part(src + i, count - i), dst + i, count - i);
  }
}

// A block of kLanes x kLanes.
FASTENC_INLINE void transpose_block(const float* src, int64_t ld_src, float* dst, int64_t ld_dst) {
#if defined(FASTENC_AVX512)
  __m512 a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(src + i * ld_src);
  for (int i = 0; i < 8; ++i) {
    b[2 * i] = _mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512d p = _mm512_castps_pd(b[4 * i]), q = _mm512_castps_pd(b[4 * i + 1]);
    const __m512d r = _mm512_castps_pd(b[4 * i + 2]), s = _mm512_castps_pd(b[4 * i + 3]);
    a[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(p, r));
    a[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(p, r));
    a[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(q, s));
    a[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(q, s));
  }
  // a[4 g + j] holds, in its quarter k, column 4 k + j of the rows 4 g to 4 g + 3.
  for (int j = 0; j < 4; ++j) {
    const __m512 low0 = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x88), high0 = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xdd);
    const __m512 low1 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x88);
    const __m512 high1 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xdd);
    _mm512_storeu_ps(dst + j * ld_dst, _mm512_shuffle_f32x4(low0, low1, 0x88));
    _mm512_storeu_ps(dst + (4 + j) * ld_dst, _mm512_shuffle_f32x4(high0, high1, 0x88));
    _mm512_storeu_ps(dst + (8 + j) * ld_dst, _mm512_shuffle_f32x4(low0, low1, 0xdd));
    _mm512_storeu_ps(dst + (12 + j) * ld_dst, _mm512_shuffle_f32x4(high0, high1, 0xdd));
  }
#elif defined(FASTENC_AVX2)
  __m256 a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(src + i * ld_src);
  for (int i = 0; i < 4; ++i) {
    b[2 * i] = _mm256_unpacklo_ps(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm256_unpackhi_ps(a[2 * i], a[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    a[4 * i] = _mm256_shuffle_ps(b[4 * i], b[4 * i + 2], 0x44);
    a[4 * i + 1] = _mm256_shuffle_ps(b[4 * i], b[4 * i + 2], 0xee);
    a[4 * i + 2] = _mm256_shuffle_ps(b[4 * i + 1], b[4 * i + 3], 0x44);
    a[4 * i + 3] = _mm256_shuffle_ps(b[4 * i + 1], b[4 * i + 3], 0xee);
  }
  // a[4 g + j] holds, in its half k, column 4 k + j of the rows 4 g to 4 g + 3.
  for (int j = 0; j < 4; ++j) {
    _mm256_storeu_ps(dst + j * ld_dst, _mm256_permute2f128_ps(a[j], a[4 + j], 0x20));
    _mm256_storeu_ps(dst + (4 + j) * ld_dst, _mm256_permute2f128_ps(a[j], a[4 + j], 0x31));
  }
#else
  for (int64_t c = 0; c < kLanes; ++c)
    for (int64_t r = 0; r < kLanes; ++r) std::memcpy(dst + c * ld_dst + r, src + r * ld_src + c, sizeof(float));
#endif
}

// dst[c, r] = src[r, c] for 32-bit words. Writes r up to the next multiple of kLanes, zero behind `rows`.
inline void transpose(const float* src, int64_t ld_src, int64_t rows, int64_t cols, float* dst, int64_t ld_dst) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    const int64_t block_rows = std::min(kLanes, rows - r);
    for (int64_t c = 0; c < cols; c += kLanes) {
      const int64_t block_cols = std::min(kLanes, cols - c);
      const float* block = src + r * ld_src + c;
      if (block_rows == kLanes && block_cols == kLanes) {
        transpose_block(block, ld_src, dst + c * ld_dst + r, ld_dst);
        continue;
      }
      float in[kLanes * kLanes] = {}, out[kLanes * kLanes];
      for (int64_t i = 0; i < block_rows; ++i)
        std::memcpy(in + i * kLanes, block + i * ld_src, static_cast<size_t>(block_cols) * sizeof(float));
      transpose_block(in, kLanes, out, kLanes);
      for (int64_t i = 0; i < block_cols; ++i)
        std::memcpy(dst + (c + i) * ld_dst + r, out + i * kLanes, kLanes * sizeof(float));
    }
  }
}

}  // namespace FASTENC_ISA
}  // namespace fastenc
