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

// 10^9 floating-point operations a second of brgemm on all of torch's threads, on tiles of an encoder's size: the peak
// to compare kernels with. 0 where there is no brgemm.
double brgemm_gflops(bool bfloat16);

}  // namespace fastenc
