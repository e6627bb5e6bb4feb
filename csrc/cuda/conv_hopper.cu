#include "cuda/conv_hopper.h"

#include <algorithm>

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
    : tall(is_tall(p)),
      columns(static_cast<int>((p.out.acc.c + kColumns - 1) / kColumns)),
      cluster(tall ? parts_of(p) : p.cluster) {
  const int64_t tiles = (p.out.acc.sites() + rows() - 1) / rows();
  const int blocks = kBlocksPerMultiprocessor * current_device().multiprocessors;
  // Of the largest clusters not as many fit as there is room for their blocks.
  const int resident = (cluster < 8 ? blocks : blocks * 3 / 4) / (columns * cluster);
  clusters = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(tiles, resident)));
}

Shares conv_hopper_shares(const GemmParams& p) {
  const HopperTiling tiling(p);
  Shares none{};
  if (tiling.tall) return none;
  const double expected = expected_candidates(p.out.acc) / tiling.rows();  // tiles, filled
  // A share of more than one tile makes its cluster take twice as long, and they are not all alike.
  if (tiling.clusters < 1.6 * expected) return none;
  // The fewer, the less often a tile's weights are read; an image's are few. But a small map's
  // share of the candidates is the least certain, and there are multiprocessors to spare.
  const int wanted = static_cast<int>((p.x.c <= 4 ? 3 : 2) * expected) + 1;
  const int spare = current_device().multiprocessors / (4 * tiling.columns * tiling.cluster);
  // Deep sums of many channels: two clusters would read all of the weights for the sites of one.
  if (tiling.cluster > 1 && tiling.clusters < wanted) return none;
  return Shares(p.out.acc, std::min(tiling.clusters, std::max(wanted, spare)));
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
