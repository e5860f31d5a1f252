// What results must be: loops in double precision that carry, beside each number, how far fp32 sums in any order and
// the roundings of the number types may take a right kernel from it. Nothing of the kernels' is used.
#include <cmath>
#include <string>

#include "cuda_case.h"

namespace fastenc::cuda::test {
namespace {

constexpr double kUnit = 0x1p-24;  // the unit roundoff of fp32

// Half the distance to the next number of the type, relative, and the same where numbers are subnormal.
struct Roundoff {
  double relative, least, most;  // beyond `most` it may be Inf, and nothing is known of what follows
};
Roundoff roundoff(Arithmetic arithmetic) {
  switch (arithmetic) {
    case Arithmetic::kHalf: return {0x1p-11, 0x1p-25, 65504};
    case Arithmetic::kBFloat16: return {0x1p-8, 0x1p-134, 0x1p127};
    default: return {kUnit, 0x1p-150, 0x1p127};
  }
}

double value_of(ActivationKind activation, double z) {
  switch (activation) {
    case ActivationKind::kRelu: return z <= 0 ? 0 : z;
    case ActivationKind::kLeakyRelu: return z > 0 ? z : z * 0.01;
    case ActivationKind::kSigmoid: return 1 / (1 + std::exp(-z));
    case ActivationKind::kTanh: return std::tanh(z);
    case ActivationKind::kGelu: return z * std::erfc(-z * M_SQRT1_2) / 2;
    case ActivationKind::kGeluTanh: return z / 2 * (1 + std::tanh(M_2_SQRTPI * M_SQRT1_2 * (z + 0.044715 * z * z * z)));
    case ActivationKind::kSilu: return z / (1 + std::exp(-z));
    default: return z;
  }
}

double derivative_of(ActivationKind activation, double saved) {
  const double x = saved;
  switch (activation) {
    case ActivationKind::kLeakyRelu: return x > 0 ? 1 : 0.01;
    case ActivationKind::kSigmoid: return x * (1 - x);
    case ActivationKind::kTanh: return 1 - x * x;
    case ActivationKind::kGelu: return std::erfc(-x * M_SQRT1_2) / 2 + x * std::exp(-x * x / 2) / std::sqrt(2 * M_PI);
    case ActivationKind::kGeluTanh: {
      const double beta = M_2_SQRTPI * M_SQRT1_2, t = std::tanh(beta * (x + 0.044715 * x * x * x));
      return (1 + t) / 2 + x / 2 * (1 - t * t) * beta * (1 + 3 * 0.044715 * x * x);
    }
    case ActivationKind::kSilu: {
      const double s = 1 / (1 + std::exp(-x));
      return s * (1 + x * (1 - s));
    }
    default: return 1;
  }
}

// Where the value is NaN or Inf a result must be just that. Where only the error is, nothing is known.
Bounded bounded(double value, double error) {
  return {value, !std::isfinite(value) ? 0 : std::isnan(error) ? INFINITY : error};
}

bool is_within(double actual, const Bounded& wanted) {
  if (std::isnan(wanted.value)) return std::isnan(actual);
  return std::isinf(wanted.error) || actual == wanted.value || std::abs(actual - wanted.value) <= wanted.error;
}

// What tensor cores make of fp32 operands; 16-bit ones are taken as they are.
Grid as_operand(Arithmetic arithmetic, Grid a) {
  if (arithmetic != Arithmetic::kTf32) return a;
  for (Bounded& x : a.values) x = bounded(x.value, x.error + 0x1p-11 * (std::abs(x.value) + x.error));
  return a;
}

}  // namespace

Grid exact(Arithmetic arithmetic, const Matrix& matrix, int64_t rows, int64_t cols) {
  Grid grid = {rows, cols, {}};
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c)
      grid.values.push_back({read(arithmetic, matrix.data, r * matrix.row_stride + c * matrix.col_stride), 0});
  return grid;
}

Grid transposed(const Grid& a) {
  Grid grid = {a.cols, a.rows, {}};
  for (int64_t c = 0; c < a.cols; ++c)
    for (int64_t r = 0; r < a.rows; ++r) grid.values.push_back(a.at(r, c));
  return grid;
}

Grid product(Arithmetic arithmetic, const Grid& a, const Grid& b) {
  const Grid left = as_operand(arithmetic, a), right = as_operand(arithmetic, b);
  // A term is rounded once as a product and in at most all additions of the sum, partial sums and a bias included.
  const double gamma = 1.01 * kUnit * static_cast<double>(a.cols + 2);
  Grid grid = {a.rows, b.rows, {}};
  for (int64_t r = 0; r < a.rows; ++r)
    for (int64_t c = 0; c < b.rows; ++c) {
      Bounded sum;
      double magnitude = 0;
      for (int64_t k = 0; k < a.cols; ++k) {
        const Bounded &x = left.at(r, k), &y = right.at(c, k);
        sum.value += x.value * y.value;
        sum.error += std::abs(x.value) * y.error + x.error * std::abs(y.value) + x.error * y.error;
        magnitude += (std::abs(x.value) + x.error) * (std::abs(y.value) + y.error);
      }
      grid.values.push_back(bounded(sum.value, sum.error + gamma * magnitude));
    }
  return grid;
}

Grid column_sums(const Grid& a) {
  Grid ones = {1, a.rows, std::vector<Bounded>(static_cast<size_t>(a.rows), Bounded{1, 0})};
  return product(Arithmetic::kIeee, ones, transposed(a));
}

Grid with_bias(Grid z, const Grid& bias) {
  for (int64_t r = 0; r < z.rows; ++r)
    for (int64_t c = 0; c < z.cols; ++c) {
      Bounded& x = z.at(r, c);
      x.value += bias.at(0, c).value;
      x = bounded(x.value, x.error + kUnit * (std::abs(x.value) + x.error));
    }
  return z;
}

Grid activate(ActivationKind activation, Grid z) {
  for (Bounded& x : z.values) {
    const double value = value_of(activation, x.value);
    // No slope exceeds 1.13; the formulas have fewer than 16 roundings of numbers no larger than these.
    const bool rounds = activation != ActivationKind::kIdentity && activation != ActivationKind::kRelu;
    const double size = std::isfinite(x.value) ? std::abs(x.value) + x.error : 0;
    x = bounded(value, 1.13 * x.error + (rounds ? 16 * kUnit * (size + std::abs(value)) : 0));
  }
  return z;
}

Grid differentiate(ActivationKind activation, Grid grad, const Grid& saved) {
  for (size_t i = 0; i < grad.values.size(); ++i) {
    Bounded& x = grad.values[i];
    if (activation == ActivationKind::kIdentity) continue;
    if (activation == ActivationKind::kRelu) {
      if (saved.values[i].value <= 0) x = {};  // even of Inf
      continue;
    }
    const double s = saved.values[i].value, slope = derivative_of(activation, s);
    const double slope_error = 16 * kUnit * (1 + std::abs(slope) + s * s);
    x = bounded(x.value * slope, x.error * std::abs(slope) + (std::abs(x.value) + x.error) * slope_error);
  }
  return grad;
}

Grid rounded(Arithmetic arithmetic, Grid a) {
  const Roundoff unit = roundoff(arithmetic);
  for (Bounded& x : a.values) {
    if (!std::isfinite(x.value)) continue;
    x.error += unit.relative * (std::abs(x.value) + x.error) + unit.least;
    if (std::abs(x.value) + x.error > unit.most) x.error = INFINITY;
  }
  return a;
}

std::string compare(Arithmetic arithmetic, const char* name, const void* result, const Grid& expected) {
  const Grid bounds = rounded(arithmetic, expected);
  for (int64_t r = 0; r < bounds.rows; ++r)
    for (int64_t c = 0; c < bounds.cols; ++c) {
      const double actual = read(arithmetic, result, r * bounds.cols + c);
      const Bounded& wanted = bounds.at(r, c);
      if (!is_within(actual, wanted))
        return std::string(name) + "[" + std::to_string(r) + ", " + std::to_string(c) + "] is " +
               std::to_string(actual) + ", not " + std::to_string(wanted.value) + " within " +
               std::to_string(wanted.error);
    }
  return "";
}

}  // namespace fastenc::cuda::test
