// The tensor-core convolution in half precision on Hopper GPUs (sm_90a).
#pragma once

#include "cuda/conv_gemm.h"

namespace deltafx::cuda {

// Whether the kernels here take a convolution: they are compiled in, the device can run them, and
// everything is moved in vectors of eight channels (or four, of an image).
bool conv_hopper_takes(const GemmParams& p);

// How such a convolution is cut into tiles for blocks.
struct HopperTiling {
  static constexpr int kColumns = 64, kBlocksPerMultiprocessor = 2;

  bool tall;     // tiles of 128 sites instead of 64
  int columns;   // tiles of 64 output channels
  int cluster;   // blocks that may share a tile's depth
  int clusters;  // as many as have room on the device at a time, or have a tile if all sites change

  explicit HopperTiling(const GemmParams& p);
  int rows() const { return tall ? 128 : 64; }
};
// The shares of the map in which clusters find the candidates for themselves; none where a list is
// the quicker way, as it is for tiles of 128 sites.
Shares conv_hopper_shares(const GemmParams& p);
// How many clusters of blocks along x such a convolution is launched with.
int conv_hopper_clusters(const GemmParams& p, const HopperTiling& tiling);
// Whether candidates that lie `wider` sites farther out, on each side of what changed, cost less
// than the launch of a list of one's own.
bool conv_hopper_bears(const GemmParams& p, double wider);

cudaError_t conv_hopper_f16(const GemmParams& p, cudaStream_t stream);
cudaError_t conv_hopper_bf16(const GemmParams& p, cudaStream_t stream);

}  // namespace deltafx::cuda
