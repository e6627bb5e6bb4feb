// How the convolutions for Hopper are launched: clusters of blocks along x, each with tiles of its
// own, and along y the output channels.
#pragma once

#include <algorithm>

#include "cuda/conv_gemm.h"

namespace deltafx::cuda {

template <class Traits>
cudaError_t launch_tiles(void (*kernel)(GemmParams), GemmParams p, cudaStream_t stream) {
  const int multiprocessors = current_device().multiprocessors;
  const int64_t row_tiles = (p.out.acc.sites() + Traits::kRows - 1) / Traits::kRows;
  const auto columns = static_cast<int>((p.out.acc.c + Traits::kColumns - 1) / Traits::kColumns);
  const int resident = Traits::kBlocksPerMultiprocessor * multiprocessors / (columns * p.cluster);
  int clusters = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(row_tiles, resident)));
  if (p.lists_itself) {
    // A tile each, if 15 % of the sites are candidates; and a block for each multiprocessor.
    const int wanted =
        std::max(static_cast<int>(row_tiles * 15 / 100), multiprocessors / (columns * p.cluster));
    p.shares = Shares(p.out.acc, p.y.phase.taps > 1 ? 1 : 0, std::min(clusters, wanted));
    clusters = p.shares.count;
  }
  return launch(kernel,
                {clusters * p.cluster, Traits::kThreads, Traits::kSharedBytes, p.cluster, columns},
                stream, p);
}

}  // namespace deltafx::cuda
