// From tensors to the launchers' structs: checks, allocation, the device and its stream. For ops.cu alone.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "launch.h"

#ifdef __CUDACC__
#include <cuda_runtime_api.h>
#else
#include "../simt/operators.h"
#endif

namespace fastenc::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#ifdef __CUDACC__

constexpr const char* kWhere = "on a GPU";
inline bool is_here(const Tensor& tensor) { return tensor.is_cuda(); }

inline Tensor allocate(const Tensor& like, std::initializer_list<int64_t> sizes,
                       std::optional<ScalarType> dtype = std::nullopt) {
  return torch::stable::new_empty(like, sizes, dtype);
}

// Makes the tensor's device the current one as long as it lives.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }
  Stream stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

inline void check(Status status, const char* name) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // so that PyTorch does not find it again
  STD_TORCH_CHECK(false, "fastenc: the kernels of ", name,
                  " cannot be launched: ", cudaGetErrorString(static_cast<cudaError_t>(status)));
}

#else

constexpr const char* kWhere = "on the CPU";
inline bool is_here(const Tensor& tensor) { return tensor.is_cpu(); }
using simt::allocate;

struct OnDeviceOf {
  explicit OnDeviceOf(const Tensor&) {}
  Stream stream() const { return nullptr; }
};

inline void check(Status status, const char* name) {
  STD_TORCH_CHECK(status == 0, "fastenc: the kernels of ", name, " cannot be launched: status ", status);
}

#endif

inline Arithmetic arithmetic_of(const Tensor& x, bool tf32) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return tf32 ? Arithmetic::kTf32 : Arithmetic::kIeee;
    case ScalarType::Half: return Arithmetic::kHalf;
    case ScalarType::BFloat16: return Arithmetic::kBFloat16;
    default: STD_TORCH_CHECK(false, "fastenc: x must be float32, bfloat16 or float16");
  }
}

inline ActivationKind activation_of(int64_t number) {
  STD_TORCH_CHECK(number >= 0 && number < static_cast<int64_t>(ActivationKind::kCount),
                  "fastenc: there is no activation number ", number);
  return static_cast<ActivationKind>(number);
}

inline void check_operand(const Tensor& tensor, const Tensor& x, int64_t dim, const char* name) {
  STD_TORCH_CHECK(is_here(tensor) && tensor.get_device_index() == x.get_device_index(), "fastenc: ", name, " must be ",
                  kWhere, ", where x is");
  STD_TORCH_CHECK(tensor.dim() == dim, "fastenc: ", name, " must have ", dim, " dimensions, not ", tensor.dim());
  STD_TORCH_CHECK(tensor.scalar_type() == x.scalar_type(), "fastenc: ", name, " must have the dtype of x");
}

inline void check_matrix(const Tensor& tensor, const Tensor& x, int64_t rows, int64_t cols, const char* name) {
  check_operand(tensor, x, 2, name);
  STD_TORCH_CHECK(tensor.size(0) == rows && tensor.size(1) == cols, "fastenc: ", name, " must be [", rows, ", ", cols,
                  "], not [", tensor.size(0), ", ", tensor.size(1), "]");
}

inline Matrix matrix(const Tensor& tensor) { return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)}; }

// What is not wanted is an empty tensor, and null.
inline void* pointer(Tensor& tensor) { return tensor.numel() == 0 ? nullptr : tensor.mutable_data_ptr(); }

// Contiguous copies, held until the launch.
class Contiguous {
 public:
  const void* operator()(const Tensor& tensor) {
    held_.push_back(tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor));
    return held_.back().const_data_ptr();
  }

 private:
  std::vector<Tensor> held_;
};

// The shapes of a stack, checked: x [M, K], and each layer's weight and bias.
struct Stack {
  Arithmetic arithmetic;
  int64_t M, K;
  std::vector<StackLayer> layers;
  Contiguous contiguous;

  Stack(const Tensor& x, bool tf32) {
    check_operand(x, x, 2, "x");
    arithmetic = arithmetic_of(x, tf32);
    M = x.size(0);
    K = x.size(1);
  }

  void add(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t activation) {
    check_matrix(weight, x, weight.dim() == 2 ? weight.size(0) : 0, layers.empty() ? K : layers.back().N, "weight");
    const int64_t N = weight.size(0);
    if (bias.has_value()) {
      check_operand(*bias, x, 1, "bias");
      STD_TORCH_CHECK(bias->size(0) == N, "fastenc: bias must be [", N, "], not [", bias->size(0), "]");
    }
    layers.push_back({N, matrix(weight), bias.has_value() ? contiguous(*bias) : nullptr, activation_of(activation),
                      /* out */ nullptr, /* preact */ nullptr});
  }

  // Whether nothing is to be computed, for want of rows or columns.
  bool is_empty() const {
    bool empty = M == 0;
    for (const StackLayer& layer : layers) empty = empty || layer.N == 0;
    return empty;
  }

  void check_narrow() const {
    std::vector<int64_t> widths;
    for (const StackLayer& layer : layers) widths.push_back(layer.N);
    STD_TORCH_CHECK(is_narrow(widths.data(), static_cast<int64_t>(widths.size())),
                    "fastenc: a stack in one kernel has at most ", kDeepest, " layers, all but the last of 1 to ",
                    kWidest, " outputs");
  }
};

}  // namespace fastenc::cuda
