// A convolution at every site that is bound by bytes, with all that follows it, in one pass over
// memory: a pointwise one, or one of an image.
#pragma once

#include <cuda_runtime_api.h>

#include "common/types.h"

namespace deltafx::cuda {

constexpr int kImageChannels = 4;

// act(x * weight + bias + residual), or act(x * weight + bias) + residual. All in half precision.
struct GemmEverywhereParams {
  FeatureMap acc, x;
  const void* weight;  // [acc.c][taps_y][taps_x][x.c]
  const float* bias;   // null: none
  FeatureMap residual;
  bool residual_after_act;
  Activation act;
  int taps_y, taps_x, stride_y, stride_x, pad_y, pad_x;
  // Else x has kImageChannels channels, with nothing between its sites. Pointwise maps lie in whole
  // vectors of eight channels, as accumulator and residual do.
  bool is_pointwise;
};

cudaError_t gemm_everywhere(const GemmEverywhereParams& p, cudaStream_t stream);

}  // namespace deltafx::cuda
