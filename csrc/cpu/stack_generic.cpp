// The kernels for any CPU: what the compiler's default target offers.
#define FASTENC_ISA generic
#include "stack_impl.h"
