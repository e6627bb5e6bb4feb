// The candidates of a share of a map's sites, found by a block for itself: no list in global
// memory, which would be another launch, and nothing to wait for but the masks. All blocks that
// work on the same sites (other channels, another part of the depth) find the same.
//
// The map is cut into runs of 8 sites. Of every `count` runs in a row each share has one, another
// one every time: so shares have about the same number of candidates wherever something moves.
#pragma once

#include <algorithm>

#include "cuda/candidates.cuh"

namespace deltafx::cuda {

struct Shares {
  static constexpr int kThreads = 256;  // of a block
  static constexpr int kPasses = 4;     // a thread looks at so many runs at most

  int count;
  int runs, w;  // of the map
  Divisor per_row, h;

  Shares() = default;
  // wanted: how many there should be; more, where a block could not look at all of its share.
  Shares(const FeatureMap& map, int wanted)
      : w(static_cast<int>(map.w)), per_row((w + kFlags - 1) / kFlags), h(static_cast<int>(map.h)) {
    runs = static_cast<int>(map.n * map.h) * per_row.value;
    constexpr int kMost = kThreads * kPasses;
    count = std::max({1, std::min(wanted, runs), (runs + kMost - 1) / kMost});
  }

  // The index of run `j` of a share; false: it has no such run.
  __device__ __forceinline__ bool find(int share, int j, int* run) const {
    int of_turn = share + static_cast<int>(__umulhi(static_cast<unsigned>(j) * 0x9e3779b9u,
                                                    static_cast<unsigned>(count)));
    if (of_turn >= count) of_turn -= count;
    *run = j * count + of_turn;
    return *run < runs;
  }
  // The site that an entry of OwnCandidates::list stands for.
  __device__ __forceinline__ int site(int share, int entry) const {
    int run = 0;
    find(share, entry / kFlags, &run);
    const int row = per_row.divide(run);
    return row * w + (run - row * per_row.value) * kFlags + entry % kFlags;
  }
};

// What a thread knows of its share's candidates.
class OwnCandidates {
 public:
  // Finds them; called by all threads of a block.
  template <class Query>
  __device__ __forceinline__ void find(const Query& query, const Shares& shares, int share) {
    __shared__ int warps[Shares::kThreads / 32];
    const int tid = static_cast<int>(threadIdx.x);
    flags_ = 0;
    if (query.is_pointwise()) {
      uint64_t bytes[Shares::kPasses];
#pragma unroll
      for (int k = 0; k < Shares::kPasses; ++k) {
        int run;
        bytes[k] = 0;
        if (shares.find(share, tid + k * Shares::kThreads, &run)) bytes[k] = query.eight_sites(run);
      }
#pragma unroll
      for (int k = 0; k < Shares::kPasses; ++k) flags_ |= bits_of(bytes[k]) << (k * kFlags);
    } else {
#pragma unroll 1
      for (int k = 0; k * Shares::kThreads * shares.count < shares.runs; ++k) {
        int run;
        if (!shares.find(share, tid + k * Shares::kThreads, &run)) continue;
        const int row = shares.per_row.divide(run), stream = shares.h.divide(row);
        const int x = (run - row * shares.per_row.value) * kFlags;
        const Position at{stream, row - stream * shares.h.value, x};
        flags_ |= query.flags(at, min(kFlags, shares.w - x)) << (k * kFlags);
      }
    }
    before_ = sum_before<Shares::kThreads>(__popc(flags_), warps, &size_);
  }
  __device__ __forceinline__ int size() const { return size_; }
  // Lists number `from` to from + kRoom; needs a barrier before they are read.
  template <int kRoom>
  __device__ __forceinline__ void list(int from, uint16_t (&entries)[kRoom]) const {
    int at = before_ - from;
#pragma unroll 1
    for (uint32_t flags = flags_; flags != 0; flags &= flags - 1, ++at) {
      if (at < 0 || at >= kRoom) continue;
      const int bit = __ffs(static_cast<int>(flags)) - 1;
      const int run = static_cast<int>(threadIdx.x) + bit / kFlags * Shares::kThreads;
      entries[at] = static_cast<uint16_t>(run * kFlags + bit % kFlags);
    }
  }

 private:
  uint32_t flags_;  // of each run eight
  int before_, size_;
};
static_assert(Shares::kPasses * kFlags <= 32, "a thread's flags are one word");

}  // namespace deltafx::cuda
