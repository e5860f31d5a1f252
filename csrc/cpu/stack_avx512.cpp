// The kernels for x86-64 with AVX512.
#if defined(__x86_64__)
#include <immintrin.h>

#include "std_headers.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own intrinsics start from undefined registers, and it warns of them (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")
#endif

#define FASTENC_ISA avx512
#define FASTENC_AVX512
#include "stack_impl.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
