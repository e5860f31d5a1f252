// The encoder's launchers, each run once.
#include <stdexcept>

#include "cuda_case.h"

namespace fastenc::cuda::test {
namespace {

// An eighth of the usual numbers, so that those of a deep stack stay within a half's range.
std::vector<Matrix> weights_of(const Case& c, Buffers& buffers) {
  std::vector<Matrix> weights;
  for (size_t l = 0; l < c.activations.size(); ++l)
    weights.push_back(buffers.input(c, "weight", c.widths.at(l + 1), c.widths.at(l), 0.125f));
  return weights;
}

Grid contiguous(const Case& c, const void* data, int64_t cols) {
  return exact(c.arithmetic, {data, cols, 1}, c.M, cols);
}

}  // namespace

// Where outputs are written they are what the next layer's bounds begin with, else those would widen from layer to
// layer. Every other layer has a bias. "save" wants all outputs and what gelu and silu keep; else only the last output.
std::string encoder_forward_case(const Case& c, Buffers& buffers) {
  const bool save = c.number("save");
  EncoderForward args = {c.arithmetic, c.M, c.widths.at(0), c.depth(), {}, {}};
  args.x = buffers.input(c, "x", c.M, args.K);
  const std::vector<Matrix> weights = weights_of(c, buffers);
  for (int64_t l = 0; l < args.depth; ++l) {
    const int64_t N = c.widths.at(static_cast<size_t>(l + 1));
    const ActivationKind activation = c.activations[static_cast<size_t>(l)];
    args.layers[l] = {N,
                      weights[static_cast<size_t>(l)],
                      c.number("bias") && l % 2 == 0 ? buffers.vector(N) : nullptr,
                      activation,
                      save || l == args.depth - 1 ? buffers.output(c.M * N) : nullptr,
                      save && saves_preact(activation) ? buffers.output(c.M * N) : nullptr};
  }
  if (encoder_forward(args, nullptr)) throw std::runtime_error("a launch failed");

  if (!c.number("check")) return "";
  Grid in = exact(c.arithmetic, args.x, c.M, args.K);
  for (int64_t l = 0; l < args.depth; ++l) {
    const StackLayer& layer = args.layers[l];
    Grid z = product(c.arithmetic, in, exact(c.arithmetic, layer.weight, layer.N, in.cols));
    if (layer.bias) z = with_bias(z, exact(c.arithmetic, {layer.bias, layer.N, 1}, 1, layer.N));
    const Grid out = activate(layer.activation, z);
    const std::string name = "out" + std::to_string(l);
    std::string wrong = layer.preact ? compare(c.arithmetic, "preact", layer.preact, z) : "";
    if (wrong.empty() && layer.out) wrong = compare(c.arithmetic, name.c_str(), layer.out, out);
    if (!wrong.empty()) return wrong;
    in = layer.out ? contiguous(c, layer.out, layer.N) : rounded(c.arithmetic, out);
  }
  return "";
}

// Outputs and pre-activations are of no forward pass, but any numbers; only those are given that must be read.
std::string encoder_backward_case(const Case& c, Buffers& buffers) {
  EncoderBackward args = {};
  args.arithmetic = c.arithmetic;
  args.M = c.M;
  args.K = c.widths.at(0);
  args.depth = c.depth();
  args.x = buffers.input(c, "x", c.M, args.K);
  args.grad_out = buffers.input(c, "grad_out", c.M, c.widths.back());
  args.grad_x = wants_grad_x(c) ? buffers.output(c.M * args.K) : nullptr;
  const std::vector<Matrix> weights = weights_of(c, buffers);
  bool below = wants_grad_x(c);  // whether a gradient of this layer or one below is wanted
  for (int64_t l = 0; l < args.depth; ++l) {
    const int64_t in = c.widths[static_cast<size_t>(l)], N = c.widths[static_cast<size_t>(l + 1)];
    const ActivationKind activation = c.activations[static_cast<size_t>(l)];
    args.grads[l] = {wants_grad_weight(c, l) ? buffers.output(N * in) : nullptr,
                     wants_grad_bias(c, l) ? buffers.output(N) : nullptr};
    below = below || args.grads[l].weight || args.grads[l].bias;
    const bool read_above = l + 1 < args.depth && wants_grad_weight(c, l + 1);
    const auto saved = [&](bool read) -> void* {
      return read ? const_cast<void*>(buffers.saved(c.M, N, "contiguous").data) : nullptr;
    };
    args.layers[l] = {N,
                      weights[static_cast<size_t>(l)],
                      nullptr,
                      activation,
                      saved(read_above || (below && reads_out(activation))),
                      saved(below && saves_preact(activation))};
  }
  args.workspace = buffers.workspace(workspace_bytes(args));
  if (encoder_backward(args, nullptr)) throw std::runtime_error("a launch failed");

  if (!c.number("check")) return "";
  Grid grad = exact(c.arithmetic, args.grad_out, c.M, c.widths.back());
  for (int64_t l = args.depth - 1; l >= 0; --l) {
    const StackLayer& layer = args.layers[l];
    const int64_t in = c.widths[static_cast<size_t>(l)];
    const void* saved = saves_preact(layer.activation) ? layer.preact : layer.out;
    if (layer.activation != ActivationKind::kIdentity) {
      if (!saved) return "";  // nothing of this layer or below is wanted
      grad = differentiate(layer.activation, grad, contiguous(c, saved, layer.N));
    }
    const Grid dz = rounded(c.arithmetic, grad);
    const StackGradients& results = args.grads[l];
    const std::string number = std::to_string(l);
    std::string wrong;
    if (results.weight) {
      const Grid x = l ? contiguous(c, args.layers[l - 1].out, in) : exact(c.arithmetic, args.x, c.M, in);
      wrong = compare(c.arithmetic, ("grad_weight" + number).c_str(), results.weight,
                      product(c.arithmetic, transposed(dz), transposed(x)));
    }
    if (wrong.empty() && results.bias)
      wrong = compare(c.arithmetic, ("grad_bias" + number).c_str(), results.bias, column_sums(grad));
    grad = product(c.arithmetic, dz, transposed(exact(c.arithmetic, layer.weight, layer.N, in)));
    if (wrong.empty() && l == 0 && args.grad_x) wrong = compare(c.arithmetic, "grad_x", args.grad_x, grad);
    if (!wrong.empty()) return wrong;
  }
  return "";
}

}  // namespace fastenc::cuda::test
