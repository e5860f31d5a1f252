// csrc/cuda/gpu.cuh for the emulator. The lane layouts are those of the PTX manual, "Matrix multiply-accumulate
// operation using mma instruction".
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <typeinfo>

#include "../cuda/launch.h"
#include "simt.h"

#define FASTENC_KERNEL(...) void
#define FASTENC_DEVICE inline

namespace fastenc::cuda {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
// Without _Float16, which is slow where the CPU does not know it. 2^112 makes up for the bias of the exponent.
inline float to_float(Half x) {
  const uint32_t bits = uint32_t{x.bits} & 0x7fff;
  uint32_t shifted = bits << 13;
  float value;
  std::memcpy(&value, &shifted, 4);
  value *= 0x1p112f;
  std::memcpy(&shifted, &value, 4);
  shifted |= (bits >= 0x7c00 ? 0x7f800000u : 0u) | (uint32_t{x.bits} & 0x8000) << 16;
  std::memcpy(&value, &shifted, 4);
  return value;
}
inline float to_float(BFloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
template <class T>
inline T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, Half>) {
    const _Float16 value = static_cast<_Float16>(x);
    Half half;
    std::memcpy(&half, &value, 2);
    return half;
  } else {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return x != x ? BFloat16{0x7fff} : BFloat16{static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  }
}

template <int kBytes>
struct alignas(kBytes) Word {
  unsigned char bytes[kBytes];
};

inline int thread() { return static_cast<int>(simt::thread_number()); }
inline int lane() { return static_cast<int>(simt::lane()); }
inline int warp() { return static_cast<int>(simt::thread_number() / 32); }
inline int64_t block() { return simt::block_index().x; }
inline unsigned char* shared_memory() { return static_cast<unsigned char*>(simt::shared_memory()); }

inline void sync_block() { simt::block_barrier(); }
inline void sync_warp() { simt::warp_barrier(); }
template <class T>
inline T shuffle_xor(T value, int mask) {
  const simt::Given given = simt::exchange(&value, sizeof value, "shfl.xor");
  const simt::Quiet quiet;
  std::memcpy(&value, given[lane() ^ mask], sizeof value);
  return value;
}

// A GPU faults at an address that is no multiple of the access; it has no accesses of other sizes.
template <class T>
inline void check_access(const T* address) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T)) throw simt::Fault("an access at a misaligned address");
}

// The source's place names an access in counts.
template <class T>
inline T load_global(const T* from, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  check_access(from);
  simt::note(simt::Space::kGlobalLoad, from, sizeof(T), file, line);
  return *from;
}
template <class T>
inline void store_global(T* to, T value, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  check_access(to);
  simt::note(simt::Space::kGlobalStore, to, sizeof(T), file, line);
  *to = value;
}
template <class T>
inline T load_shared(const T* from, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  check_access(from);
  simt::note(simt::Space::kSharedLoad, from, sizeof(T), file, line);
  return *from;
}
template <class T>
inline void store_shared(T* to, T value, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  check_access(to);
  simt::note(simt::Space::kSharedStore, to, sizeof(T), file, line);
  *to = value;
}

template <int kBytes>
inline void copy_async(void* shared, const void* global, int source_bytes, const char* file = __builtin_FILE(),
                       int line = __builtin_LINE()) {
  if (source_bytes > 0) simt::note(simt::Space::kGlobalLoad, global, source_bytes, file, line);
  simt::note(simt::Space::kSharedStore, shared, kBytes, file, line);
  simt::copy_async(shared, global, kBytes, source_bytes);
}
inline void commit_copies() { simt::commit_copies(); }
template <int kLeft>
inline void wait_copies() {
  simt::wait_copies(kLeft);
}

namespace emulated {

inline void load_matrices(uint32_t (&r)[4], const void* row, bool transposed, const char* file, int line) {
  unsigned char own[16];
  if (reinterpret_cast<uintptr_t>(row) % 16) throw simt::Fault("ldmatrix at an address that is no multiple of 16");
  simt::note(simt::Space::kSharedLoad, row, 16, file, line);
  std::memcpy(own, row, 16);
  const simt::Given rows = simt::exchange(own, 16, transposed ? "ldmatrix.trans" : "ldmatrix");
  const simt::Quiet quiet;
  const int group = lane() / 4, pair = lane() % 4 * 2;
  for (int matrix = 0; matrix < 4; ++matrix)
    for (int half = 0; half < 2; ++half) {
      const int i = transposed ? pair + half : group, j = transposed ? group : pair + half;
      std::memcpy(reinterpret_cast<unsigned char*>(&r[matrix]) + 2 * half, rows[matrix * 8 + i] + 2 * j, 2);
    }
}

// d += a @ b for fragments a [16, kDepth] and b [kDepth, 8]; number(word, half) reads one of the numbers in a word.
template <int kDepth, int kPerWord, class Number>
inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char* site,
                         Number number) {
  uint32_t own[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const simt::Given given = simt::exchange(own, sizeof own, site);
  const simt::Quiet quiet;
  const auto word = [&](int of_lane, int index) {
    uint32_t value;
    std::memcpy(&value, given[of_lane] + 4 * index, 4);
    return value;
  };
  constexpr int kHalf = kDepth / 2;  // the depth of one 8 x 8 matrix of 16-bit, or 8 x 4 of 32-bit numbers
  const int group = lane() / 4, pair = lane() % 4 * 2;
  for (int e = 0; e < 4; ++e) {
    const int row = group + e / 2 * 8, column = pair + e % 2;
    float sum = d[e];
    for (int k = 0; k < kDepth; ++k) {
      const int in_quad = k % kHalf / kPerWord;
      const float left = number(word(row % 8 * 4 + in_quad, (k >= kHalf) * 2 + (row >= 8)), k % kPerWord);
      const float right = number(word(column * 4 + in_quad, 4 + (k >= kHalf)), k % kPerWord);
      sum += left * right;
    }
    d[e] = sum;
  }
}

}  // namespace emulated

inline void load_matrices(uint32_t (&r)[4], const void* row, const char* file = __builtin_FILE(),
                          int line = __builtin_LINE()) {
  emulated::load_matrices(r, row, /* transposed */ false, file, line);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row, const char* file = __builtin_FILE(),
                                     int line = __builtin_LINE()) {
  emulated::load_matrices(r, row, /* transposed */ true, file, line);
}

template <class T>
inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated::multiply_add<16, 2>(d, a, b, "mma.m16n8k16", [](uint32_t word, int half) {
    return to_float(T{static_cast<uint16_t>(word >> (16 * half))});
  });
}
// Tensor cores leave the lower 13 bits of a float aside.
inline void multiply_add_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated::multiply_add<8, 1>(d, a, b, "mma.m16n8k8.tf32", [](uint32_t word, int) {
    word &= 0xffffe000u;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
  });
}
// To the nearest, halves away from zero; Inf and NaN stay.
inline uint32_t to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite ? (bits + 0x1000u) & 0xffffe000u : x != x ? 0x7fffffffu & 0xffffe000u : bits;
}

template <auto kKernel, class... Args>
Status launch(const Geometry& geometry, Stream, Args... args) {
  static_assert(std::is_same_v<decltype(kKernel), void (*)(Args...)>, "a kernel gets just the types that it names");
  simt::kernel_name = typeid(std::integral_constant<decltype(kKernel), kKernel>).name();
  simt::launch({static_cast<unsigned>(geometry.blocks)}, {static_cast<unsigned>(geometry.threads)},
               static_cast<size_t>(geometry.shared_bytes), [=] { kKernel(args...); });
  return 0;
}

}  // namespace fastenc::cuda
