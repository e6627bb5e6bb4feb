// The checked parameters of what begins a frame, for the operators that do one of it and for the
// one that does all: each is defined with its own operator.
#pragma once

#include "ops/dispatch.h"

#ifdef DELTAFX_CUDA
#include "cuda/branch.h"
#endif

namespace deltafx {

EncodeParams encode_params(const Tensor& acc, const Tensor& mask, const Tensor& counts,
                           const Tensor& x, int64_t block, const OptionalTensor& inv_scale,
                           const OptionalTensor& threshold, c10::string_view policy);

#ifdef DELTAFX_CUDA
cuda::Arenas arenas_of(const Tensor& masks, const Tensor& counts);

// What the current stream has captured last, if it is one node; else 0. On the device of `like`.
int64_t last_node(const Tensor& like);
#endif

}  // namespace deltafx
