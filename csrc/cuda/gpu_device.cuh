// gpu.cuh for GPUs of compute capability 8.0 and higher.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <type_traits>

#include "launch.h"

#define FASTENC_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)
#define FASTENC_DEVICE __device__ __forceinline__
#define PLANTED(name) false

namespace fastenc::cuda {

using Half = __half;
using BFloat16 = __nv_bfloat16;

FASTENC_DEVICE float to_float(float x) { return x; }
FASTENC_DEVICE float to_float(Half x) { return __half2float(x); }
FASTENC_DEVICE float to_float(BFloat16 x) { return __bfloat162float(x); }
template <class T>
FASTENC_DEVICE T from_float(float x) {
  if constexpr (sizeof(T) == 4) return x;
  if constexpr (std::is_same_v<T, Half>) return __float2half_rn(x);
  if constexpr (std::is_same_v<T, BFloat16>) return __float2bfloat16_rn(x);
}

template <int kBytes>
struct WordOf;
template <>
struct WordOf<2> {
  using Type = uint16_t;
};
template <>
struct WordOf<4> {
  using Type = uint32_t;
};
template <>
struct WordOf<8> {
  using Type = uint2;
};
template <>
struct WordOf<16> {
  using Type = uint4;
};
template <int kBytes>
using Word = typename WordOf<kBytes>::Type;

FASTENC_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
FASTENC_DEVICE int lane() { return static_cast<int>(threadIdx.x % 32); }
FASTENC_DEVICE int warp() { return static_cast<int>(threadIdx.x / 32); }
FASTENC_DEVICE int64_t block() { return blockIdx.x; }
FASTENC_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char fastenc_shared[];
  return fastenc_shared;
}

FASTENC_DEVICE void sync_block() { __syncthreads(); }
FASTENC_DEVICE void sync_warp() { __syncwarp(); }
template <class T>
FASTENC_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

template <class T>
FASTENC_DEVICE T load_global(const T* from) {
  return *from;
}
template <class T>
FASTENC_DEVICE void store_global(T* to, T value) {
  if constexpr (std::is_same_v<T, uint2> || std::is_same_v<T, uint4>)
    __stwb(to, value);  // one access for certain: an assignment becomes several at times
  else
    *to = value;
}
template <class T>
FASTENC_DEVICE T load_shared(const T* from) {
  return *from;
}
template <class T>
FASTENC_DEVICE void store_shared(T* to, T value) {
  *to = value;
}

FASTENC_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

template <int kBytes>
FASTENC_DEVICE void copy_async(void* shared, const void* global, int source_bytes) {
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(source_bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global),
                 "n"(kBytes), "r"(source_bytes)
                 : "memory");
}
FASTENC_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
FASTENC_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

FASTENC_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
FASTENC_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

template <class T>
FASTENC_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, Half>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
FASTENC_DEVICE void multiply_add_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
FASTENC_DEVICE uint32_t to_tf32(float x) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(x));
  return rounded;
}

// Launches kKernel on the current device. More shared memory than a block has by default is asked for once a device.
template <auto kKernel, class... Args>
Status launch(const Geometry& geometry, Stream stream, Args... args) {
  static_assert(std::is_same_v<decltype(kKernel), void (*)(Args...)>, "a kernel gets just the types that it names");
  constexpr int64_t kDefaultShared = 48 * 1024;
  if (geometry.shared_bytes > kDefaultShared) {
    static std::atomic<uint64_t> asked{0};  // a bit for each device
    int device = 0;
    if (const cudaError_t error = cudaGetDevice(&device)) return error;
    const uint64_t bit = uint64_t{1} << (device % 64);
    if (device >= 64 || !(asked.load(std::memory_order_relaxed) & bit)) {
      int most = 0;
      if (const cudaError_t error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device))
        return error;
      if (const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kKernel),
                                                         cudaFuncAttributeMaxDynamicSharedMemorySize, most))
        return error;
      asked.fetch_or(bit, std::memory_order_relaxed);
    }
  }
  void* pointers[] = {&args...};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kKernel), dim3(static_cast<unsigned>(geometry.blocks)),
                          dim3(static_cast<unsigned>(geometry.threads)), pointers,
                          static_cast<size_t>(geometry.shared_bytes), static_cast<cudaStream_t>(stream));
}

}  // namespace fastenc::cuda
