// How the convolutions for Hopper are launched: clusters of blocks along x, each with tiles of its
// own, and along y the output channels.
#pragma once

#include "cuda/conv_hopper.h"

namespace deltafx::cuda {

template <class Traits>
cudaError_t launch_tiles(void (*kernel)(GemmParams), GemmParams p, cudaStream_t stream) {
  static_assert(Traits::kBlocksPerMultiprocessor == HopperTiling::kBlocksPerMultiprocessor &&
                Traits::kColumns == HopperTiling::kColumns);
  const HopperTiling tiling(p);
  const int clusters = conv_hopper_clusters(p, tiling);
  p.cluster = tiling.cluster;
  return launch(
      kernel,
      {clusters * p.cluster, Traits::kThreads, Traits::kSharedBytes, p.cluster, tiling.columns},
      stream, p);
}

}  // namespace deltafx::cuda
