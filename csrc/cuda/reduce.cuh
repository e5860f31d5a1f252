// Partial sums added up.
#pragma once

#include "tile.cuh"

namespace fastenc::cuda {

constexpr int kReduceThreads = 128;

FASTENC_INLINE constexpr int64_t reduce_blocks(int64_t count) { return divide_up(count, kReduceThreads); }

// partials  [parts, stride]  fp32, of each sum
// out       [count]  T
// grid      reduce_blocks(count) blocks for the first sum, then those of the second, and so on; one owns
//           kReduceThreads numbers, a thread one, which it adds up in the order of the parts
template <class T>
FASTENC_KERNEL(kReduceThreads)
reduce_kernel(const Reduce args) {
  int64_t of_sum = block();
  int s = 0;
  while (of_sum >= reduce_blocks(args.sum[s].count)) of_sum -= reduce_blocks(args.sum[s++].count);
  const PartialSums& sum = args.sum[s];
  const int64_t i = of_sum * kReduceThreads + thread();
  if (i >= sum.count + PLANTED(ReduceTooFar)) return;
  const int64_t parts = sum.parts - PLANTED(ReduceTooFew);
  float total = 0.0f;
#pragma unroll 8
  for (int64_t part = 0; part < parts; ++part) total += load_global(sum.partials + part * sum.stride + i);
  store_global(static_cast<T*>(sum.out) + i, from_float<T>(total));
}

inline Geometry reduce_geometry(const Reduce& args) {
  int64_t blocks = 0;
  for (int64_t s = 0; s < args.sums; ++s) blocks += reduce_blocks(args.sum[s].count);
  return {blocks, kReduceThreads, 0};
}

}  // namespace fastenc::cuda
