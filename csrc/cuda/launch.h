// What the CUDA kernels do, as plain functions on raw pointers: no torch. Each is in the .cu file of its name, its
// kernel in the .cuh; compiled by nvcc for GPUs and, over csrc/simt, by a C++ compiler for tests.
//
// M rows, K in features, N out features. All sums are fp32, in a fixed order; one rounding, at the store.
#pragma once

#include <cstdint>

#include "../activation.h"

namespace fastenc::cuda {

// What the numbers are and how they are multiplied: fp32 with fp32 products, fp32 with TF32 products, and the 16-bit
// types, whose products are exact.
enum class Arithmetic : int64_t { kIeee, kTf32, kHalf, kBFloat16 };

constexpr int64_t item_size(Arithmetic arithmetic) {
  return arithmetic == Arithmetic::kIeee || arithmetic == Arithmetic::kTf32 ? 4 : 2;
}

using Stream = void*;  // cudaStream_t
using Status = int;    // cudaError_t: 0 is success

// A launch: one dimension of blocks, of threads in a block, and the shared memory of a block.
struct Geometry {
  int64_t blocks;
  int threads;
  int64_t shared_bytes;
};

// A matrix of any strides, in elements, of any sign or zero.
struct Matrix {
  const void* data;
  int64_t row_stride;
  int64_t col_stride;
};

constexpr int64_t kDeepest = 8;   // layers in one kernel
constexpr int64_t kWidest = 128;  // outputs of a layer that a block holds; only the last of a stack may have more

// out [M, N] = activation(x [M, K] @ weight [N, K]^T + bias [N]).
struct DenseForward {
  Arithmetic arithmetic;
  int64_t M, N, K;
  Matrix x;
  Matrix weight;
  const void* bias;  // contiguous, or null
  ActivationKind activation;
  void* out;     // contiguous
  void* preact;  // contiguous; the value before the activation, or null: not wanted
};
Status dense_forward(const DenseForward& args, Stream stream);

// dZ [M, N] = grad_out * activation'(saved), and the sums of its columns in fp32 from before the rounding.
struct PreactGradient {
  Arithmetic arithmetic;
  int64_t M, N;
  Matrix grad_out;
  Matrix saved;  // the output, or what comes before the activation if saves_preact; not read for the identity
  ActivationKind activation;
  void* grad_preact;  // contiguous, or null: not wanted
  void* grad_bias;    // [N], or null: not wanted
  void* workspace;    // of workspace_bytes(args), 16-byte aligned
};
int64_t workspace_bytes(const PreactGradient& args);
Status preact_gradient(const PreactGradient& args, Stream stream);

// The backward pass of DenseForward for any N; of a narrow layer encoder_backward makes it in fewer launches.
struct DenseBackward {
  Arithmetic arithmetic;
  int64_t M, N, K;
  Matrix grad_out;  // [M, N]
  Matrix x;         // read for grad_weight
  Matrix weight;    // read for grad_x
  Matrix saved;     // as in PreactGradient
  ActivationKind activation;
  void* grad_x;       // [M, K] contiguous, or null: not wanted
  void* grad_weight;  // [N, K] contiguous, or null
  void* grad_bias;    // [N], or null
  void* workspace;    // of workspace_bytes(args), 16-byte aligned
};
int64_t workspace_bytes(const DenseBackward& args);
Status dense_backward(const DenseBackward& args, Stream stream);

// One layer of a stack; `out` and `preact` are as in DenseForward.
struct StackLayer {
  int64_t N;
  Matrix weight;     // [N, the layer below's N, or K]
  const void* bias;  // contiguous, or null
  ActivationKind activation;
  void* out;     // [M, N] contiguous, or null where nobody wants it; always of the last layer
  void* preact;  // [M, N] contiguous, or null
};

// A narrow stack in one launch: out_l = activation_l(out_(l-1) @ weight_l^T + bias_l), out_(-1) = x.
struct EncoderForward {
  Arithmetic arithmetic;
  int64_t M, K, depth;
  Matrix x;
  StackLayer layers[kDeepest];
};
Status encoder_forward(const EncoderForward& args, Stream stream);

// The gradients of one layer; null: not wanted.
struct StackGradients {
  void* weight;  // [N, in] contiguous
  void* bias;    // [N]
};

// The backward pass of EncoderForward, from the outputs (and pre-activations) that it wrote.
struct EncoderBackward {
  Arithmetic arithmetic;
  int64_t M, K, depth;
  Matrix x;
  Matrix grad_out;              // [M, N of the last layer]
  StackLayer layers[kDeepest];  // out: read where the derivative or the next layer's gradient needs it; preact likewise
  void* grad_x;                 // [M, K] contiguous, or null
  StackGradients grads[kDeepest];
  void* workspace;  // of workspace_bytes(args), 16-byte aligned
};
int64_t workspace_bytes(const EncoderBackward& args);
Status encoder_backward(const EncoderBackward& args, Stream stream);

// Parts that others are made of.

// dZ^T @ x in weight_parts(M, N, K) partial sums over disjoint rows: [parts][N, K] fp32.
struct WeightPartials {
  Arithmetic arithmetic;
  int64_t M, N, K;
  Matrix grad_preact;  // dZ [M, N]
  Matrix x;            // [M, K]
  float* partials;
};
int64_t weight_parts(int64_t M, int64_t N, int64_t K);  // of the shape alone, so that all GPUs give the same bits
Status weight_partials(const WeightPartials& args, Stream stream);

// out[i] = partials[i] + partials[stride + i] + ..., `parts` of them in this order, in fp32; rounded once.
struct PartialSums {
  const float* partials;
  int64_t parts, stride;
  void* out;
  int64_t count;
};
struct Reduce {
  Arithmetic arithmetic;
  int64_t sums;
  PartialSums sum[2 * kDeepest];
};
Status reduce(const Reduce& args, Stream stream);

// Whether the encoder functions take a stack with these outputs: [depth] of N.
inline bool is_narrow(const int64_t* widths, int64_t depth) {
  bool narrow = depth >= 1 && depth <= kDeepest;
  for (int64_t l = 0; narrow && l < depth; ++l) narrow = widths[l] > 0 && (l == depth - 1 || widths[l] <= kWidest);
  return narrow;
}

}  // namespace fastenc::cuda
