// Losses of training: the value of each row and the gradient at the output. Included by stack_impl.h only.
//
// With n the number of elements that the mean is over, t the target; each row's part of it times the row's weight:
//   mse (y - t)^2 / n    mae |y - t| / n    huber (delta 1): d^2 / 2 up to |d| = 1, |d| - 1/2 beyond, over n
//   bce -(t log y + (1 - t) log(1 - y)) / n, logarithms not below -100    bce with logits: that of sigmoid(y)
//   cross entropy -sum_c t_c log softmax(y)_c / rows    cosine (1 - y . t / (|y| |t|)) / rows, norms of at least 1e-8

namespace fastenc {
namespace FASTENC_ISA {

// log(1 + u) for u >= -1. Where u is small, 1 + u has lost its low bits: Kahan's u / ((1 + u) - 1) gives them back.
// Cephes logf's polynomial for the logarithm of 1 + u = m 2^e, sqrt(1/2) <= m < sqrt(2).
template <class V>
FASTENC_INLINE V log_1p(V u) {
  using I = math::Integers<V>;
  const V one_u = u + 1.0f;
  const I bits = math::bit_cast<I>(one_u);
  const I exponent = (bits - 0x3f3504f3) >> 23;  // 0x3f3504f3: sqrt(1/2)
  const V e = __builtin_convertvector(exponent, V);
  const V x = math::bit_cast<V>(bits - (exponent << 23)) - 1.0f;
  V p = x * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * x + 1.1676998740e-1f;
  p = p * x - 1.2420140846e-1f;
  p = p * x + 1.4249322787e-1f;
  p = p * x - 1.6668057665e-1f;
  p = p * x + 2.0000714765e-1f;
  p = p * x - 2.4999993993e-1f;
  p = p * x + 3.3333331174e-1f;
  const V square = x * x;
  const V logarithm = (p * x * square - e * 2.12194440e-4f - square * 0.5f) + x + e * 0.693359375f;
  const V lost = one_u - 1.0f;
  V result = (u < 0.25f) & (u > -0.25f) ? (lost == 0.0f ? u : logarithm * (u / lost)) : logarithm;
  result = one_u == 0.0f ? V{} - __builtin_inff() : result;
  return one_u < 0.0f || one_u != one_u ? V{} + __builtin_nanf("") : result;
}

struct MseLoss {
  template <class V>
  FASTENC_INLINE static V value(V y, V t) {
    return (y - t) * (y - t);
  }
  template <class V>
  FASTENC_INLINE static V gradient(V y, V t) {
    return 2.0f * (y - t);
  }
};

struct MaeLoss {
  template <class V>
  FASTENC_INLINE static V value(V y, V t) {
    return math::abs(y - t);
  }
  template <class V>
  FASTENC_INLINE static V gradient(V y, V t) {
    const V d = y - t;
    return d > 0.0f ? V{} + 1.0f : d < 0.0f ? V{} - 1.0f : d;
  }
};

struct HuberLoss {
  template <class V>
  FASTENC_INLINE static V value(V y, V t) {
    const V d = math::abs(y - t);
    return d < 1.0f ? 0.5f * d * d : d - 0.5f;
  }
  template <class V>
  FASTENC_INLINE static V gradient(V y, V t) {
    const V d = y - t;
    return d > 1.0f ? V{} + 1.0f : d < -1.0f ? V{} - 1.0f : d;
  }
};

struct BceLoss {
  template <class V>
  FASTENC_INLINE static V value(V y, V t) {
    V on = log_1p(y - 1.0f), off = log_1p(-y);
    on = on < -100.0f ? V{} - 100.0f : on;
    off = off < -100.0f ? V{} - 100.0f : off;
    return (t - 1.0f) * off - t * on;
  }
  template <class V>
  FASTENC_INLINE static V gradient(V y, V t) {
    const V spread = (1.0f - y) * y;
    return (y - t) / (spread < 1e-12f ? V{} + 1e-12f : spread);
  }
};

struct BceWithLogitsLoss {
  template <class V>
  FASTENC_INLINE static V value(V y, V t) {
    return (y < 0.0f ? V{} : y) - y * t + log_1p(math::exp(-math::abs(y)));
  }
  template <class V>
  FASTENC_INLINE static V gradient(V y, V t) {
    return math::sigmoid(y) - t;
  }
};

// The rows' summed loss, each times its weight, undivided; grad[r, :] = gradient * factor * weights[r].
template <class Loss>
inline double elementwise_loss(int64_t rows, int64_t cols, const float* out, int64_t ld_out,
                               const float* const* targets, const float* weights, float factor, float* grad,
                               int64_t ld_grad) {
  double total = 0.0;
  for (int64_t r = 0; r < rows; ++r) {
    const float row_factor = factor * weights[r];
    Vec sums{};
    int64_t j = 0;
    for (; j + kLanes <= cols; j += kLanes) {
      const Vec y = load(out + r * ld_out + j), t = load(targets[r] + j);
      sums += Loss::value(y, t);
      store(Loss::gradient(y, t) * row_factor, grad + r * ld_grad + j);
    }
    if (j < cols) {
      const Vec y = load_part(out + r * ld_out + j, cols - j), t = load_part(targets[r] + j, cols - j);
      sums += zero_behind(Loss::value(y, t), cols - j);
      store_part(Loss::gradient(y, t) * row_factor, grad + r * ld_grad + j, cols - j);
    }
    total += static_cast<double>(weights[r]) * static_cast<double>(sum(sums));
  }
  return total;
}

// The same for cross entropy; a row's target is a class of labels, or probabilities where labels is null.
inline double cross_entropy(int64_t rows, int64_t cols, const float* out, int64_t ld_out, const float* const* targets,
                            const int64_t* labels, const float* weights, float factor, float* grad, int64_t ld_grad) {
  double total = 0.0;
  for (int64_t r = 0; r < rows; ++r) {
    const float row_factor = factor * weights[r];
    const float* y = out + r * ld_out;
    float* g = grad + r * ld_grad;
    float highest = y[0];
    for (int64_t j = 1; j < cols; ++j) highest = y[j] > highest ? y[j] : highest;
    Vec sums{};
    for (int64_t j = 0; j < cols; j += kLanes) {
      const int64_t count = std::min(kLanes, cols - j);
      const Vec e = math::exp(load_part(y + j, count) - highest);
      sums += zero_behind(e, count);
      store_part(e, g + j, count);
    }
    const float sum_exp = sum(sums);
    const double log_sum = std::log(static_cast<double>(sum_exp)) + static_cast<double>(highest);
    double value = 0.0, target_sum = 1.0;
    if (labels != nullptr) {
      value = log_sum - static_cast<double>(y[labels[r]]);
    } else {
      target_sum = 0.0;
      for (int64_t j = 0; j < cols; ++j) {
        const double t = static_cast<double>(targets[r][j]);
        value += t * (log_sum - static_cast<double>(y[j]));
        target_sum += t;
      }
    }
    total += static_cast<double>(weights[r]) * value;
    const float scale = static_cast<float>(target_sum) / sum_exp;
    for (int64_t j = 0; j < cols; ++j) {
      const float t = labels != nullptr ? (labels[r] == j ? 1.0f : 0.0f) : targets[r][j];
      g[j] = (g[j] * scale - t) * row_factor;
    }
  }
  return total;
}

// The same for the cosine. As in PyTorch a norm's own gradient is y / |y| even where it is raised to 1e-8, and 0 at 0.
inline double cosine_loss(int64_t rows, int64_t cols, const float* out, int64_t ld_out, const float* const* targets,
                          const float* weights, float factor, float* grad, int64_t ld_grad) {
  constexpr double kLeastNorm = 1e-8;
  double total = 0.0;
  for (int64_t r = 0; r < rows; ++r) {
    Vec products{}, squares{}, target_squares{};
    for (int64_t j = 0; j < cols; j += kLanes) {
      const int64_t count = std::min(kLanes, cols - j);
      const Vec y = load_part(out + r * ld_out + j, count), t = load_part(targets[r] + j, count);
      products += y * t;
      squares += y * y;
      target_squares += t * t;
    }
    const double norm = std::sqrt(static_cast<double>(sum(squares)));
    const double target_norm = std::sqrt(static_cast<double>(sum(target_squares)));
    const double raised = norm < kLeastNorm ? kLeastNorm : norm;
    const double per_target = 1.0 / (raised * (target_norm < kLeastNorm ? kLeastNorm : target_norm));
    const double cosine = static_cast<double>(sum(products)) * per_target;
    total += static_cast<double>(weights[r]) * (1.0 - cosine);
    // grad = y * of_y - t * of_t
    const double row_factor = static_cast<double>(factor) * static_cast<double>(weights[r]);
    const float of_y = static_cast<float>(norm == 0.0 ? 0.0 : row_factor * cosine / (raised * norm));
    const float of_t = static_cast<float>(row_factor * per_target);
    for (int64_t j = 0; j < cols; j += kLanes) {
      const int64_t count = std::min(kLanes, cols - j);
      const Vec y = load_part(out + r * ld_out + j, count), t = load_part(targets[r] + j, count);
      store_part(y * of_y - t * of_t, grad + r * ld_grad + j, count);
    }
  }
  return total;
}

}  // namespace FASTENC_ISA
}  // namespace fastenc
