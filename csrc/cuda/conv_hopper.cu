#include "cuda/conv_hopper.h"

#include <algorithm>
#include <array>
#include <atomic>

#include "cuda/launch.h"

namespace deltafx::cuda {
namespace {

bool is_16_byte_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// An image's channels lie four apart; other maps come in vectors of eight.
bool gathers(const GemmParams& p) {
  if (p.x.sites() * p.x.ld >= int64_t{1} << 31) return false;  // offsets have 32 bits
  if (p.pre_scale != nullptr || p.y.phase.taps == 0 || p.x_axis.phase.taps == 0 ||
      p.y.phase.taps >= kMostTaps || p.x_axis.phase.taps >= kMostTaps)
    return false;
  if (p.x.c <= 4) return p.x.ld == 4 && reinterpret_cast<uintptr_t>(p.x.data) % 8 == 0;
  return is_aligned(p.x);
}

// Tiles of 128 sites by 64 channels, if 15 % of the sites are candidates: more than is usual for a
// frame of which a twentieth changed, so that there is room for all of them at a time.
int expected_tiles(const GemmParams& p) {
  const int64_t all = (p.out.acc.sites() + 127) / 128 * ((p.out.acc.c + 63) / 64);
  return static_cast<int>(all * 15 / 100);
}

int steps_of(const GemmParams& p) { return p.packed_depth / 64; }

bool is_tall(const GemmParams& p) {
  const int taps = std::max(p.y.phase.taps, p.x_axis.phase.taps);
  // A step of 64 channels is of one tap.
  if (p.x.c <= 4 || (taps > 1 && p.x.c % 64 != 0)) return false;
  // As timed on an H100: the deeper the sum, the fewer tiles are enough.
  const int least = steps_of(p) > 8 ? 24 : steps_of(p) == 8 ? 200 : 350;
  return expected_tiles(p) >= least;
}

// As a block of the convolutions takes up room on a multiprocessor.
__global__ void __launch_bounds__(256) block_of_half() {}

// How many clusters of so many blocks have room on the device at a time: those of several blocks
// leave some of it empty.
int clusters_at_a_time(int cluster) {
  const int blocks = HopperTiling::kBlocksPerMultiprocessor * current_device().multiprocessors;
  if (cluster == 1) return blocks;
  constexpr int kMostDevices = 64, kMostBlocks = 8;
  static std::array<std::array<std::atomic<int>, kMostBlocks + 1>, kMostDevices> known{};
  int index = 0;
  cudaGetDevice(&index);
  std::atomic<int>& count = known[index % kMostDevices][cluster];
  if (count == 0) {
    constexpr int kSharedBytes = 72 * 1024;
    cudaFuncSetAttribute(block_of_half, cudaFuncAttributePreferredSharedMemoryCarveout,
                         shared_percent());
    cudaFuncSetAttribute(block_of_half, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    cudaLaunchAttribute size = in_clusters(cluster);
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks / cluster * cluster));
    config.blockDim = dim3(256);
    config.dynamicSmemBytes = kSharedBytes;
    config.attrs = &size;
    config.numAttrs = 1;
    int found = 0;
    const bool told = cudaOccupancyMaxActiveClusters(&found, block_of_half, &config) == cudaSuccess;
    count = told && found > 0 ? found : std::max(1, blocks * 3 / 4 / cluster);
  }
  return count;
}

int columns_of(const GemmParams& p) {
  return static_cast<int>((p.out.acc.c + HopperTiling::kColumns - 1) / HopperTiling::kColumns);
}

// How many tiles of 64 sites there will be, filled.
double expected_small_tiles(const GemmParams& p) { return expected_candidates(p.out.acc) / 64; }

// Whether so many clusters are enough for each to find its own candidates: a share of more than one
// tile makes its cluster take twice as long, and they are not all alike.
bool can_share(const GemmParams& p, int clusters) {
  return clusters >= 1.5 * expected_small_tiles(p);
}

// The blocks of a cluster for tiles of 64 sites in whose shares candidates are found, where that is
// quicker than a list and tall tiles; else 0. Not of shallow sums, in one part: they are quick, and
// others of the same candidates can have the list.
int cluster_in_shares(const GemmParams& p) {
  constexpr int kMostSteps = 10;  // of a part: each takes a third of a microsecond, on an H100
  for (int cluster = p.cluster; cluster > 1 && steps_of(p) <= kMostSteps * cluster; cluster /= 2)
    if (can_share(p, clusters_at_a_time(cluster) / columns_of(p))) return cluster;
  return 0;
}

// As many as should do for tiles of 64 sites. The fewer, the less often a tile's weights are read;
// an image's are few. But a small map's candidates are the least certain, and there are
// multiprocessors to spare.
int clusters_for(const GemmParams& p, const HopperTiling& tiling) {
  const int wanted = static_cast<int>((p.x.c <= 4 ? 3 : 2) * expected_small_tiles(p)) + 1;
  const int spare = current_device().multiprocessors / (4 * tiling.columns * tiling.cluster);
  return std::min(tiling.clusters, std::max(wanted, spare));
}

// Into how many parts the depth of a tile of 128 sites is split.
int parts_of(const GemmParams& p) {
  constexpr int kMost = 8, kLeastSteps = 4;  // of a part
  const int slots = 2 * current_device().multiprocessors;
  int parts = 1;
  while (parts < kMost && 2 * parts * expected_tiles(p) <= slots &&
         steps_of(p) >= 2 * parts * kLeastSteps)
    parts *= 2;
  return parts;
}

}  // namespace

bool conv_hopper_takes(const GemmParams& p) {
#ifdef DELTAFX_SM90A
  return current_device().capability == 90 && gathers(p) && p.acc_aligned &&
         (p.residual.data == nullptr || p.residual_aligned) && is_16_byte_aligned(p.weight);
#else
  return false;
#endif
}

HopperTiling::HopperTiling(const GemmParams& p)
    : tall(is_tall(p)), columns(columns_of(p)), cluster(tall ? parts_of(p) : p.cluster) {
  if (const int small = tall ? cluster_in_shares(p) : 0) tall = false, cluster = small;
  const int64_t tiles = (p.out.acc.sites() + rows() - 1) / rows();
  const int room = clusters_at_a_time(cluster) / columns;
  clusters = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(tiles, room)));
}

int conv_hopper_clusters(const GemmParams& p, const HopperTiling& tiling) {
  if (p.shares.any()) return p.shares.count;
  return p.makers > 0 && !tiling.tall ? clusters_for(p, tiling) : tiling.clusters;
}

Shares conv_hopper_shares(const GemmParams& p) {
  const HopperTiling tiling(p);
  if (tiling.tall || !can_share(p, tiling.clusters)) return {};
  FeatureMap map = p.out.acc;
  // Eight points in a row may go on from one row to the next.
  if (p.windows == Windows::points) map.h = map.sites() / kFlags, map.w = kFlags, map.n = 1;
  return Shares(map, clusters_for(p, tiling));
}

bool conv_hopper_bears(const GemmParams& p, double wider) {
  constexpr double kMargin = 2;
  const HopperTiling tiling(p);
  const double further = expected_candidates(p.out.acc, kMargin) -
                         expected_candidates(p.out.acc, std::max(0., kMargin - wider));
  // As timed on an H100: a list takes about 3 us, and blocks 5 to 7 for a tile each.
  return further <= 0.3 * tiling.rows() * tiling.clusters;
}

}  // namespace deltafx::cuda
