// The element types of the CPU kernels.
#pragma once

#include <cstdint>

namespace fastenc {

enum class Dtype : int64_t { kFloat, kBFloat16, kHalf };

}  // namespace fastenc
