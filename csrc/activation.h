// One struct per activation: its value and its derivative. Shared by the CPU and the CUDA kernels: V is a float, or on
// the CPU a vector of floats.
//
// forward(z) is the value at the pre-activation z. backward(grad, saved) is grad times the derivative, where saved is z
// if kSavesPreact and the value otherwise. NaN and Inf behave as in PyTorch's own activations: relu(NaN) is NaN, and
// its gradient passes where the value is NaN.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FASTENC_INLINE __host__ __device__ __forceinline__
#else
// Always inlined, so that each copy is compiled for the instruction set of the kernel around it.
#define FASTENC_INLINE inline __attribute__((always_inline))
#endif

namespace fastenc {

// In the order of fastenc/activation.py.
enum class ActivationKind : int64_t { kIdentity, kRelu, kLeakyRelu, kSigmoid, kTanh, kGelu, kGeluTanh, kSilu, kCount };

// Branch-free elementary functions, on floats or on vectors of them; at most 2 ulp off.
namespace math {

#ifdef __CUDA_ARCH__
FASTENC_INLINE float exp(float x) { return ::expf(x); }
FASTENC_INLINE float tanh(float x) { return ::tanhf(x); }
FASTENC_INLINE float erf(float x) { return ::erff(x); }
#else
template <class V>
struct IntegersOf {
  using type = int32_t;
};
#ifndef __CUDACC__
// Vectors of 4, 8 and 16 floats: what fits a register of some instruction set. Compilers split wider ones badly.
template <int kLanes>
struct Lanes;
#define FASTENC_LANES(kCount)                                        \
  template <>                                                        \
  struct Lanes<kCount> {                                             \
    using Floats = float __attribute__((vector_size(4 * kCount)));   \
    using Ints = int32_t __attribute__((vector_size(4 * kCount)));   \
    using Words = uint32_t __attribute__((vector_size(4 * kCount))); \
  };                                                                 \
  template <>                                                        \
  struct IntegersOf<Lanes<kCount>::Floats> {                         \
    using type = Lanes<kCount>::Ints;                                \
  };
FASTENC_LANES(4)
FASTENC_LANES(8)
FASTENC_LANES(16)
#undef FASTENC_LANES
#endif
template <class V>
using Integers = typename IntegersOf<V>::type;

template <class To, class From>
FASTENC_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class V>
FASTENC_INLINE V splat(float value) {
  return V{} + value;
}

template <class V>
FASTENC_INLINE V abs(V x) {
  return bit_cast<V>(bit_cast<Integers<V>>(x) & 0x7fffffff);
}

template <class V>
FASTENC_INLINE V copy_sign(V magnitude, V sign) {
  return bit_cast<V>(bit_cast<Integers<V>>(magnitude) | (bit_cast<Integers<V>>(sign) & INT32_MIN));
}

// exp(x) = 2^n * exp(r), n = round(x / ln 2), |r| <= ln(2) / 2. Cephes expf's polynomial.
template <class V>
FASTENC_INLINE V exp(V x) {
  x = x > 89.0f ? splat<V>(89.0f) : x;      // exp(89) overflows to Inf, as it must; NaN stays NaN
  x = x < -104.0f ? splat<V>(-104.0f) : x;  // exp(-104) underflows to 0
  const float kRound = 12582912.0f;         // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  const V shifted = x * 1.44269504088896341f + kRound;
  const V n = shifted - kRound;
  V r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // 2^n in two factors, since n may be below the smallest normal exponent.
  const Integers<V> integer = bit_cast<Integers<V>>(shifted) - 0x4b400000;
  const Integers<V> half = integer >> 1;
  const V scale0 = bit_cast<V>((half + 127) << 23);
  const V scale1 = bit_cast<V>((integer - half + 127) << 23);
  return p * scale0 * scale1;
}

// Cephes tanhf: a polynomial below 0.625, 1 - 2 / (exp(2x) + 1) above.
template <class V>
FASTENC_INLINE V tanh(V x) {
  const V magnitude = abs(x);
  const V square = x * x;
  V p = square * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const V small = p * square * x + x;
  const V large = 1.0f - 2.0f / (exp(magnitude * 2.0f) + 1.0f);
  return magnitude < 0.625f ? small : copy_sign(large, x);
}

// Cephes erff below 1; above, 1 - exp(-x^2) t P(t), t = 1 / (1 + x / 2), with P fitted to erfcx(x) / t by least squares
// of the absolute error on 1 <= x <= 4.2 (4e-9; beyond, erf rounds to 1).
template <class V>
FASTENC_INLINE V erf(V x) {
  const V magnitude = abs(x);
  const V square = x * x;
  V p = square * 7.853861353153693e-5f - 8.010193625184903e-4f;
  p = p * square + 5.188327685732524e-3f;
  p = p * square - 2.685381193529856e-2f;
  p = p * square + 1.128358514861418e-1f;
  p = p * square - 3.761262582423300e-1f;
  p = p * square + 1.128379165726710f;
  const V small = p * x;
  const V t = 1.0f / (magnitude * 0.5f + 1.0f);
  V q = t * -0.0509474427f - 0.0539157428f;
  q = q * t + 0.381576121f;
  q = q * t + 0.131134436f;
  q = q * t + 0.312722176f;
  q = q * t + 0.278911501f;
  const V large = 1.0f - q * t * exp(-square);
  return magnitude < 1.0f ? small : copy_sign(large, x);
}
#endif

template <class V>
FASTENC_INLINE V sigmoid(V x) {
  return 1.0f / (1.0f + exp(-x));
}

}  // namespace math

struct Identity {
  static constexpr bool kSavesPreact = false;
  template <class V>
  FASTENC_INLINE static V forward(V z) {
    return z;
  }
  template <class V>
  FASTENC_INLINE static V backward(V grad, V) {
    return grad;
  }
};

struct Relu {
  static constexpr bool kSavesPreact = false;
  template <class V>
  FASTENC_INLINE static V forward(V z) {
    return z <= 0.0f ? V{} : z;
  }
  template <class V>
  FASTENC_INLINE static V backward(V grad, V out) {
    return out <= 0.0f ? V{} : grad;
  }
};

struct LeakyRelu {
  static constexpr bool kSavesPreact = false;
  static constexpr double kSlope = 0.01;  // also used in double, by ATen
  template <class V>
  FASTENC_INLINE static V forward(V z) {
    return z > 0.0f ? z : z * float(kSlope);
  }
  template <class V>
  FASTENC_INLINE static V backward(V grad, V out) {
    return out > 0.0f ? grad : grad * float(kSlope);
  }
};

struct Sigmoid {
  static constexpr bool kSavesPreact = false;
  template <class V>
  FASTENC_INLINE static V forward(V z) {
    return math::sigmoid(z);
  }
  template <class V>
  FASTENC_INLINE static V backward(V grad, V out) {
    return grad * (1.0f - out) * out;
  }
};

struct Tanh {
  static constexpr bool kSavesPreact = false;
  template <class V>
  FASTENC_INLINE static V forward(V z) {
    return math::tanh(z);
  }
  template <class V>
  FASTENC_INLINE static V backward(V grad, V out) {
    return grad * (1.0f - out * out);
  }
};

// z * Phi(z), Phi the normal distribution function.
struct Gelu {
  static constexpr bool kSavesPreact = true;
  static constexpr float kSqrtHalf = 0.70710678118654752f;
  static constexpr float kInvSqrt2Pi = 0.39894228040143268f;
  template <class V>
  FASTENC_INLINE static V forward(V z) {
    return z * 0.5f * (1.0f + math::erf(z * kSqrtHalf));
  }
  template <class V>
  FASTENC_INLINE static V backward(V grad, V z) {
    const V cdf = 0.5f * (1.0f + math::erf(z * kSqrtHalf));
    const V pdf = math::exp(-0.5f * z * z) * kInvSqrt2Pi;
    return grad * (cdf + z * pdf);
  }
};

// z / 2 * (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))).
struct GeluTanh {
  static constexpr bool kSavesPreact = true;
  static constexpr float kBeta = 0.79788456080286536f;
  static constexpr float kKappa = 0.044715f;
  template <class V>
  FASTENC_INLINE static V inner(V z) {
    return kBeta * (z + kKappa * z * z * z);
  }
  template <class V>
  FASTENC_INLINE static V forward(V z) {
    return 0.5f * z * (1.0f + math::tanh(inner(z)));
  }
  template <class V>
  FASTENC_INLINE static V backward(V grad, V z) {
    const V t = math::tanh(inner(z));
    const V left = 0.5f * (1.0f + t);
    const V right = 0.5f * z * (1.0f - t * t) * kBeta * (1.0f + 3.0f * kKappa * z * z);
    return grad * (left + right);
  }
};

struct Silu {
  static constexpr bool kSavesPreact = true;
  template <class V>
  FASTENC_INLINE static V forward(V z) {
    return z / (1.0f + math::exp(-z));
  }
  template <class V>
  FASTENC_INLINE static V backward(V grad, V z) {
    const V s = math::sigmoid(z);
    return grad * s * (1.0f + z * (1.0f - s));
  }
};

// Calls function(Struct{}) with the struct of kind.
template <class Function>
FASTENC_INLINE void with_activation(ActivationKind kind, Function&& function) {
  switch (kind) {
    case ActivationKind::kRelu: return function(Relu{});
    case ActivationKind::kLeakyRelu: return function(LeakyRelu{});
    case ActivationKind::kSigmoid: return function(Sigmoid{});
    case ActivationKind::kTanh: return function(Tanh{});
    case ActivationKind::kGelu: return function(Gelu{});
    case ActivationKind::kGeluTanh: return function(GeluTanh{});
    case ActivationKind::kSilu: return function(Silu{});
    default: return function(Identity{});
  }
}

FASTENC_INLINE bool saves_preact(ActivationKind kind) {
  bool saves = false;
  with_activation(kind, [&](auto activation) { saves = decltype(activation)::kSavesPreact; });
  return saves;
}

// Whether the derivative reads the value (rather than the pre-activation, or nothing).
FASTENC_INLINE bool reads_out(ActivationKind kind) { return kind != ActivationKind::kIdentity && !saves_preact(kind); }

}  // namespace fastenc
