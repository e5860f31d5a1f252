// The CPU kernels: a stack of dense layers, forward and backward. A single dense layer is a stack of one.
//
// Raw pointers, sizes, strides; no torch. The same source (stack_impl.h) is compiled once per instruction set, and
// ops.cpp chooses at run time.
#pragma once

#include <cstdint>

#include "../activation.h"
#include "dtype.h"

namespace fastenc {

// weight [out, in] row-major and bias [out] (or null), in the dtype of the call.
struct Layer {
  const void* weight;
  const void* bias;
  int64_t in;
  int64_t out;
  ActivationKind activation;
};

// A [M, columns] matrix; strides in elements, of any sign or zero.
struct Matrix {
  const void* data;
  int64_t row_stride;
  int64_t col_stride;
};

// out_l = activation_l(out_{l-1} @ weight_l^T + bias_l), out_{-1} = x.
struct ForwardArgs {
  Dtype dtype;
  int64_t M;
  int64_t depth;
  const Layer* layers;
  Matrix x;              // [M, layers[0].in]
  void* const* outs;     // [depth] of [M, out], contiguous; null for a hidden one that nobody wants
  void* const* preacts;  // [depth] of [M, out], contiguous; null where not wanted
};

struct BackwardArgs {
  Dtype dtype;
  int64_t M;
  int64_t depth;
  const Layer* layers;
  Matrix x;
  Matrix grad_out;             // [M, layers[depth - 1].out]
  const void* const* outs;     // as written by forward; outs[l] is read if l is hidden or its derivative needs it
  const void* const* preacts;  // read where saves_preact
  void* grad_x;                // [M, layers[0].in] contiguous, or null: not wanted
  void* const* grad_weights;   // [depth] of [out, in] contiguous; null where not wanted
  void* const* grad_biases;    // [depth] of [out]; null where not wanted
};

// What the kernels borrow from the process they run in.
struct Runtime {
  // Calls body(context, begin, end) on disjoint ranges that cover [0, count), possibly on several threads.
  using Body = void (*)(void* context, int64_t begin, int64_t end);
  void (*parallel_for)(int64_t count, Body body, void* context);
  int64_t threads;

  // C[M, N] (+)= A[M, K] @ B[K, N], row-major, sums in fp32: libtorch's brgemm, or null for the portable one.
  // For bf16, B is [K / 2, N, 2] (VNNI order). release gives back tile registers after bf16 calls.
  using BrgemmFloat = void (*)(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add_C,
                               const float* A, const float* B, float* C, bool is_vnni);
  using BrgemmBFloat16 = void (*)(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add_C,
                                  const uint16_t* A, const uint16_t* B, float* C, bool is_vnni);
  BrgemmFloat brgemm_float;
  BrgemmBFloat16 brgemm_bfloat16;
  void (*brgemm_release)(bool is_vnni);
};

struct TrainArgs;  // train.h
struct TrainCall;

// The training engine; see train.h.
struct Engine {
  // Allocates; throws std::bad_alloc. The arguments, and what they point to, must outlive the result.
  void* (*create)(const TrainArgs&);
  // Takes the steps of the call. Returns how many it took: fewer than all if the loss of one is not finite, which is in
  // losses then; the parameters are as they were before that step.
  int64_t (*run)(void* training, const TrainCall&, const Runtime&);
  void (*destroy)(void* training);
};

// One instruction set's build of the kernels. Bits do not depend on Runtime::threads.
struct Kernels {
  const char* name;
  void (*forward)(const ForwardArgs&, const Runtime&);
  void (*backward)(const BackwardArgs&, const Runtime&);
  Engine engine;
};

const Kernels& generic_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif

}  // namespace fastenc
