// Numbers of a row that one thread works on, in fp32: kEach neighbours, which it reads and writes at once where memory
// allows that, or else numbers that are `apart` from each other, so that neighbouring threads have neighbouring
// numbers.
#pragma once

#include <cstring>

#include "tile.cuh"

namespace fastenc::cuda {

template <class T, int kEach>
struct alignas(kEach * sizeof(T)) Pack {
  T numbers[kEach];
};
// As memory has it.
template <class T, int kEach>
using PackWord = Word<kEach* static_cast<int>(sizeof(T))>;

// Whether rows of this address and stride allow that.
template <int kEach, class T>
FASTENC_DEVICE bool allows_packs(const void* data, int64_t stride) {
  return access_bytes<T>(data, stride, 1) >= static_cast<int>(sizeof(Pack<T, kEach>));
}

// The numbers from `from` on, of sums in shared memory.
template <int kEach>
FASTENC_DEVICE void load_sums(float (&out)[kEach], const float* from, int apart, bool packed) {
  if (packed) {
    const auto pack = load_shared(reinterpret_cast<const Pack<float, kEach>*>(from));
#pragma unroll
    for (int e = 0; e < kEach; ++e) out[e] = pack.numbers[e];
  } else {
#pragma unroll
    for (int e = 0; e < kEach; ++e) out[e] = load_shared(from + e * apart);
  }
}

// The first `count` of the numbers from `from` on, and 0 for the others; `packed`: at once, count is 0 or kEach.
template <int kEach, class T>
FASTENC_DEVICE void load_numbers(float (&out)[kEach], const T* from, int64_t apart, int count, bool packed) {
  if (packed) {
    PackWord<T, kEach> word = {};
    if (count > 0) word = load_global(reinterpret_cast<const PackWord<T, kEach>*>(from));
    Pack<T, kEach> pack;
    std::memcpy(&pack, &word, sizeof word);
#pragma unroll
    for (int e = 0; e < kEach; ++e) out[e] = to_float(pack.numbers[e]);
  } else {
#pragma unroll
    for (int e = 0; e < kEach; ++e, from += apart) out[e] = e < count ? to_float(load_global(from)) : 0.0f;
  }
}

// The reverse, rounded.
template <int kEach, class T>
FASTENC_DEVICE void store_numbers(T* to, const float (&values)[kEach], int64_t apart, int count, bool packed) {
  if (packed) {
    Pack<T, kEach> pack;
#pragma unroll
    for (int e = 0; e < kEach; ++e) pack.numbers[e] = from_float<T>(values[e]);
    PackWord<T, kEach> word;
    std::memcpy(&word, &pack, sizeof word);
    if (count > 0) store_global(reinterpret_cast<PackWord<T, kEach>*>(to), word);
  } else {
#pragma unroll
    for (int e = 0; e < kEach; ++e, to += apart)
      if (e < count) store_global(to, from_float<T>(values[e]));
  }
}

// How many of the numbers from a column on, `apart` from each other, lie before column `cols`.
template <int kEach>
FASTENC_DEVICE int count_inside(int64_t col, int64_t cols, int apart) {
  const int64_t left = cols + PLANTED(PackColumnTooFar) - col;
  return left <= 0 ? 0 : left > int64_t{kEach - 1} * apart ? kEach : static_cast<int>(divide_up(left, apart));
}

}  // namespace fastenc::cuda
