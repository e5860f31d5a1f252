// The CUDA kernels as PyTorch operators in the namespace fastenc_cuda, on torch's stable ABI: one build serves every
// torch from 2.13 on with the same major version of CUDA. fastenc/backends/cuda.py calls them.
//
// Each runs on its tensors' device and that device's current stream, waits for nothing, and allocates by PyTorch alone,
// so that it can be captured in a CUDA graph. Compiled by a C++ compiler over csrc/simt, for tests, the same operators
// take CPU tensors.
#include <torch/csrc/stable/library.h>

#include "bind.h"

namespace fastenc::cuda::operators {

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

Tensor allocate_if(bool wanted, const Tensor& like, std::initializer_list<int64_t> sizes) {
  return wanted ? allocate(like, sizes) : allocate(like, {0});
}

template <class Args>
Tensor workspace(const Args& args, const Tensor& like) {
  return allocate(like, {workspace_bytes(args)}, ScalarType::Byte);
}

std::tuple<Tensor, Tensor> dense_forward(Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t activation,
                                         bool save, bool tf32) {
  Stack stack(x, tf32);
  stack.add(x, weight, bias, activation);
  const StackLayer& layer = stack.layers[0];
  const OnDeviceOf device(x);
  Tensor out = allocate(x, {stack.M, layer.N});
  Tensor preact = allocate_if(save && saves_preact(layer.activation), x, {stack.M, layer.N});
  const DenseForward args = {stack.arithmetic, stack.M,    layer.N,          stack.K,      matrix(x),
                             layer.weight,     layer.bias, layer.activation, pointer(out), pointer(preact)};
  if (!stack.is_empty()) check(cuda::dense_forward(args, device.stream()), "dense_forward");
  return {out, preact};
}

// dZ and the sums of its columns.
std::tuple<Tensor, Tensor> preact_gradient(Tensor grad_out, Tensor saved, int64_t activation, bool grad_preact,
                                           bool grad_bias) {
  check_operand(grad_out, grad_out, 2, "grad_out");
  const int64_t M = grad_out.size(0), N = grad_out.size(1);
  check_matrix(saved, grad_out, M, N, "saved");
  const OnDeviceOf device(grad_out);
  Tensor dz = allocate_if(grad_preact, grad_out, {M, N}), sums = allocate_if(grad_bias, grad_out, {N});
  PreactGradient args = {arithmetic_of(grad_out, /* tf32 */ false),
                         M,
                         N,
                         matrix(grad_out),
                         matrix(saved),
                         activation_of(activation),
                         pointer(dz),
                         pointer(sums),
                         /* workspace */ nullptr};
  if (M == 0 && grad_bias) torch::stable::zero_(sums);
  if (M > 0 && N > 0) {
    Tensor work = workspace(args, grad_out);
    args.workspace = pointer(work);
    check(cuda::preact_gradient(args, device.stream()), "preact_gradient");
  }
  return {dz, sums};
}

// The gradients of x, then of each layer's weight and bias; what is not wanted is an empty tensor.
struct StackResults {
  std::vector<Tensor> grads;

  StackResults(const Tensor& x, const Stack& stack, const std::vector<int64_t>& wanted) {
    const size_t depth = stack.layers.size();
    STD_TORCH_CHECK(wanted.size() == 2 * depth + 1, "fastenc: the mask must have ", 2 * depth + 1, " entries, not ",
                    wanted.size());
    grads.push_back(allocate_if(wanted[0], x, {stack.M, stack.K}));
    for (size_t l = 0; l < depth; ++l) {
      const int64_t in = l == 0 ? stack.K : stack.layers[l - 1].N, out = stack.layers[l].N;
      grads.push_back(allocate_if(wanted[2 * l + 1], x, {out, in}));
      grads.push_back(allocate_if(wanted[2 * l + 2], x, {out}));
    }
    if (stack.is_empty())
      for (Tensor& grad : grads) torch::stable::zero_(grad);
  }
};

void run_backward(const Tensor& grad_out, const Tensor& x, const Stack& stack, std::vector<Tensor>& grads,
                  Stream stream) {
  const size_t depth = stack.layers.size();
  stack.check_narrow();
  EncoderBackward args = {stack.arithmetic, stack.M,
                          stack.K,          static_cast<int64_t>(depth),
                          matrix(x),        matrix(grad_out),
                          /* layers */ {},  pointer(grads[0]),
                          /* grads */ {},   /* workspace */ nullptr};
  for (size_t l = 0; l < depth; ++l) {
    args.layers[l] = stack.layers[l];
    args.grads[l] = {pointer(grads[2 * l + 1]), pointer(grads[2 * l + 2])};
  }
  Tensor work = workspace(args, x);
  args.workspace = pointer(work);
  check(cuda::encoder_backward(args, stream), "encoder_backward");
}

Gradients dense_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor saved, int64_t activation, int64_t grad_x,
                         int64_t grad_weight, int64_t grad_bias, bool tf32) {
  Stack stack(x, tf32);
  stack.add(x, weight, std::nullopt, activation);
  StackLayer& layer = stack.layers[0];
  check_matrix(grad_out, x, stack.M, layer.N, "grad_out");
  check_matrix(saved, x, stack.M, layer.N, "saved");
  const OnDeviceOf device(x);
  std::vector<Tensor> grads = StackResults(x, stack, {grad_x, grad_weight, grad_bias}).grads;
  if (!stack.is_empty() && layer.N <= kWidest) {
    // Not written to, as no pass forward is made.
    void* kept = layer.activation == ActivationKind::kIdentity ? nullptr : const_cast<void*>(stack.contiguous(saved));
    (saves_preact(layer.activation) ? layer.preact : layer.out) = kept;
    run_backward(grad_out, x, stack, grads, device.stream());
  } else if (!stack.is_empty()) {
    DenseBackward args = {stack.arithmetic,       stack.M,           layer.N,           stack.K,
                          matrix(grad_out),       matrix(x),         layer.weight,      matrix(saved),
                          layer.activation,       pointer(grads[0]), pointer(grads[1]), pointer(grads[2]),
                          /* workspace */ nullptr};
    Tensor work = workspace(args, x);
    args.workspace = pointer(work);
    check(cuda::dense_backward(args, device.stream()), "dense_backward");
  }
  return {grads[0], grads[1], grads[2]};
}

void check_lists(size_t weights, size_t biases, size_t activations) {
  STD_TORCH_CHECK(weights > 0 && weights == biases && weights == activations,
                  "fastenc: as many weights, biases and activations are needed, at least one; got ", weights, ", ",
                  biases, " and ", activations);
}

// The outputs of all layers, then the pre-activations of those that need them; or, unless save, the last output alone.
std::vector<Tensor> encoder_forward(Tensor x, std::vector<Tensor> weights, std::vector<std::optional<Tensor>> biases,
                                    std::vector<int64_t> activations, bool save, bool tf32) {
  check_lists(weights.size(), biases.size(), activations.size());
  const size_t depth = weights.size();
  Stack stack(x, tf32);
  for (size_t l = 0; l < depth; ++l) stack.add(x, weights[l], biases[l], activations[l]);
  stack.check_narrow();
  const OnDeviceOf device(x);
  std::vector<Tensor> results;
  for (size_t l = save ? 0 : depth - 1; l < depth; ++l) {
    results.push_back(allocate(x, {stack.M, stack.layers[l].N}));
    stack.layers[l].out = pointer(results.back());
  }
  for (size_t l = 0; save && l < depth; ++l) {
    if (!saves_preact(stack.layers[l].activation)) continue;
    results.push_back(allocate(x, {stack.M, stack.layers[l].N}));
    stack.layers[l].preact = pointer(results.back());
  }
  EncoderForward args = {stack.arithmetic, stack.M, stack.K, static_cast<int64_t>(depth), matrix(x), /* layers */ {}};
  std::copy(stack.layers.begin(), stack.layers.end(), args.layers);
  if (!stack.is_empty()) check(cuda::encoder_forward(args, device.stream()), "encoder_forward");
  return results;
}

// results: what encoder_forward returned with save. What the gradients do not read may be left out: any tensor of one
// dimension stands for it.
std::vector<Tensor> encoder_backward(Tensor grad_out, Tensor x, std::vector<Tensor> weights,
                                     std::vector<Tensor> results, std::vector<int64_t> activations,
                                     std::vector<int64_t> wanted, bool tf32) {
  check_lists(weights.size(), weights.size(), activations.size());
  const size_t depth = weights.size();
  Stack stack(x, tf32);
  for (size_t l = 0; l < depth; ++l) stack.add(x, weights[l], std::nullopt, activations[l]);
  stack.check_narrow();
  check_matrix(grad_out, x, stack.M, stack.layers.back().N, "grad_out");
  const OnDeviceOf device(x);
  std::vector<Tensor> grads = StackResults(x, stack, wanted).grads;
  const auto kept = [&](size_t i, int64_t N) {
    STD_TORCH_CHECK(i < results.size(), "fastenc: results has too few tensors: ", results.size());
    check_matrix(results[i], x, stack.M, N, "a result that the gradients read");
    return const_cast<void*>(stack.contiguous(results[i]));  // as in dense_backward
  };
  size_t next = depth;
  for (size_t l = 0; l < depth; ++l) {
    StackLayer& layer = stack.layers[l];
    const bool wants_next_weight = l + 1 < depth && wanted[2 * l + 3];
    if (reads_out(layer.activation) || wants_next_weight) layer.out = kept(l, layer.N);
    if (saves_preact(layer.activation)) layer.preact = kept(next++, layer.N);
  }
  if (!stack.is_empty()) run_backward(grad_out, x, stack, grads, device.stream());
  return grads;
}

}  // namespace fastenc::cuda::operators

STABLE_TORCH_LIBRARY(fastenc_cuda, m) {
  m.def(
      "dense_forward(Tensor x, Tensor weight, Tensor? bias, int activation, bool save, bool tf32) -> (Tensor, Tensor)");
  m.def(
      "dense_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor saved, int activation, int grad_x, "
      "int grad_weight, int grad_bias, bool tf32) -> (Tensor, Tensor, Tensor)");
  m.def(
      "preact_gradient(Tensor grad_out, Tensor saved, int activation, bool grad_preact, bool grad_bias) "
      "-> (Tensor, Tensor)");
  m.def(
      "encoder_forward(Tensor x, Tensor[] weights, Tensor?[] biases, int[] activations, bool save, bool tf32) "
      "-> Tensor[]");
  m.def(
      "encoder_backward(Tensor grad_out, Tensor x, Tensor[] weights, Tensor[] results, int[] activations, "
      "int[] wanted, bool tf32) -> Tensor[]");
}

#ifdef __CUDACC__
STABLE_TORCH_LIBRARY_IMPL(fastenc_cuda, CUDA, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(fastenc_cuda, CPU, m) {
#endif
  m.impl("dense_forward", TORCH_BOX(&fastenc::cuda::operators::dense_forward));
  m.impl("dense_backward", TORCH_BOX(&fastenc::cuda::operators::dense_backward));
  m.impl("preact_gradient", TORCH_BOX(&fastenc::cuda::operators::preact_gradient));
  m.impl("encoder_forward", TORCH_BOX(&fastenc::cuda::operators::encoder_forward));
  m.impl("encoder_backward", TORCH_BOX(&fastenc::cuda::operators::encoder_backward));
}

#ifdef __CUDACC__
#include <Python.h>

// Importing fastenc._C_cuda only registers the operators.
PyMODINIT_FUNC PyInit__C_cuda() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
#endif
