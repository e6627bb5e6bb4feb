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

// The candidates in the share of a block of kThreads. They are listed by their runs, for a thread
// that would put down one site after the other takes longer than all else here.
template <int kThreads>
class OwnCandidates {
  static constexpr int kPasses = Shares::kRuns / kThreads;  // a thread has so many runs at most
  // A run with candidates: how many sites of others stand before its, which of its sites are
  // candidates, and its number in the share.
  static constexpr int kBeforeBits = 13, kRunShift = kBeforeBits + kFlags;
  static_assert(Shares::kRuns * kFlags <= 1 << kBeforeBits, "the last run's sites before it");
  static_assert(Shares::kRuns <= 1 << (32 - kRunShift), "a run's number");
  using Flags = std::conditional_t<kPasses * kFlags <= 32, uint32_t, uint64_t>;
  static_assert(kPasses * kFlags <= 64, "a thread's flags are one word");

 public:
  // Nothing here depends on the kernel before this one.
  __device__ __forceinline__ OwnCandidates(const Shares& shares, int share)
      : shares_(shares), share_(share) {
#pragma unroll
    for (int k = 0; k < kPasses; ++k) {
      const int j = static_cast<int>(threadIdx.x) + k * kThreads;
      if (!shares.find(share, j, run_ + k)) run_[k] = -1;
    }
  }

  // Finds them; called by all threads. Needs a barrier before anything is done with them.
  template <class Query>
  __device__ __forceinline__ void find(const Query& query) {
    __shared__ int warps[kThreads / 32];
    __shared__ uint32_t found[Shares::kRuns];
    found_ = found;
    uint32_t flags[kPasses];
    bool in_words = false;
    if constexpr (kHasWords<Query>) in_words = query.is_pointwise();
    if (in_words) {
      uint64_t bytes[kPasses];
#pragma unroll
      for (int k = 0; k < kPasses; ++k) {
        bytes[k] = 0;
        if constexpr (kHasWords<Query>)
          if (run_[k] >= 0) bytes[k] = query.eight_sites(run_[k]);
      }
#pragma unroll
      for (int k = 0; k < kPasses; ++k) flags[k] = bits_of(bytes[k]);
    } else {
      Flags all = 0;
#pragma unroll 1
      for (int k = 0; k < kPasses && k * kThreads * shares_.count < shares_.runs; ++k) {
        int run;
        if (!shares_.find(share_, static_cast<int>(threadIdx.x) + k * kThreads, &run)) continue;
        const Position at = first_of(run);
        all |= static_cast<Flags>(flags_of(query, at, min(kFlags, shares_.w - at.x), 0))
               << (k * kFlags);
      }
#pragma unroll
      for (int k = 0; k < kPasses; ++k) flags[k] = static_cast<uint32_t>(all >> (k * kFlags)) & 0xff;
    }
    int sites = 0, runs = 0;
#pragma unroll
    for (int k = 0; k < kPasses; ++k) {
      sites += __popc(flags[k]);
      runs += flags[k] != 0 ? 1 : 0;
    }
    int all;
    const int before = sum_before<kThreads>(runs << 16 | sites, warps, &all);
    size_ = all & 0xffff;
    runs_ = all >> 16;
    sites = before & 0xffff;
    runs = before >> 16;
#pragma unroll
    for (int k = 0; k < kPasses; ++k) {
      if (flags[k] == 0) continue;
      const auto j = static_cast<uint32_t>(threadIdx.x) + k * kThreads;
      found[runs++] = j << kRunShift | flags[k] << kBeforeBits | static_cast<uint32_t>(sites);
      sites += __popc(flags[k]);
    }
  }
  __device__ __forceinline__ int size() const { return size_; }

  // use(i, j, bit) for each candidate: it is number i, from `from` up to `to`, and lies in the
  // share's run j. Called by all threads; each takes some.
  template <class Use>
  __device__ __forceinline__ void each(int from, int to, const Use& use) const {
    const int bit = static_cast<int>(threadIdx.x) % kFlags;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x) / kFlags; i < runs_; i += kThreads / kFlags) {
      const uint32_t run = found_[i], flags = run >> kBeforeBits;
      const int number = static_cast<int>(run & ((1u << kBeforeBits) - 1)) +
                         __popc(flags & ((1u << bit) - 1));
      if ((flags >> bit & 1) == 0 || number < from || number >= to) continue;
      use(number, static_cast<int>(run >> kRunShift), bit);
    }
  }
  // Lists number `from` to from + kRoom, as Shares::site takes them; needs a barrier before they
  // are read.
  template <int kRoom>
  __device__ __forceinline__ void list(int from, uint16_t (&entries)[kRoom]) const {
    __syncthreads();
    each(from, from + kRoom, [&](int i, int j, int bit) {
      entries[i - from] = static_cast<uint16_t>(j * kFlags + bit);
    });
  }
  // Where the first site of the share's run j lies.
  __device__ __forceinline__ Position place_of(int j) const {
    int run = 0;
    shares_.find(share_, j, &run);
    return first_of(run);
  }

 private:
  __device__ __forceinline__ Position first_of(int run) const {
    const int row = shares_.per_row.divide(run), stream = shares_.h.divide(row);
    return {stream, row - stream * shares_.h.value,
            (run - row * shares_.per_row.value) * kFlags};
  }

  const Shares& shares_;
  int share_;
  int run_[kPasses];  // -1: there is none
  const uint32_t* found_;
  int size_, runs_;
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
