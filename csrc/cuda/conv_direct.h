// Grouped and depthwise convolution: bound by bytes, so without tensor cores.
#pragma once

#include "cuda/conv_gemm.h"

namespace deltafx::cuda {

// p's weight: [tap][channel of the group][cout]. group_in, group_out: channels of a group.
cudaError_t conv_direct(const GemmParams& p, int group_in, int group_out, cudaStream_t stream);

}  // namespace deltafx::cuda
