// What the operators of csrc/cuda/ops.cu are given for tests, where their kernels run on a CPU: memory with poison
// around it, and operators that steer the emulator.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>

namespace simt {

using torch::stable::Tensor;

// An uninitialised contiguous tensor; under fastenc_simt::guard(True), of poison and with poison around it.
Tensor allocate(const Tensor& like, std::initializer_list<int64_t> sizes,
                std::optional<torch::headeronly::ScalarType> dtype = std::nullopt);

}  // namespace simt
