// Depthwise convolution where everything is moved in vectors of eight channels.
#pragma once

#include "cuda/conv_gemm.h"

namespace deltafx::cuda {

bool conv_depthwise_takes(const GemmParams& p);
// The shares of the map in which blocks find the candidates for themselves; none where a list is
// the quicker way.
Shares conv_depthwise_shares(const GemmParams& p);
// p's weight: [tap][channel].
cudaError_t conv_depthwise(const GemmParams& p, cudaStream_t stream);

}  // namespace deltafx::cuda
