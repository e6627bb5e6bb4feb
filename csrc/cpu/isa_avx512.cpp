#include "cpu/isa.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define DELTAFX_ISA avx512
#define DELTAFX_ISA_NAME "avx512"
#define DELTAFX_LANES 16
#include "cpu/kernels.inl"
#pragma GCC pop_options
#endif
