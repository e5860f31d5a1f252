// Which build of the kernels runs in this process, and what it borrows from libtorch.
#pragma once

#include <string>

#include "stack.h"

namespace fastenc {

const Kernels& kernels();
// With the number of threads as torch has it now.
Runtime runtime();

// Chooses the instruction set ("auto", "generic", "avx2", "avx512") and whether brgemm may be used; returns what is now
// in use, for example "avx512, brgemm for float32 and bfloat16". Throws std::invalid_argument for an instruction set
// that this machine lacks. For tests; not to be called while kernels run.
std::string configure(const std::string& isa, bool brgemm);

// Whether eager PyTorch's operators take less time for one layer, [M, K] to [M, N] in fp32, than the kernels: without
// brgemm, where the product of a BLAS library is at the machine's peak too and our packing comes on top. With one or
// two rows nothing is packed; in training the kernels save passes, as they do for a layer of a stack, whose rows stay
// in cache from one to the next. (Measured on an AMD EPYC with AVX2, Zen 3.)
bool leaves_to_aten(int64_t M, int64_t N, int64_t K, bool training, bool in_stack);

// Whether training steps of a stack with such a layer take less time in eager PyTorch than in the training engine:
// without brgemm, where a wide layer's weights do not stay in cache from one block of rows to the next.
bool leaves_steps_to_aten(int64_t batch, int64_t N, int64_t K);

// 10^9 floating-point operations a second of brgemm on all of torch's threads, on tiles of an encoder's size: the peak
// to compare kernels with. 0 where there is no brgemm.
double brgemm_gflops(bool bfloat16);

}  // namespace fastenc
