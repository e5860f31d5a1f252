// The backward pass of one dense layer: which launches it takes, and on what. Their kernels are in other files.
#pragma once

#include "preact_gradient.cuh"

namespace fastenc::cuda {

// At most four launches: dZ with its column sums; grad_x = dZ @ weight, as the product of a dense layer whose weight is
// transposed; the parts of grad_weight; the sums of all parts.
//
// workspace   dZ [M, N], unless grad_out is dZ; the partial column sums; the partial sums of grad_weight
struct BackwardPlan {
  PreactGradient gradient;
  DenseForward grad_x;
  WeightPartials weight;
  Reduce sums;
  bool needs_pass;
  int64_t bytes = 0;

  explicit BackwardPlan(const DenseBackward& args) {
    const bool is_preact = args.activation == ActivationKind::kIdentity && is_readable(args.arithmetic, args.grad_out);
    const bool needs_preact = !is_preact && (args.grad_x || args.grad_weight);
    needs_pass = needs_preact || args.grad_bias;

    const auto take = [&](int64_t size) {
      const uintptr_t piece = reinterpret_cast<uintptr_t>(args.workspace) + static_cast<uintptr_t>(bytes);
      bytes += divide_up(size, 16) * 16;
      return reinterpret_cast<void*>(piece);
    };
    void* const preact = needs_preact ? take(args.M * args.N * item_size(args.arithmetic)) : nullptr;
    gradient = {args.arithmetic, args.M, args.N,         args.grad_out, args.saved,
                args.activation, preact, args.grad_bias, nullptr};
    gradient.workspace = take(workspace_bytes(gradient));
    const Matrix grad_preact = needs_preact ? Matrix{preact, args.N, 1} : args.grad_out;

    const Matrix weight_t = {args.weight.data, args.weight.col_stride, args.weight.row_stride};
    grad_x = {args.arithmetic,           args.M,      args.K, args.N, grad_preact, weight_t, nullptr,
              ActivationKind::kIdentity, args.grad_x, nullptr};

    const int64_t parts = weight_parts(args.M, args.N, args.K), count = args.N * args.K;
    float* const partials =
        args.grad_weight ? static_cast<float*>(take(parts * count * int64_t{sizeof(float)})) : nullptr;
    weight = {args.arithmetic, args.M, args.N, args.K, grad_preact, args.x, partials};

    sums = {args.arithmetic, 0, {}};
    if (args.grad_bias) sums.sum[sums.sums++] = column_sums(gradient);
    if (args.grad_weight) sums.sum[sums.sums++] = {partials, parts, count, args.grad_weight, count};
  }

  // Whether products read this matrix well as it is.
  static bool is_readable(Arithmetic arithmetic, const Matrix& matrix) {
    return item_size(arithmetic) == 4 ? access_bytes<float>(matrix.data, matrix.row_stride, matrix.col_stride) > 0
                                      : access_bytes<Half>(matrix.data, matrix.row_stride, matrix.col_stride) > 0;
  }
};

}  // namespace fastenc::cuda
