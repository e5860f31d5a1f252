// The gradient of what comes before an activation, and its column sums, in one pass.
#pragma once

#include "pack.cuh"

namespace fastenc::cuda {

// The pass without the reduction: the column sums stay in the workspace, as column_sums(args) says.
Status preact_gradient_pass(const PreactGradient& args, Stream stream);
PartialSums column_sums(const PreactGradient& args);

constexpr int kGradientThreads = 256;
// Neighbouring columns of a thread: 16 bytes.
FASTENC_INLINE constexpr int columns_each(int64_t item_size) { return static_cast<int>(16 / item_size); }

// How the threads of a block lie over the matrix: `lanes` of them beside each other in a row, a power of two.
FASTENC_INLINE constexpr int gradient_lanes(int64_t N, int each) {
  int lanes = 1;
  while (lanes < 32 && lanes * each < N) lanes *= 2;
  return lanes;
}

// The rows of a block, of the shape alone: few enough that the blocks fill a GPU, enough to be worth a sum each.
constexpr int64_t gradient_part_rows(int64_t M, int64_t N, int each) {
  const int lanes = gradient_lanes(N, each);
  const int64_t fewest = 4 * kGradientThreads / lanes;
  const int64_t rows = divide_up(M, divide_up(4 * kMultiprocessors, divide_up(N, lanes * each)));
  return rows > fewest ? rows : fewest;
}

constexpr int64_t gradient_parts(int64_t M, int64_t N, int each) {
  return M == 0 || N == 0 ? 1 : divide_up(M, gradient_part_rows(M, N, each));
}

// Whether threads can read and write their columns by 16 bytes; else neighbouring threads have neighbouring columns.
template <class T>
bool is_wide(const PreactGradient& args) {
  const auto allows = [](const void* data, int64_t row_stride, int64_t col_stride) {
    return col_stride != 1 || access_bytes<T>(data, row_stride, col_stride) == 16;
  };
  return args.N % columns_each(sizeof(T)) == 0 &&
         allows(args.grad_out.data, args.grad_out.row_stride, args.grad_out.col_stride) &&
         (args.activation == ActivationKind::kIdentity ||
          allows(args.saved.data, args.saved.row_stride, args.saved.col_stride)) &&
         (!args.grad_preact || allows(args.grad_preact, args.N, 1));
}

// grad_out, saved  [M, N]  fp32 | fp16 | bf16, any strides
// grad_preact      [M, N]  dtype of grad_out, contiguous, or null
// partials         [parts, N]  fp32, or null
// grid             parts * ceil(N / columns of a block) blocks; one owns part_rows rows of its columns
// shared           the threads' sums, fp32
//
// A thread adds up its columns in the rows that it comes to; a block's sums of a column are added in the order of its
// threads. Neither depends on how memory is read.
template <class T>
FASTENC_KERNEL(kGradientThreads, 3)
preact_gradient_kernel(const PreactGradient args, float* const partials, const int64_t part_rows, const bool wide) {
  constexpr int kEach = columns_each(sizeof(T));
  constexpr int kPadded = kGradientThreads + 32 / kEach;  // lanes that read one number of several threads: other banks
  const int lanes = gradient_lanes(args.N, kEach), slots = kGradientThreads / lanes, cols = lanes * kEach;
  const int64_t chunks = divide_up(args.N, cols), part = block() / chunks, first_col = block() % chunks * cols;
  const int in_row = thread() % lanes, slot = thread() / lanes, apart = wide ? 1 : lanes;
  const int64_t col = first_col + in_row * (wide ? kEach : 1);
  const int count = count_inside<kEach>(col, args.N, apart);
  const bool reads_saved = args.activation != ActivationKind::kIdentity;
  if (PLANTED(EarlyReturn) && count == 0) return;

  float sums[kEach] = {};
  const int64_t begin = part * part_rows, end = begin + part_rows < args.M ? begin + part_rows : args.M;
  for (int64_t row = begin + slot; row < end + PLANTED(SumsRowTooMany); row += slots) {
    const auto load = [&](float (&out)[kEach], const Matrix& from) {
      load_numbers(out, static_cast<const T*>(from.data) + row * from.row_stride + col * from.col_stride,
                   apart * from.col_stride, count, wide && from.col_stride == 1);
    };
    float grad[kEach], saved[kEach] = {};
    load(grad, args.grad_out);
    if (reads_saved) load(saved, args.saved);
    with_activation(args.activation, [&](auto activation) {
#pragma unroll
      for (int e = 0; e < kEach; ++e) grad[e] = decltype(activation)::backward(grad[e], saved[e]);
    });
#pragma unroll
    for (int e = 0; e < kEach; ++e) sums[e] += grad[e];
    if (args.grad_preact)
      store_numbers(static_cast<T*>(args.grad_preact) + row * args.N + col, grad, apart, count, wide);
  }
  if (!partials) return;

  float* const shared = reinterpret_cast<float*>(shared_memory());
#pragma unroll
  for (int e = 0; e < kEach; ++e) store_shared(shared + e * kPadded + thread(), sums[e]);
  if (!PLANTED(NoBarrierBeforeSums)) sync_block();
  if (PLANTED(ArrivalOrder)) {
    for (int e = 0; e < kEach && slot > 0; ++e)
      store_shared(shared + e * kPadded + in_row, load_shared(shared + e * kPadded + in_row) + sums[e]);
    sync_block();
  }
  const int c = thread();
  if (c >= cols || first_col + c >= args.N + PLANTED(SumsColumnTooFar)) return;
  const float* const own = shared + (wide ? c % kEach * kPadded + c / kEach : c / lanes * kPadded + c % lanes);
  float total = 0.0f;
  for (int s = 0; s < (PLANTED(ArrivalOrder) ? 1 : slots); ++s) total += load_shared(own + s * lanes);
  store_global(partials + part * args.N + first_col + c, total);
}

template <class T>
constexpr Geometry preact_gradient_geometry(int64_t M, int64_t N) {
  constexpr int kEach = columns_each(sizeof(T));
  return {gradient_parts(M, N, kEach) * divide_up(N, gradient_lanes(N, kEach) * kEach), kGradientThreads,
          kEach * (kGradientThreads + 32 / kEach) * int64_t{sizeof(float)}};
}

}  // namespace fastenc::cuda
