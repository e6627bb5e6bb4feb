#include "cpu/isa.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define DELTAFX_ISA avx2
#define DELTAFX_ISA_NAME "avx2"
#define DELTAFX_LANES 8
#include "cpu/kernels.inl"
#pragma GCC pop_options
#endif
