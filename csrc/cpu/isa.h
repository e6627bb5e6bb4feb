// What kernels.inl needs from outside, included before the target pragma of each isa_*.cpp.
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/types.h"
#include "cpu/candidates.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
