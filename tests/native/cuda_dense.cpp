// The dense layers' launchers, each run once.
#include <cmath>
#include <initializer_list>
#include <stdexcept>

#include "cuda_case.h"

namespace fastenc::cuda::test {
namespace {

void check(Status status) {
  if (status) throw std::runtime_error("a launch failed");
}

std::string first(std::initializer_list<std::string> words) {
  for (const std::string& word : words)
    if (!word.empty()) return word;
  return "";
}

// The words of compare(), or none where the result was not wanted.
std::string compare_wanted(Arithmetic arithmetic, const char* name, const void* result, const Grid& expected) {
  return result ? compare(arithmetic, name, result, expected) : "";
}

}  // namespace

std::string dense_forward_case(const Case& c, Buffers& buffers) {
  const int64_t M = c.M, K = c.widths.at(0), N = c.widths.at(1);
  const ActivationKind activation = c.activations.at(0);
  const Matrix x = buffers.input(c, "x", M, K), weight = buffers.input(c, "weight", N, K);
  const void* bias = c.number("bias") ? buffers.vector(N) : nullptr;
  void* out = buffers.output(M * N);
  void* preact = c.number("save") ? buffers.output(M * N) : nullptr;
  check(dense_forward({c.arithmetic, M, N, K, x, weight, bias, activation, out, preact}, nullptr));

  if (!c.number("check")) return "";
  Grid z = product(c.arithmetic, exact(c.arithmetic, x, M, K), exact(c.arithmetic, weight, N, K));
  if (bias) z = with_bias(z, exact(c.arithmetic, {bias, N, 1}, 1, N));
  return first(
      {compare_wanted(c.arithmetic, "preact", preact, z), compare(c.arithmetic, "out", out, activate(activation, z))});
}

std::string preact_gradient_case(const Case& c, Buffers& buffers) {
  const int64_t M = c.M, N = c.widths.at(1);
  const ActivationKind activation = c.activations.at(0);
  const Matrix grad_out = buffers.input(c, "grad_out", M, N), saved = buffers.saved(M, N, c.text("saved"));
  void* grad_preact = wants_grad_x(c) ? buffers.output(M * N) : nullptr;
  void* grad_bias = wants_grad_bias(c, 0) ? buffers.output(N) : nullptr;
  PreactGradient args = {c.arithmetic, M, N, grad_out, saved, activation, grad_preact, grad_bias, nullptr};
  args.workspace = buffers.workspace(workspace_bytes(args));
  check(preact_gradient(args, nullptr));

  if (!c.number("check")) return "";
  const Grid grad = differentiate(activation, exact(c.arithmetic, grad_out, M, N), exact(c.arithmetic, saved, M, N));
  return first({compare_wanted(c.arithmetic, "grad_preact", grad_preact, grad),
                compare_wanted(c.arithmetic, "grad_bias", grad_bias, column_sums(grad))});
}

std::string dense_backward_case(const Case& c, Buffers& buffers) {
  const int64_t M = c.M, K = c.widths.at(0), N = c.widths.at(1);
  const ActivationKind activation = c.activations.at(0);
  const Matrix grad_out = buffers.input(c, "grad_out", M, N), saved = buffers.saved(M, N, c.text("saved"));
  const Matrix x = buffers.input(c, "x", M, K), weight = buffers.input(c, "weight", N, K);
  void* grad_x = wants_grad_x(c) ? buffers.output(M * K) : nullptr;
  void* grad_weight = wants_grad_weight(c, 0) ? buffers.output(N * K) : nullptr;
  void* grad_bias = wants_grad_bias(c, 0) ? buffers.output(N) : nullptr;
  DenseBackward args = {c.arithmetic, M,          N,      K,           grad_out,  x,      weight,
                        saved,        activation, grad_x, grad_weight, grad_bias, nullptr};
  args.workspace = buffers.workspace(workspace_bytes(args));
  check(dense_backward(args, nullptr));

  if (!c.number("check")) return "";
  const Grid grad = differentiate(activation, exact(c.arithmetic, grad_out, M, N), exact(c.arithmetic, saved, M, N));
  const Grid dz = rounded(c.arithmetic, grad);
  const auto weights = transposed(exact(c.arithmetic, weight, N, K)), rows = exact(c.arithmetic, x, M, K);
  return first({compare_wanted(c.arithmetic, "grad_x", grad_x, product(c.arithmetic, dz, weights)),
                compare_wanted(c.arithmetic, "grad_weight", grad_weight,
                               product(c.arithmetic, transposed(dz), transposed(rows))),
                compare_wanted(c.arithmetic, "grad_bias", grad_bias, column_sums(grad))});
}

std::string weight_partials_case(const Case& c, Buffers& buffers) {
  const int64_t M = c.M, K = c.widths.at(0), N = c.widths.at(1), parts = weight_parts(M, N, K);
  const Matrix grad_preact = buffers.input(c, "grad_out", M, N), x = buffers.input(c, "x", M, K);
  auto* partials = static_cast<float*>(buffers.output_bytes(parts * N * K * 4));
  check(weight_partials({c.arithmetic, M, N, K, grad_preact, x, partials}, nullptr));

  if (!c.number("check")) return "";
  // All parts added up in double precision: their own errors are within those of the whole sum.
  Grid sum = product(c.arithmetic, transposed(exact(c.arithmetic, grad_preact, M, N)),
                     transposed(exact(c.arithmetic, x, M, K)));
  for (int64_t i = 0; i < N * K; ++i) {
    double total = 0;
    for (int64_t part = 0; part < parts; ++part) total += static_cast<double>(partials[part * N * K + i]);
    const Bounded& wanted = sum.values[static_cast<size_t>(i)];
    if (!(std::abs(total - wanted.value) <= wanted.error))
      return "partials[" + std::to_string(i) + "] add up to " + std::to_string(total) + ", not " +
             std::to_string(wanted.value);
  }
  return "";
}

// M parts; a sum for each of the widths.
std::string reduce_case(const Case& c, Buffers& buffers) {
  Buffers floats(Arithmetic::kIeee, static_cast<uint64_t>(c.number("seed")), c.number("integers") != 0);
  Reduce args = {c.arithmetic, static_cast<int64_t>(c.widths.size()), {}};
  for (int64_t s = 0; s < args.sums; ++s) {
    const int64_t count = c.widths[static_cast<size_t>(s)];
    const Matrix partials = floats.matrix(c.M, count, "padded");
    args.sum[s] = {static_cast<const float*>(partials.data), c.M, partials.row_stride, buffers.output(count), count};
  }
  check(reduce(args, nullptr));

  if (!c.number("check")) return "";
  for (int64_t s = 0; s < args.sums; ++s) {
    const PartialSums& sum = args.sum[s];
    const Grid partials = exact(Arithmetic::kIeee, {sum.partials, sum.stride, 1}, sum.parts, sum.count);
    const std::string wrong = compare(c.arithmetic, "out", sum.out, column_sums(partials));
    if (!wrong.empty()) return wrong;
  }
  return "";
}

}  // namespace fastenc::cuda::test
