// The tensor-core convolution in half precision on Hopper GPUs (sm_90a).
#pragma once

#include "cuda/conv_gemm.h"

namespace deltafx::cuda {

// Whether the kernels here take a convolution: they are compiled in, the device can run them, and
// everything is moved in vectors of eight channels (or four, of an image).
bool conv_hopper_takes(const GemmParams& p);
// Whether they take it in tiles of 128 sites; those need a list.
bool conv_hopper_is_tall(const GemmParams& p);
// Into how many parts the depth of such a tile is split.
int conv_hopper_parts(const GemmParams& p);

cudaError_t conv_hopper_f16(const GemmParams& p, cudaStream_t stream);
cudaError_t conv_hopper_bf16(const GemmParams& p, cudaStream_t stream);

}  // namespace deltafx::cuda
