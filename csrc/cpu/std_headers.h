// The standard headers that the kernels use. The files of one instruction set include them before they change the
// compiler's target, so that what these headers define stays callable on any CPU; all else comes after, since GCC
// splits vectors as the target at a function's definition demands.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
