// The candidates of a share of a map's sites, found by a block for itself: no list in global
// memory, which would be another launch, and nothing to wait for but the masks. All blocks that
// work on the same sites (other channels, another part of the depth) find the same.
//
// The map is cut into runs of 8 sites. Of every `count` runs in a row each share has one, another
// one every time: so shares have about the same number of candidates wherever something moves.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cuda/candidates.cuh"

namespace deltafx::cuda {

struct Shares {
  static constexpr int kRuns = 1024;  // of a share, at most

  int count;
  int runs, w;  // of the map
  Divisor per_row, h;

  Shares() = default;
  // wanted: how many there should be; more, where a block could not look at all of its share.
  Shares(const FeatureMap& map, int wanted)
      : w(static_cast<int>(map.w)), per_row((w + kFlags - 1) / kFlags), h(static_cast<int>(map.h)) {
    runs = static_cast<int>(map.n * map.h) * per_row.value;
    count = std::max({1, std::min(wanted, runs), (runs + kRuns - 1) / kRuns});
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

// Whether a query has eight_sites(), for maps where a run is eight bytes of its masks.
template <class Query, class = void>
constexpr bool kHasWords = false;
template <class Query>
constexpr bool kHasWords<Query, std::void_t<decltype(&Query::eight_sites)>> = true;

// What a thread of a block of kThreads knows of the candidates in the block's share.
template <int kThreads>
class OwnCandidates {
  static constexpr int kPasses = Shares::kRuns / kThreads;  // a thread has so many runs at most
  using Flags = std::conditional_t<kPasses * kFlags <= 32, uint32_t, uint64_t>;
  static_assert(kPasses * kFlags <= 64, "a thread's flags are one word");

 public:
  // Finds them; called by all threads.
  template <class Query>
  __device__ __forceinline__ void find(const Query& query, const Shares& shares, int share) {
    __shared__ int warps[kThreads / 32];
    const int tid = static_cast<int>(threadIdx.x);
    flags_ = 0;
    bool in_words = false;
    if constexpr (kHasWords<Query>) in_words = query.is_pointwise();
    if (in_words) {
      uint64_t bytes[kPasses];
#pragma unroll
      for (int k = 0; k < kPasses; ++k) {
        int run;
        bytes[k] = 0;
        if (k * kThreads * shares.count >= shares.runs) continue;
        if constexpr (kHasWords<Query>)
          if (shares.find(share, tid + k * kThreads, &run)) bytes[k] = query.eight_sites(run);
      }
#pragma unroll
      for (int k = 0; k < kPasses; ++k)
        flags_ |= static_cast<Flags>(bits_of(bytes[k])) << (k * kFlags);
    } else {
#pragma unroll 1
      for (int k = 0; k * kThreads * shares.count < shares.runs; ++k) {
        int run;
        if (!shares.find(share, tid + k * kThreads, &run)) continue;
        const int row = shares.per_row.divide(run), stream = shares.h.divide(row);
        const int x = (run - row * shares.per_row.value) * kFlags;
        const Position at{stream, row - stream * shares.h.value, x};
        flags_ |= static_cast<Flags>(flags_of(query, at, min(kFlags, shares.w - x), 0))
                  << (k * kFlags);
      }
    }
    before_ = sum_before<kThreads>(count_of(flags_), warps, &size_);
  }
  __device__ __forceinline__ int size() const { return size_; }
  // Lists number `from` to from + kRoom; needs a barrier before they are read.
  template <int kRoom>
  __device__ __forceinline__ void list(int from, uint16_t (&entries)[kRoom]) const {
    int at = before_ - from;
#pragma unroll 1
    for (Flags flags = flags_; flags != 0; flags &= flags - 1, ++at) {
      if (at < 0 || at >= kRoom) continue;
      const int bit = first_of(flags);
      const int run = static_cast<int>(threadIdx.x) + bit / kFlags * kThreads;
      entries[at] = static_cast<uint16_t>(run * kFlags + bit % kFlags);
    }
  }

 private:
  static __device__ __forceinline__ int count_of(uint32_t v) { return __popc(v); }
  static __device__ __forceinline__ int count_of(uint64_t v) { return __popcll(v); }
  static __device__ __forceinline__ int first_of(uint32_t v) {
    return __ffs(static_cast<int>(v)) - 1;
  }
  static __device__ __forceinline__ int first_of(uint64_t v) {
    return __ffsll(static_cast<long long>(v)) - 1;
  }

  Flags flags_;  // of each run eight
  int before_, size_;
};

// How many sites are expected to be candidates: where a twentieth of every picture changed, in a
// box, with `margin` sites more on each side.
inline double expected_candidates(const FeatureMap& map, double margin = 2) {
  const double side = std::sqrt(0.05), h = static_cast<double>(map.h),
               w = static_cast<double>(map.w);
  return static_cast<double>(map.n) * std::min(h, side * h + 2 * margin) *
         std::min(w, side * w + 2 * margin);
}

}  // namespace deltafx::cuda
