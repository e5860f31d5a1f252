// The everyday path of the CPU backend: fused layers and their autograd in C++, in one call from Python. torch's stable
// ABI offers no autograd, so this file is built on the C++ API, for one version of torch; with any other, the same
// layers run through autograd Functions in Python (fastenc/functional.py). One dense layer, forward and backward, costs
// 23 us here, 39 us there and 32 us in eager PyTorch (1 x 16 x 16 in one run, AMD EPYC Zen 5, 1 thread).
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

namespace at {

// What bind.h asks for.
Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return detail::empty_cpu(IntArrayRef(sizes), like.scalar_type());
}

Tensor new_contiguous(const Tensor& tensor) { return tensor.contiguous(); }

void fill_zero(Tensor& tensor) { tensor.zero_(); }

}  // namespace at

#include <algorithm>

#include "bind.h"

namespace {

using at::Tensor;
using fastenc::ActivationKind;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using Stack = fastenc::Stack<Tensor>;

const fastenc::Access& kernel_access() {
  static const fastenc::Access* access = [] {
    torch::jit::Stack stack;
    c10::Dispatcher::singleton().findSchemaOrThrow("fastenc_cpu::access", "").callBoxed(stack);
    const auto* found = reinterpret_cast<const fastenc::Access*>(stack.back().toInt());
    TORCH_CHECK(found->version == fastenc::kAccessVersion,
                "fastenc: its two libraries were built from different sources; reinstall fastenc");
    return found;
  }();
  return *access;
}

Tensor activate(const Tensor& z, int64_t activation) {
  switch (static_cast<ActivationKind>(activation)) {
    case ActivationKind::kRelu: return at::relu(z);
    case ActivationKind::kLeakyRelu: return at::leaky_relu(z, fastenc::LeakyRelu::kSlope);
    case ActivationKind::kSigmoid: return at::sigmoid(z);
    case ActivationKind::kTanh: return at::tanh(z);
    case ActivationKind::kGelu: return at::gelu(z);
    case ActivationKind::kGeluTanh: return at::gelu(z, "tanh");
    case ActivationKind::kSilu: return at::silu(z);
    default: return z;
  }
}

// The same in the memory of z, where no gradient follows.
Tensor activate_in_place(Tensor z, int64_t activation) {
  switch (static_cast<ActivationKind>(activation)) {
    case ActivationKind::kRelu: return at::relu_(z);
    case ActivationKind::kLeakyRelu: return at::leaky_relu_(z, fastenc::LeakyRelu::kSlope);
    case ActivationKind::kSigmoid: return at::sigmoid_(z);
    case ActivationKind::kTanh: return at::tanh_(z);
    case ActivationKind::kGelu: return at::gelu_(z);
    case ActivationKind::kGeluTanh: return at::gelu_(z, "tanh");
    case ActivationKind::kSilu: return at::silu_(z);
    default: return z;
  }
}

// grad times the derivative, from ATen operators that can be differentiated again.
Tensor activate_backward(const Tensor& grad, const Tensor& saved, int64_t activation) {
  switch (static_cast<ActivationKind>(activation)) {
    case ActivationKind::kRelu: return at::threshold_backward(grad, saved, 0);
    case ActivationKind::kLeakyRelu: return at::leaky_relu_backward(grad, saved, fastenc::LeakyRelu::kSlope, true);
    case ActivationKind::kSigmoid: return at::sigmoid_backward(grad, saved);
    case ActivationKind::kTanh: return at::tanh_backward(grad, saved);
    case ActivationKind::kGelu: return at::gelu_backward(grad, saved);
    case ActivationKind::kGeluTanh: return at::gelu_backward(grad, saved, "tanh");
    case ActivationKind::kSilu: {
      const Tensor sigmoid = at::sigmoid(saved);  // at::silu_backward has no derivative
      return grad * sigmoid * (1 + saved * (1 - sigmoid));
    }
    default: return grad;
  }
}

std::optional<Tensor> optional(const Tensor& tensor) {
  return tensor.defined() ? std::optional<Tensor>(tensor) : std::nullopt;
}

// The gradient of a stack of layers. Its inputs are x, all weights, then all biases; its outputs are what run_forward
// returns: hidden outputs and pre-activations too, so that a second derivative finds them in the graph. A node of our
// own, as in the code that PyTorch generates for its operators, is lighter than a torch::autograd::Function.
struct StackBackward : public torch::autograd::Node {
  std::vector<int64_t> activations;
  int64_t in = 0, first_out = 0;
  SavedVariable x;  // unset where no gradient reads it
  std::vector<SavedVariable> weights, results;
  std::mutex mutex;

  std::string name() const override { return "FusedStackBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex);
    x.reset_data();
    for (SavedVariable& weight : weights) weight.reset_data();
    for (SavedVariable& result : results) result.reset_data();
  }

  variable_list apply(variable_list&& grad_results) override {
    const std::lock_guard<std::mutex> lock(mutex);
    const size_t depth = activations.size();
    const auto self = getptr();
    const Tensor saved_x = x.unpack(self);
    variable_list saved_weights, saved_results;
    for (const SavedVariable& weight : weights) saved_weights.push_back(weight.unpack(self));
    for (const SavedVariable& result : results) saved_results.push_back(result.unpack(self));
    Tensor grad_out = grad_results[depth - 1];
    // In the order of the kernels: x, then weight and bias of each layer.
    const auto input = [&](size_t i) { return i == 0 ? 0 : i % 2 == 1 ? 1 + i / 2 : depth + i / 2; };
    std::vector<int64_t> wanted(2 * depth + 1);
    for (size_t i = 0; i < wanted.size(); ++i) wanted[i] = task_should_compute_output(input(i));
    variable_list ordered(2 * depth + 1);

    bool only_last = grad_out.defined();
    for (size_t i = 0; i < grad_results.size(); ++i) only_last &= i == depth - 1 || !grad_results[i].defined();
    if (only_last && !at::GradMode::is_enabled()) {
      const auto or_stand_in = [&](const Tensor& tensor, int64_t rows) {
        return tensor.defined() ? tensor : at::new_empty(grad_out, {1, 1}).expand({rows, in});
      };
      const Tensor rows = or_stand_in(saved_x, grad_out.size(0));
      Stack stack(depth);
      stack.add(rows, or_stand_in(saved_weights[0], first_out), std::nullopt, activations[0],
                /* reads_weight */ wanted[0]);
      for (Tensor& result : saved_results)
        if (!result.defined()) result = at::new_empty(grad_out, {0});
      for (size_t l = 1; l < depth; ++l) stack.add(rows, saved_weights[l], std::nullopt, activations[l]);
      variable_list grads = fastenc::run_backward_from(kernel_access(), grad_out, rows, stack, saved_results.data(),
                                                       saved_results.size(), wanted);
      for (size_t i = 0; i < grads.size(); ++i)
        if (wanted[i]) ordered[input(i)] = std::move(grads[i]);
      return ordered;
    }

    // To be differentiated again, or with gradients of hidden outputs: by formulas in ATen.
    size_t preact = grad_results.size();
    for (size_t l = depth; l-- > 0;) {
      const bool from_preact = fastenc::saves_preact(static_cast<ActivationKind>(activations[l]));
      if (from_preact) --preact;
      Tensor grad = from_preact ? grad_results[preact] : Tensor();
      if (grad_out.defined()) {
        const Tensor from_out = activate_backward(grad_out, saved_results[from_preact ? preact : l], activations[l]);
        grad = grad.defined() ? grad + from_out : from_out;
      }
      grad_out = l > 0 ? grad_results[l - 1] : Tensor();
      if (!grad.defined()) continue;
      if (wanted[2 * l + 1]) ordered[input(2 * l + 1)] = grad.t().mm(l > 0 ? saved_results[l - 1] : saved_x);
      if (wanted[2 * l + 2]) ordered[input(2 * l + 2)] = grad.sum(0);
      if (std::none_of(wanted.begin(), wanted.begin() + 2 * l + 1, [](int64_t want) { return want != 0; })) continue;
      const Tensor below = grad.mm(saved_weights[l]);
      if (l == 0)
        ordered[0] = below;
      else
        grad_out = grad_out.defined() ? grad_out + below : below;
    }
    return ordered;
  }
};

// The last output of the stack, with its gradient. weights and biases (undefined: none) in lists of their own.
Tensor run_with_gradient(const Tensor& x, at::TensorList weights, at::TensorList biases, at::IntArrayRef activations) {
  const size_t depth = activations.size();
  variable_list results;
  Stack stack(depth);
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    for (size_t l = 0; l < depth; ++l) stack.add(x, weights[l], optional(biases[l]), activations[l]);
    results = fastenc::run_forward(kernel_access(), x, stack, /* save */ true);
  }
  const auto node = c10::make_intrusive<StackBackward>();
  node->set_next_edges(torch::autograd::collect_next_edges(x, weights, biases));
  node->activations = activations.vec();
  node->in = x.size(1);
  node->first_out = weights[0].size(0);
  torch::autograd::set_history(results, node);
  // The gradients read x only for the first weight's, and the first weight only for x's; what they do not read may
  // change or be freed, as with nn.Linear.
  if (weights[0].requires_grad()) node->x = SavedVariable(x, /* is_output */ false);
  node->weights.reserve(depth);
  node->results.reserve(results.size());
  for (size_t l = 0; l < depth; ++l)
    node->weights.emplace_back(l > 0 || x.requires_grad() ? weights[l] : Tensor(), /* is_output */ false);
  for (size_t i = 0; i < results.size(); ++i) {
    const bool read = i >= depth || fastenc::reads_result(stack, i, i + 1 < depth && weights[i + 1].requires_grad());
    node->results.emplace_back(read ? results[i] : Tensor(), /* is_output */ true);
  }
  return results[depth - 1];
}

// Whether all of keys is in allowed; operator- would keep the bit of the backend.
bool only(c10::DispatchKeySet keys, c10::DispatchKeySet allowed) {
  return (keys.raw_repr() & ~allowed.raw_repr()) == 0;
}

// A dense CPU tensor with nothing special about it: no subclass, transform, functional or quantised wrapper.
bool is_plain(const Tensor& tensor, at::ScalarType dtype) {
  constexpr c10::DispatchKeySet kPlain({c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU,
                                        c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::AutocastCPU});
  return tensor.is_cpu() && tensor.scalar_type() == dtype && only(tensor.key_set(), kPlain) &&
         tensor.layout() == at::kStrided;
}

// Whether the kernels take these arguments now, as fastenc/backends/cpu.py's why_not says in words.
bool is_eligible(const Tensor& x, at::TensorList weights, at::TensorList biases) {
  const at::ScalarType dtype = x.scalar_type();
  if (dtype != at::kFloat && dtype != at::kBFloat16 && dtype != at::kHalf) return false;
  if (!is_plain(x, dtype) || x.dim() == 0 || x.is_mkldnn()) return false;
  constexpr c10::DispatchKeySet kHarmless(
      {c10::DispatchKey::BackendSelect, c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::AutocastCPU});
  if (!only(c10::impl::tls_local_dispatch_key_set().included_, kHarmless)) return false;  // a mode or transform
  int64_t width = x.size(-1);
  for (size_t l = 0; l < weights.size(); ++l) {
    const Tensor& weight = weights[l];
    if (!is_plain(weight, dtype) || weight.dim() != 2 || weight.size(1) != width) return false;
    width = weight.size(0);
    if (biases[l].defined() && (!is_plain(biases[l], dtype) || biases[l].dim() != 1 || biases[l].size(0) != width))
      return false;
  }
  return true;
}

bool any_requires_grad(at::TensorList tensors) {
  return std::any_of(tensors.begin(), tensors.end(),
                     [](const Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); });
}

Tensor run_stack(const Tensor& x, at::TensorList parameters, at::IntArrayRef activations);

// Layers [first, end) of the stack.
Tensor run_part(const Tensor& x, at::TensorList parameters, at::IntArrayRef activations, size_t first, size_t end) {
  const size_t depth = activations.size(), count = end - first;
  variable_list part(parameters.begin() + first, parameters.begin() + end);
  part.insert(part.end(), parameters.begin() + depth + first, parameters.begin() + depth + end);
  return run_stack(x, part, activations.slice(first, count));
}

Tensor run_stack(const Tensor& x, at::TensorList parameters, at::IntArrayRef activations) {
  const size_t depth = activations.size();
  const at::TensorList weights = parameters.slice(0, depth), biases = parameters.slice(depth, depth);
  if (!is_eligible(x, weights, biases)) {
    Tensor out = x;
    for (size_t l = 0; l < depth; ++l) out = activate(at::linear(out, weights[l], optional(biases[l])), activations[l]);
    return out;
  }
  if (x.scalar_type() == at::kFloat && x.numel() > 0) {
    const bool training = at::GradMode::is_enabled() && (x.requires_grad() || any_requires_grad(parameters));
    const int64_t rows = x.numel() / x.size(-1);
    const auto leaves = [&](size_t l) {
      return kernel_access().leaves_to_aten(rows, weights[l].size(0), weights[l].size(1), training, depth > 1);
    };
    // What lies between layers is let go as soon as it has been read: its memory, still in the cache, is the next
    // one's.
    Tensor out = x;
    size_t done = 0;
    for (size_t l = 0; l < depth; ++l) {
      if (!leaves(l)) continue;
      if (done < l) out = run_part(out, parameters, activations, done, l);
      out = at::linear(out, weights[l], optional(biases[l]));
      out = training ? activate(out, activations[l]) : activate_in_place(std::move(out), activations[l]);
      done = l + 1;
    }
    if (done > 0) return done == depth ? out : run_part(out, parameters, activations, done, depth);
  }
  Tensor rows = x.dim() == 2 ? x : x.reshape({c10::multiply_integers(x.sizes().slice(0, x.dim() - 1)), x.size(-1)});
  // What lies below the first layer that has a gradient needs none, and saves nothing.
  size_t first = depth;
  if (at::GradMode::is_enabled()) {
    const auto needs_grad = [&](size_t l) {
      return weights[l].requires_grad() || (biases[l].defined() && biases[l].requires_grad());
    };
    first = 0;
    if (!rows.requires_grad())
      while (first < depth && !needs_grad(first)) ++first;
  }
  if (first > 0) {
    at::AutoDispatchBelowADInplaceOrView guard;
    Stack stack(first);
    for (size_t l = 0; l < first; ++l) stack.add(rows, weights[l], optional(biases[l]), activations[l]);
    rows = fastenc::run_forward(kernel_access(), rows, stack, /* save */ false)[0];
  }
  if (first < depth)
    rows = run_with_gradient(rows, weights.slice(first), biases.slice(first), activations.slice(first));
  if (x.dim() == 2) return rows;
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = weights.back().size(0);
  return rows.view(sizes);
}

Tensor run_with_autocast(const Tensor& x, variable_list parameters, at::IntArrayRef activations) {
  if (!at::autocast::is_autocast_enabled(at::kCPU)) return run_stack(x, parameters, activations);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(at::kCPU);
  for (Tensor& parameter : parameters)
    if (parameter.defined()) parameter = at::autocast::cached_cast(dtype, parameter, at::kCPU);
  const Tensor cast_x = at::autocast::cached_cast(dtype, x, at::kCPU);
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCPU);
  return run_stack(cast_x, parameters, activations);
}

Tensor dense(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t activation) {
  return run_with_autocast(x, {weight, bias.value_or(Tensor())}, {activation});
}

Tensor encoder(const Tensor& x, at::TensorList weights, const c10::List<std::optional<Tensor>>& biases,
               at::IntArrayRef activations) {
  TORCH_CHECK(!weights.empty() && weights.size() == biases.size() && weights.size() == activations.size(),
              "fastenc: as many weights, biases and activations are needed, at least one; got ", weights.size(), ", ",
              biases.size(), " and ", activations.size());
  variable_list parameters(weights.begin(), weights.end());
  parameters.reserve(2 * weights.size());
  for (size_t l = 0; l < biases.size(); ++l) parameters.push_back(biases.get(l).value_or(Tensor()));
  return run_with_autocast(x, std::move(parameters), activations);
}

}  // namespace

// Composite: what the kernels do not take, and what a mode or subclass looks at, is ATen's operators.
TORCH_LIBRARY(fastenc_eager, m) {
  m.def("dense(Tensor x, Tensor weight, Tensor? bias, int activation) -> Tensor", dense);
  m.def("encoder(Tensor x, Tensor[] weights, Tensor?[] biases, int[] activations) -> Tensor", encoder);
}
