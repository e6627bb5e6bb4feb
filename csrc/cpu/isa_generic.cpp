#include "cpu/isa.h"

#define DELTAFX_ISA generic
#define DELTAFX_ISA_NAME "generic"
#define DELTAFX_LANES 4
#include "cpu/kernels.inl"
