// A depthwise convolution at every site, with its bias and activation, in one pass over memory.
#pragma once

#include <cuda_runtime_api.h>

#include "common/types.h"

namespace deltafx::cuda {

struct DepthwiseParams {
  FeatureMap acc, x;   // half precision, in whole vectors of channels
  const void* weight;  // packed: [3 * 3][channels]
  const float* bias;   // null: none
  Activation act;
  int pad_y, pad_x;
  int stride;  // 1 or 2
};

cudaError_t depthwise_everywhere(const DepthwiseParams& p, cudaStream_t stream);

}  // namespace deltafx::cuda
