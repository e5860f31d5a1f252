// The dense layers' launchers, each run once.
#include "cuda_case.h"

namespace fastenc::cuda::test {

std::string dense_forward_case(const Case& c, Buffers& buffers) {
  const int64_t K = c.widths.at(0), N = c.widths.at(1);
  const Matrix x = buffers.matrix(c.M, K, c.text("x")), weight = buffers.matrix(N, K, c.text("weight"));
  const void* bias = c.number("bias") ? buffers.vector(N) : nullptr;
  void* out = buffers.output(c.M * N);
  void* preact = c.number("save") ? buffers.output(c.M * N) : nullptr;
  const ActivationKind activation = c.activations.at(0);
  const DenseForward args = {c.arithmetic, c.M, N, K, x, weight, bias, activation, out, preact};
  if (dense_forward(args, nullptr)) return "the launch failed";

  if (!c.number("check")) return "";
  Grid z = product(c.arithmetic, exact(c.arithmetic, x, c.M, K), exact(c.arithmetic, weight, N, K));
  if (bias) z = with_bias(z, exact(c.arithmetic, {bias, N, 1}, 1, N));
  std::string wrong = compare(c.arithmetic, "out", out, activate(activation, z));
  if (wrong.empty() && preact) wrong = compare(c.arithmetic, "preact", preact, z);
  return wrong;
}

}  // namespace fastenc::cuda::test
