// The CPU kernels as PyTorch operators in the namespace fastenc_cpu, on torch's stable ABI: one build serves every
// torch from 2.13 on. fastenc/backends/cpu.py calls them; what users call is in fastenc/ops.py.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "bind.h"

namespace torch::stable {

// What bind.h asks for.
Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes) {
  int64_t strides[2] = {1, 1};
  if (sizes.size() == 2) strides[0] = std::max<int64_t>(1, sizes.begin()[1]);
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides,
                                                         dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor new_contiguous(const Tensor& tensor) { return contiguous(tensor); }

void fill_zero(Tensor& tensor) { zero_(tensor); }

}  // namespace torch::stable

namespace {

using torch::stable::Tensor;

const fastenc::Access kAccess = {fastenc::kAccessVersion, fastenc::kernels, fastenc::runtime, fastenc::leaves_to_aten};

std::tuple<Tensor, Tensor> dense_forward(Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t activation,
                                         bool save) {
  fastenc::check_operand(x, x, 2, "x");
  fastenc::Stack<Tensor> stack(1);
  stack.add(x, weight, bias, activation);
  std::vector<Tensor> results = fastenc::run_forward(kAccess, x, stack, save);
  return {results[0], results.size() > 1 ? results[1] : new_empty(x, {0})};
}

std::tuple<Tensor, Tensor, Tensor> dense_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor saved,
                                                  int64_t activation, int64_t grad_x, int64_t grad_weight,
                                                  int64_t grad_bias) {
  fastenc::check_operand(x, x, 2, "x");
  fastenc::check_operand(saved, x, 2, "saved");
  fastenc::Stack<Tensor> stack(1);
  stack.add(x, weight, std::nullopt, activation, /* reads_weight */ grad_x != 0);
  const Tensor kept = saved.is_contiguous() ? saved : contiguous(saved);
  const std::vector<const void*> pointers = {kept.const_data_ptr()};
  std::vector<Tensor> grads =
      fastenc::run_backward(kAccess, grad_out, x, stack, pointers, pointers, {grad_x, grad_weight, grad_bias});
  return {grads[0], grads[1], grads[2]};
}

void check_lists(size_t weights, size_t biases, size_t activations) {
  STD_TORCH_CHECK(weights > 0 && weights == biases && weights == activations,
                  "fastenc: as many weights, biases and activations are needed, at least one; got ", weights, ", ",
                  biases, " and ", activations);
}

std::vector<Tensor> encoder_forward(Tensor x, std::vector<Tensor> weights, std::vector<std::optional<Tensor>> biases,
                                    std::vector<int64_t> activations, bool save) {
  fastenc::check_operand(x, x, 2, "x");
  check_lists(weights.size(), biases.size(), activations.size());
  fastenc::Stack<Tensor> stack(weights.size());
  for (size_t l = 0; l < weights.size(); ++l) stack.add(x, weights[l], biases[l], activations[l]);
  return fastenc::run_forward(kAccess, x, stack, save);
}

// results: what encoder_forward returned with save.
std::vector<Tensor> encoder_backward(Tensor grad_out, Tensor x, std::vector<Tensor> weights,
                                     std::vector<Tensor> results, std::vector<int64_t> activations,
                                     std::vector<int64_t> wanted) {
  fastenc::check_operand(x, x, 2, "x");
  check_lists(weights.size(), weights.size(), activations.size());
  fastenc::Stack<Tensor> stack(weights.size());
  for (size_t l = 0; l < weights.size(); ++l)
    stack.add(x, weights[l], std::nullopt, activations[l], /* reads_weight */ l > 0 || (!wanted.empty() && wanted[0]));
  return fastenc::run_backward_from(kAccess, grad_out, x, stack, results.data(), results.size(), wanted);
}

std::string configure(std::string isa, bool brgemm) { return fastenc::configure(isa, brgemm); }

// The address of what eager.cpp needs of this library.
int64_t access_address() { return reinterpret_cast<int64_t>(&kAccess); }

double brgemm_gflops(bool bfloat16) { return fastenc::brgemm_gflops(bfloat16); }

}  // namespace

STABLE_TORCH_LIBRARY(fastenc_cpu, m) {
  m.def("dense_forward(Tensor x, Tensor weight, Tensor? bias, int activation, bool save) -> (Tensor, Tensor)");
  m.def(
      "dense_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor saved, int activation, int grad_x, "
      "int grad_weight, int grad_bias) -> (Tensor, Tensor, Tensor)");
  m.def("encoder_forward(Tensor x, Tensor[] weights, Tensor?[] biases, int[] activations, bool save) -> Tensor[]");
  m.def(
      "encoder_backward(Tensor grad_out, Tensor x, Tensor[] weights, Tensor[] results, int[] activations, int[] "
      "wanted) "
      "-> Tensor[]");
  m.def("access() -> int");
  m.def("configure(str isa, bool brgemm) -> str");
  m.def("brgemm_gflops(bool bfloat16) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(fastenc_cpu, CPU, m) {
  m.impl("dense_forward", TORCH_BOX(&dense_forward));
  m.impl("dense_backward", TORCH_BOX(&dense_backward));
  m.impl("encoder_forward", TORCH_BOX(&encoder_forward));
  m.impl("encoder_backward", TORCH_BOX(&encoder_backward));
}

STABLE_TORCH_LIBRARY_IMPL(fastenc_cpu, CompositeExplicitAutograd, m) {
  m.impl("access", TORCH_BOX(&access_address));
  m.impl("configure", TORCH_BOX(&configure));
  m.impl("brgemm_gflops", TORCH_BOX(&brgemm_gflops));
}
