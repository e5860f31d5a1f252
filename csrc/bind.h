// From tensors to the kernels' raw pointers: checks, allocation, and what each pass returns. The same text serves
// torch's stable ABI (ops.cpp) and its C++ API (eager.cpp): Tensor is torch::stable::Tensor or at::Tensor, and each
// file defines, before it includes this, for its Tensor
//   Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes)   // contiguous, on the CPU
//   Tensor new_contiguous(const Tensor&)
//   void fill_zero(Tensor&)
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cpu/runtime.h"
#include "cpu/stack.h"
#include "pages.h"

namespace fastenc {

using torch::headeronly::ScalarType;

// The kernels of this process; eager.cpp gets it from ops.cpp, and checks that both were compiled from the same
// structs.
constexpr int64_t kAccessVersion = 4;  // to be raised when a struct of cpu/stack.h changes
struct Access {
  int64_t version;
  const Kernels& (*kernels)();
  Runtime (*runtime)();
  bool (*leaves_to_aten)(int64_t M, int64_t N, int64_t K, bool training, bool in_stack);
};

template <class Tensor>
Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kHalf;
    default: STD_TORCH_CHECK(false, "fastenc: x must be float32, bfloat16 or float16");
  }
}

template <class Tensor>
Matrix matrix(const Tensor& tensor) {
  const auto strides = tensor.strides();
  return {tensor.const_data_ptr(), strides[0], strides[1]};
}

template <class Tensor>
void check_operand(const Tensor& tensor, const Tensor& x, int64_t dim, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), "fastenc: ", name, " must be on the CPU");
  STD_TORCH_CHECK(tensor.dim() == dim, "fastenc: ", name, " must have ", dim, " dimensions, not ", tensor.dim());
  STD_TORCH_CHECK(tensor.scalar_type() == x.scalar_type(), "fastenc: ", name, " must have the dtype of x");
}

// The layers of a call, and the contiguous copies that they may need. Of a bias or a weight that is not read only the
// shape counts.
template <class Tensor>
struct Stack {
  std::vector<Tensor> held;
  std::vector<Layer> layers;

  explicit Stack(size_t depth) {
    held.reserve(2 * depth);
    layers.reserve(depth);
  }

  void add(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t activation,
           bool reads_weight = true) {
    check_operand(weight, x, 2, "weight");
    const int64_t in = layers.empty() ? x.size(1) : layers.back().out, out = weight.size(0);
    STD_TORCH_CHECK(weight.size(1) == in, "fastenc: shapes do not match: input [", x.size(0), ", ", in, "], weight [",
                    out, ", ", weight.size(1), "]");
    STD_TORCH_CHECK(activation >= 0 && activation < static_cast<int64_t>(ActivationKind::kCount),
                    "fastenc: there is no activation number ", activation);
    const void* bias_data = nullptr;
    if (bias.has_value()) {
      check_operand(*bias, x, 1, "bias");
      STD_TORCH_CHECK(bias->size(0) == out, "fastenc: shapes do not match: weight [", out, ", ", in, "], bias [",
                      bias->size(0), "]");
      bias_data = data(*bias);
    }
    layers.push_back(
        {reads_weight ? data(weight) : nullptr, bias_data, in, out, static_cast<ActivationKind>(activation)});
  }

 private:
  const void* data(const Tensor& tensor) {
    if (tensor.is_contiguous()) return tensor.const_data_ptr();
    held.push_back(new_contiguous(tensor));
    return held.back().const_data_ptr();
  }
};

// [rows, columns] of the dtype of x, for the kernels to fill.
template <class Tensor>
Tensor new_matrix(const Tensor& x, int64_t rows, int64_t columns) {
  Tensor matrix = new_empty(x, {rows, columns});
  prefer_huge_pages(matrix.mutable_data_ptr(), rows * columns * static_cast<int64_t>(matrix.element_size()));
  return matrix;
}

// Runs the forward pass. Returns the outputs of all layers, then the pre-activations of those that need them; or,
// unless save, the last output alone.
template <class Tensor>
std::vector<Tensor> run_forward(const Access& access, const Tensor& x, const Stack<Tensor>& stack, bool save) {
  const size_t depth = stack.layers.size();
  const int64_t M = x.size(0);
  std::vector<Tensor> results;
  results.reserve(2 * depth);
  std::vector<void*> pointers(2 * depth, nullptr);
  for (size_t l = save ? 0 : depth - 1; l < depth; ++l) {
    results.push_back(new_matrix(x, M, stack.layers[l].out));
    pointers[l] = results.back().mutable_data_ptr();
  }
  for (size_t l = 0; save && l < depth; ++l) {
    if (!saves_preact(stack.layers[l].activation)) continue;
    results.push_back(new_matrix(x, M, stack.layers[l].out));
    pointers[depth + l] = results.back().mutable_data_ptr();
  }
  if (M > 0)
    access.kernels().forward({dtype_of(x), M, static_cast<int64_t>(depth), stack.layers.data(), matrix(x),
                              pointers.data(), pointers.data() + depth},
                             access.runtime());
  return results;
}

// Runs the backward pass. wanted and the result: grad_x, then grad_weight and grad_bias of each layer; what is not
// wanted is an empty tensor.
template <class Tensor>
std::vector<Tensor> run_backward(const Access& access, const Tensor& grad_out, const Tensor& x,
                                 const Stack<Tensor>& stack, const std::vector<const void*>& outs,
                                 const std::vector<const void*>& preacts, const std::vector<int64_t>& wanted) {
  const size_t depth = stack.layers.size();
  const int64_t M = x.size(0);
  STD_TORCH_CHECK(wanted.size() == 2 * depth + 1, "fastenc: the mask must have ", 2 * depth + 1, " entries, not ",
                  wanted.size());
  check_operand(grad_out, x, 2, "grad_out");
  STD_TORCH_CHECK(grad_out.size(0) == M && grad_out.size(1) == stack.layers.back().out,
                  "fastenc: shapes do not match: grad_out [", grad_out.size(0), ", ", grad_out.size(1), "], output [",
                  M, ", ", stack.layers.back().out, "]");
  std::vector<Tensor> grads;
  grads.reserve(wanted.size());
  std::vector<void*> pointers(wanted.size(), nullptr), grad_weights(depth), grad_biases(depth);
  for (size_t i = 0; i < wanted.size(); ++i) {
    if (!wanted[i]) {
      grads.push_back(new_empty(x, {0}));
      continue;
    }
    if (i == 0)
      grads.push_back(new_matrix(x, M, x.size(1)));
    else if (i % 2 == 1)
      grads.push_back(new_matrix(x, stack.layers[i / 2].out, stack.layers[i / 2].in));
    else
      grads.push_back(new_empty(x, {stack.layers[i / 2 - 1].out}));
    if (M == 0 && i > 0) fill_zero(grads.back());
    pointers[i] = grads.back().mutable_data_ptr();
  }
  for (size_t l = 0; l < depth; ++l) {
    grad_weights[l] = pointers[2 * l + 1];
    grad_biases[l] = pointers[2 * l + 2];
  }
  if (M > 0)
    access.kernels().backward(
        {dtype_of(x), M, static_cast<int64_t>(depth), stack.layers.data(), matrix(x), matrix(grad_out), outs.data(),
         preacts.data(), pointers[0], grad_weights.data(), grad_biases.data()},
        access.runtime());
  return grads;
}

// Whether the gradients read the output of layer l.
template <class Tensor>
bool reads_result(const Stack<Tensor>& stack, size_t l, bool wants_next_weight) {
  return reads_out(stack.layers[l].activation) || (l + 1 < stack.layers.size() && wants_next_weight);
}

// The backward pass from what run_forward returned with save. What the gradients do not read may be left out: any
// tensor of one dimension stands for it.
template <class Tensor>
std::vector<Tensor> run_backward_from(const Access& access, const Tensor& grad_out, const Tensor& x,
                                      const Stack<Tensor>& stack, const Tensor* results, size_t count,
                                      const std::vector<int64_t>& wanted) {
  const size_t depth = stack.layers.size();
  std::vector<const void*> outs(depth, nullptr), preacts(depth, nullptr);
  const auto pointer = [&](size_t i, size_t l) {
    STD_TORCH_CHECK(i < count, "fastenc: results has too few tensors: ", count);
    check_operand(results[i], x, 2, "a result that the gradients read");
    STD_TORCH_CHECK(
        results[i].is_contiguous() && results[i].size(0) == x.size(0) && results[i].size(1) == stack.layers[l].out,
        "fastenc: results must be what the forward pass returned");
    return results[i].const_data_ptr();
  };
  size_t next = depth;
  for (size_t l = 0; l < depth; ++l) {
    const bool wants_next_weight = 2 * l + 3 < wanted.size() && wanted[2 * l + 3] != 0;
    if (reads_result(stack, l, wants_next_weight)) outs[l] = pointer(l, l);
    if (saves_preact(stack.layers[l].activation)) preacts[l] = pointer(next++, l);
  }
  return run_backward(access, grad_out, x, stack, outs, preacts, wanted);
}

}  // namespace fastenc
