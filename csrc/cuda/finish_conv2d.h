// What follows a convolution that a dense library computed at every site, in one pass over memory.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/types.h"

namespace deltafx::cuda {

// acc = act(y + bias + residual), or act(y + bias) + residual, at every site.
struct FinishParams {
  FeatureMap acc;
  Activation act;
  FeatureMap y;         // may be the accumulator itself
  const float* bias;    // null: none
  FeatureMap residual;  // null data: none
  bool residual_after_act;
  int32_t* not_finite;  // set to 1 where any y is infinite or a NaN
};

cudaError_t finish_conv2d(const FinishParams& p, cudaStream_t stream);

}  // namespace deltafx::cuda
