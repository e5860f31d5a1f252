// The optimisers' updates of a strip of a parameter, by the rules of torch.optim. Included by stack_impl.h only.

namespace fastenc {
namespace FASTENC_ISA {

FASTENC_INLINE Vec square_root(Vec value) {
#if defined(FASTENC_AVX512)
  return (Vec)_mm512_sqrt_ps((__m512)value);
#elif defined(FASTENC_AVX2)
  return (Vec)_mm256_sqrt_ps((__m256)value);
#else
  float lanes[kLanes];
  store(value, lanes);
  for (int64_t i = 0; i < kLanes; ++i) lanes[i] = std::sqrt(lanes[i]);
  return load(lanes);
#endif
}

// What one step's update of a parameter needs, in fp32 as PyTorch's fused kernels have it.
struct Update {
  float rate;                     // SGD: the learning rate. Adam: the learning rate / (1 - beta1^t)
  float decay;                    // L2: times the value, added to the gradient. AdamW: 1 - rate * weight_decay
  float keep1, add1;              // SGD: momentum, 1. Adam: beta1, 1 - beta1
  float keep2, add2;              // Adam: beta2, 1 - beta2
  float inverse_correction, eps;  // Adam: 1 / sqrt(1 - beta2^t)
  float l1;                       // times the sign of the value, added to the gradient
  float scale;                    // times the gradient: what clipping the norm leaves
  float limit;                    // of the gradient's elements; infinite where they are not clipped
  bool nesterov;

  Update() = default;
  FASTENC_INLINE Update(OptimizerKind optimizer, const Group& group, double learning_rate, double steps) {
    rate = static_cast<float>(learning_rate);
    decay = static_cast<float>(group.weight_decay);
    keep1 = static_cast<float>(group.momentum);
    add1 = 1.0f;
    keep2 = add2 = inverse_correction = eps = 0.0f;
    if (optimizer != OptimizerKind::kSgd) {
      rate = static_cast<float>(learning_rate / (1.0 - std::pow(group.beta1, steps)));
      keep1 = static_cast<float>(group.beta1);
      add1 = static_cast<float>(1.0 - group.beta1);
      keep2 = static_cast<float>(group.beta2);
      add2 = static_cast<float>(1.0 - group.beta2);
      inverse_correction = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(group.beta2, steps)));
      eps = static_cast<float>(group.eps);
    }
    if (optimizer == OptimizerKind::kAdamW) decay = static_cast<float>(1.0 - learning_rate * group.weight_decay);
    l1 = 0.0f;
    scale = 1.0f;
    limit = __builtin_inff();
    nesterov = group.nesterov;
  }
};

// The gradient with the L1 penalty's.
template <class V>
FASTENC_INLINE V penalised(float l1, V gradient, V value) {
  if (l1 == 0.0f) return gradient;
  return gradient + (value > 0.0f ? V{} + l1 : value < 0.0f ? V{} - l1 : V{});
}

FASTENC_INLINE Vec clipped(const Update& update, Vec gradient) {
  gradient *= update.scale;
  gradient = gradient > update.limit ? Vec{} + update.limit : gradient;
  return gradient < -update.limit ? Vec{} - update.limit : gradient;
}

// The new value; moments are updated in place.
template <OptimizerKind kKind>
FASTENC_INLINE Vec updated(const Update& update, Vec value, Vec gradient, Vec* first, Vec* second) {
  if constexpr (kKind == OptimizerKind::kAdamW) {
    value *= update.decay;
  } else {
    gradient += value * update.decay;
  }
  if constexpr (kKind == OptimizerKind::kSgd) {
    if (first == nullptr) return value - gradient * update.rate;
    *first = *first * update.keep1 + gradient;
    return value - (update.nesterov ? gradient + *first * update.keep1 : *first) * update.rate;
  } else {
    *first += (gradient - *first) * update.add1;
    *second = *second * update.keep2 + gradient * gradient * update.add2;
    const Vec spread = square_root(*second) * update.inverse_correction + update.eps;
    return value - *first / spread * update.rate;
  }
}

// The elements [rows, cols] of a parameter that begin at `offset`, their rows `stride` apart. gradient: as many, final
// but for clipping.
template <OptimizerKind kKind>
inline void update_tile(const Update& shared, const Parameter& parameter, int64_t offset, int64_t stride, int64_t rows,
                        int64_t cols, const float* gradient, int64_t ld_gradient) {
  const Update update = shared;  // whose fields, being here, no store can change
  const bool has_first = parameter.moments[0] != nullptr;
  for (int64_t r = 0; r < rows; ++r, offset += stride, gradient += ld_gradient) {
    float* const value = parameter.value + offset;
    float* const grad = parameter.grad == nullptr ? nullptr : parameter.grad + offset;
    float* const firsts = has_first ? parameter.moments[0] + offset : nullptr;
    float* const seconds = kKind == OptimizerKind::kSgd ? nullptr : parameter.moments[1] + offset;
    const auto lanes = [&](int64_t i, const auto& load_lanes, const auto& store_lanes) {
      Vec first{}, second{};
      const Vec old = load_lanes(value + i);
      const Vec g = clipped(update, penalised(update.l1, load_lanes(gradient + i), old));
      if (grad != nullptr) store_lanes(g, grad + i);
      if (has_first) first = load_lanes(firsts + i);
      if constexpr (kKind != OptimizerKind::kSgd) second = load_lanes(seconds + i);
      store_lanes(updated<kKind>(update, old, g, has_first ? &first : nullptr, &second), value + i);
      if (has_first) store_lanes(first, firsts + i);
      if constexpr (kKind != OptimizerKind::kSgd) store_lanes(second, seconds + i);
    };
    int64_t i = 0;
    for (; i + kLanes <= cols; i += kLanes)
      lanes(i, [](const float* src) { return load(src); }, [](Vec lane, float* dst) { store(lane, dst); });
    if (i == cols) continue;
    const int64_t rest = cols - i + PLANTED(UpdateTooFar);
    lanes(
        i, [&](const float* src) { return load_part(src, rest); },
        [&](Vec lane, float* dst) { store_part(lane, dst, rest); });
  }
}

}  // namespace FASTENC_ISA
}  // namespace fastenc
