// The kernels for x86-64 with AVX2.
#if defined(__x86_64__)
#include <immintrin.h>

#include "std_headers.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi2")
#endif

#define FASTENC_ISA avx2
#define FASTENC_AVX2
#include "stack_impl.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
