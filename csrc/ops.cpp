// The CPU kernels as PyTorch operators in the namespace fastenc_cpu, on torch's stable ABI: one build serves every
// torch from 2.13 on. fastenc/backends/cpu.py calls them; what users call is in fastenc/ops.py.
#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/runtime.h"
#include "cpu/stack.h"

namespace {

using fastenc::ActivationKind;
using fastenc::Dtype;
using fastenc::Layer;
using fastenc::Matrix;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kHalf;
    default: STD_TORCH_CHECK(false, "fastenc_cpu: x must be float32, bfloat16 or float16");
  }
}

// A new contiguous tensor of x's dtype on the CPU.
Tensor empty_like_dtype(const Tensor& x, std::initializer_list<int64_t> sizes) {
  int64_t strides[2] = {1, 1};
  if (sizes.size() == 2) strides[0] = std::max<int64_t>(1, sizes.begin()[1]);
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides,
                                                         dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

Matrix matrix(const Tensor& tensor) {
  const auto strides = tensor.strides();
  return {tensor.const_data_ptr(), strides[0], strides[1]};
}

void check_operand(const Tensor& tensor, const Tensor& x, int64_t dim, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), "fastenc_cpu: ", name, " must be on the CPU");
  STD_TORCH_CHECK(tensor.dim() == dim, "fastenc_cpu: ", name, " must have ", dim, " dimensions, not ", tensor.dim());
  STD_TORCH_CHECK(tensor.scalar_type() == x.scalar_type(), "fastenc_cpu: ", name, " must have the dtype of x");
}

// The layers of a call, and the contiguous copies that they may need.
struct Stack {
  std::vector<Tensor> held;
  std::vector<Layer> layers;

  explicit Stack(size_t depth) { layers.reserve(depth); }

  void add(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t activation) {
    check_operand(weight, x, 2, "weight");
    const int64_t width = layers.empty() ? x.size(1) : layers.back().out;
    STD_TORCH_CHECK(weight.size(1) == width, "fastenc_cpu: shapes do not match: input [", x.size(0), ", ", width,
                    "], weight [", weight.size(0), ", ", weight.size(1), "]");
    STD_TORCH_CHECK(activation >= 0 && activation < static_cast<int64_t>(ActivationKind::kCount),
                    "fastenc_cpu: there is no activation number ", activation);
    held.push_back(as_contiguous(weight));
    const void* bias_data = nullptr;
    if (bias.has_value()) {
      check_operand(*bias, x, 1, "bias");
      STD_TORCH_CHECK(bias->size(0) == weight.size(0), "fastenc_cpu: shapes do not match: weight [", weight.size(0),
                      ", ", weight.size(1), "], bias [", bias->size(0), "]");
      const void* weight_data = held.back().const_data_ptr();
      held.push_back(as_contiguous(*bias));
      bias_data = held.back().const_data_ptr();
      layers.push_back({weight_data, bias_data, weight.size(1), weight.size(0), static_cast<ActivationKind>(activation)});
      return;
    }
    layers.push_back({held.back().const_data_ptr(), nullptr, weight.size(1), weight.size(0),
                      static_cast<ActivationKind>(activation)});
  }
};

// Runs the forward pass. Returns the outputs of all layers, then the pre-activations of those that need them; or, unless
// save, the last output alone.
std::vector<Tensor> run_forward(const Tensor& x, const Stack& stack, bool save) {
  const size_t depth = stack.layers.size();
  const int64_t M = x.size(0);
  std::vector<Tensor> results;
  results.reserve(2 * depth);
  std::vector<void*> pointers(2 * depth, nullptr);
  for (size_t l = save ? 0 : depth - 1; l < depth; ++l) {
    results.push_back(empty_like_dtype(x, {M, stack.layers[l].out}));
    pointers[l] = results.back().mutable_data_ptr();
  }
  for (size_t l = 0; save && l < depth; ++l) {
    if (!fastenc::saves_preact(stack.layers[l].activation)) continue;
    results.push_back(empty_like_dtype(x, {M, stack.layers[l].out}));
    pointers[depth + l] = results.back().mutable_data_ptr();
  }
  if (M > 0)
    fastenc::kernels().forward({dtype_of(x), M, static_cast<int64_t>(depth), stack.layers.data(), matrix(x),
                                pointers.data(), pointers.data() + depth},
                               fastenc::runtime());
  return results;
}

// Runs the backward pass. wanted and the result: grad_x, then grad_weight and grad_bias of each layer; what is not
// wanted is an empty tensor.
std::vector<Tensor> run_backward(const Tensor& grad_out, const Tensor& x, const Stack& stack,
                                 const std::vector<const void*>& outs, const std::vector<const void*>& preacts,
                                 const std::vector<int64_t>& wanted) {
  const size_t depth = stack.layers.size();
  const int64_t M = x.size(0);
  STD_TORCH_CHECK(wanted.size() == 2 * depth + 1, "fastenc_cpu: the mask must have ", 2 * depth + 1, " entries, not ",
                  wanted.size());
  check_operand(grad_out, x, 2, "grad_out");
  STD_TORCH_CHECK(grad_out.size(0) == M && grad_out.size(1) == stack.layers.back().out,
                  "fastenc_cpu: shapes do not match: grad_out [", grad_out.size(0), ", ", grad_out.size(1),
                  "], output [", M, ", ", stack.layers.back().out, "]");
  std::vector<Tensor> grads;
  grads.reserve(wanted.size());
  std::vector<void*> pointers(wanted.size(), nullptr), grad_weights(depth), grad_biases(depth);
  for (size_t i = 0; i < wanted.size(); ++i) {
    if (!wanted[i]) {
      grads.push_back(empty_like_dtype(x, {0}));
      continue;
    }
    if (i == 0)
      grads.push_back(empty_like_dtype(x, {M, x.size(1)}));
    else if (i % 2 == 1)
      grads.push_back(empty_like_dtype(x, {stack.layers[i / 2].out, stack.layers[i / 2].in}));
    else
      grads.push_back(empty_like_dtype(x, {stack.layers[i / 2 - 1].out}));
    if (M == 0 && i > 0) grads.back() = torch::stable::zero_(grads.back());
    pointers[i] = grads.back().mutable_data_ptr();
  }
  for (size_t l = 0; l < depth; ++l) {
    grad_weights[l] = pointers[2 * l + 1];
    grad_biases[l] = pointers[2 * l + 2];
  }
  if (M > 0)
    fastenc::kernels().backward({dtype_of(x), M, static_cast<int64_t>(depth), stack.layers.data(), matrix(x),
                                 matrix(grad_out), outs.data(), preacts.data(), pointers[0], grad_weights.data(),
                                 grad_biases.data()},
                                fastenc::runtime());
  return grads;
}

void check_input(const Tensor& x) { check_operand(x, x, 2, "x"); }

std::tuple<Tensor, Tensor> dense_forward(Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t activation,
                                         bool save) {
  check_input(x);
  Stack stack(1);
  stack.add(x, weight, bias, activation);
  std::vector<Tensor> results = run_forward(x, stack, save);
  Tensor preact = results.size() > 1 ? results[1] : empty_like_dtype(x, {0});
  return {results[0], preact};
}

std::tuple<Tensor, Tensor, Tensor> dense_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor saved,
                                                  int64_t activation, int64_t grad_x, int64_t grad_weight,
                                                  int64_t grad_bias) {
  check_input(x);
  Stack stack(1);
  stack.add(x, weight, std::nullopt, activation);
  check_operand(saved, x, 2, "saved");
  const Tensor kept = as_contiguous(saved);
  const std::vector<const void*> pointers = {kept.const_data_ptr()};
  std::vector<Tensor> grads =
      run_backward(grad_out, x, stack, pointers, pointers, {grad_x, grad_weight, grad_bias});
  return {grads[0], grads[1], grads[2]};
}

Stack make_stack(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& biases,
                 const std::vector<int64_t>& activations) {
  check_input(x);
  STD_TORCH_CHECK(!weights.empty() && weights.size() == activations.size() && weights.size() == biases.size(),
                  "fastenc_cpu: as many weights, biases and activations are needed, at least one; got ",
                  weights.size(), ", ", biases.size(), " and ", activations.size());
  Stack stack(weights.size());
  for (size_t l = 0; l < weights.size(); ++l) stack.add(x, weights[l], biases[l], activations[l]);
  return stack;
}

std::vector<Tensor> encoder_forward(Tensor x, std::vector<Tensor> weights, std::vector<std::optional<Tensor>> biases,
                                    std::vector<int64_t> activations, bool save) {
  return run_forward(x, make_stack(x, weights, biases, activations), save);
}

// saved: what encoder_forward returned with save.
std::vector<Tensor> encoder_backward(Tensor grad_out, Tensor x, std::vector<Tensor> weights, std::vector<Tensor> saved,
                                     std::vector<int64_t> activations, std::vector<int64_t> wanted) {
  const size_t depth = weights.size();
  Stack stack = make_stack(x, weights, std::vector<std::optional<Tensor>>(depth), activations);
  std::vector<const void*> outs(depth, nullptr), preacts(depth, nullptr);
  size_t next = depth;
  for (size_t l = 0; l < depth; ++l) {
    const bool needs = fastenc::saves_preact(stack.layers[l].activation);
    STD_TORCH_CHECK(saved.size() > (needs ? next : l), "fastenc_cpu: saved has too few tensors: ", saved.size());
    for (const size_t i : {l, needs ? next : l}) {
      check_operand(saved[i], x, 2, "saved");
      STD_TORCH_CHECK(saved[i].is_contiguous() && saved[i].size(1) == stack.layers[l].out,
                      "fastenc_cpu: saved must be what encoder_forward returned");
    }
    outs[l] = saved[l].const_data_ptr();
    if (needs) preacts[l] = saved[next++].const_data_ptr();
  }
  return run_backward(grad_out, x, stack, outs, preacts, wanted);
}

std::string configure(std::string isa, bool brgemm) { return fastenc::configure(isa, brgemm); }

double brgemm_gflops(bool bfloat16) { return fastenc::brgemm_gflops(bfloat16); }

}  // namespace

STABLE_TORCH_LIBRARY(fastenc_cpu, m) {
  m.def("dense_forward(Tensor x, Tensor weight, Tensor? bias, int activation, bool save) -> (Tensor, Tensor)");
  m.def(
      "dense_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor saved, int activation, int grad_x, "
      "int grad_weight, int grad_bias) -> (Tensor, Tensor, Tensor)");
  m.def("encoder_forward(Tensor x, Tensor[] weights, Tensor?[] biases, int[] activations, bool save) -> Tensor[]");
  m.def(
      "encoder_backward(Tensor grad_out, Tensor x, Tensor[] weights, Tensor[] saved, int[] activations, int[] wanted) "
      "-> Tensor[]");
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
  m.impl("configure", TORCH_BOX(&configure));
  m.impl("brgemm_gflops", TORCH_BOX(&brgemm_gflops));
}

// Importing fastenc._C only registers the operators.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
