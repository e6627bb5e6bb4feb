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
  static constexpr int kRuns = 1024;          // of a share, at most
  static constexpr int kMostWidth = 1 << 14;  // of a map

  int count;
  int most;     // runs of a share
  int runs, w;  // of the map
  Divisor per_row, h;

  Shares() = default;
  // wanted: how many there should be; more, where a block could not look at all of its share. None
  // of a map that is too wide.
  Shares(const FeatureMap& map, int wanted)
      : w(static_cast<int>(map.w)), per_row((w + kFlags - 1) / kFlags), h(static_cast<int>(map.h)) {
    runs = static_cast<int>(map.n * map.h) * per_row.value;
    count = w > kMostWidth ? 0 : std::max({1, std::min(wanted, runs), (runs + kRuns - 1) / kRuns});
    most = count > 0 ? (runs + count - 1) / count : 0;
  }

  __host__ __device__ bool any() const { return count > 0; }
  // The index of run `j` of a share; false: it has no such run.
  __device__ __forceinline__ bool find(int share, int j, int* run) const {
    int of_turn = share + static_cast<int>(__umulhi(static_cast<unsigned>(j) * 0x9e3779b9u,
                                                    static_cast<unsigned>(count)));
    if (of_turn >= count) of_turn -= count;
    *run = j * count + of_turn;
    return *run < runs;
  }
};

// The candidates in the share of a block of kThreads. They are listed by their runs, for a thread
// that would put down one site after the other takes longer than all else here.
template <int kThreads, class Query>
class OwnCandidates {
  static constexpr int kPasses = Shares::kRuns / kThreads;  // a thread has so many runs at most
  using Flags = std::conditional_t<kPasses * kFlags <= 32, uint32_t, uint64_t>;
  static_assert(kPasses * kFlags <= 64, "a thread's flags are one word");

  // A run with candidates, in a row y + n * h of the map.
  struct Run {
    static constexpr int kBeforeBits = 13, kXShift = kBeforeBits + kFlags;
    static_assert(Shares::kRuns * kFlags <= 1 << kBeforeBits, "the last run's sites before it");
    static_assert(Shares::kMostWidth / kFlags <= 1 << (32 - kXShift), "a run's number in its row");
    int row;
    uint32_t bits;  // its number in the row; its candidates; how many those of runs before are
  };

 public:
  __device__ __forceinline__ OwnCandidates(const Query& query, const Shares& shares, int share)
      : query_(query), shares_(shares), share_(share) {}

  // Called before find; nothing here depends on the kernel before this one.
  __device__ __forceinline__ void prepare() {
    has_run_ = turn_to(0);
    question_ = question();
  }

  // Finds them; called by all threads. Needs a barrier before anything is done with them.
  __device__ __forceinline__ void find() {
    __shared__ int warps[kThreads / 32];
    __shared__ Run found[Shares::kRuns];
    found_ = found;
    const int passes = (shares_.most + kThreads - 1) / kThreads;
    Flags all = 0;
    bool has_run = has_run_;
#pragma unroll 1
    for (int k = 0; k < passes; ++k) {  // the query's code only once, for it is long
      if (k > 0 && (has_run = turn_to(k))) question_ = question();
      if (has_run) all |= static_cast<Flags>(question_.flags()) << (k * kFlags);
    }
    if (passes > 1) turn_to(0);
    int sites = count_of(all), runs = 0;
#pragma unroll 1
    for (int k = 0; k < passes; ++k) runs += flags_in(all, k) != 0 ? 1 : 0;
    int totals;
    const int before = sum_before<kThreads>(runs << 16 | sites, warps, &totals);
    size_ = totals & 0xffff;
    runs_ = totals >> 16;
    sites = before & 0xffff;
    runs = before >> 16;
#pragma unroll 1
    for (int k = 0; k < passes; ++k) {
      const uint32_t flags = flags_in(all, k);
      if (flags == 0) continue;
      if (k > 0) turn_to(k);
      const int x = run_ - row_ * shares_.per_row.value;
      found[runs++] = {row_, static_cast<uint32_t>(x) << Run::kXShift | flags << Run::kBeforeBits |
                                 static_cast<uint32_t>(sites)};
      sites += __popc(flags);
    }
  }
  __device__ __forceinline__ int size() const { return size_; }

  // use(i, row, x) for each candidate: it is number i, from `from` up to `to`, and site x of the
  // map's row y + n * h. Called by all threads; each takes some.
  template <class Use>
  __device__ __forceinline__ void each(int from, int to, const Use& use) const {
    const int bit = static_cast<int>(threadIdx.x) % kFlags;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x) / kFlags; i < runs_; i += kThreads / kFlags) {
      const Run run = found_[i];
      const uint32_t flags = run.bits >> Run::kBeforeBits;
      const int number = static_cast<int>(run.bits & ((1u << Run::kBeforeBits) - 1)) +
                         __popc(flags & ((1u << bit) - 1));
      if ((flags >> bit & 1) == 0 || number < from || number >= to) continue;
      use(number, run.row, static_cast<int>(run.bits >> Run::kXShift) * kFlags + bit);
    }
  }
  // Lists the sites of number `from` to from + kRoom; needs a barrier before they are read.
  template <int kRoom>
  __device__ __forceinline__ void list(int from, int (&sites)[kRoom]) const {
    __syncthreads();
    each(from, from + kRoom, [&](int i, int row, int x) { sites[i - from] = row * shares_.w + x; });
  }

 private:
  // To the thread's run of pass k; false: there is none.
  __device__ __forceinline__ bool turn_to(int k) {
    const bool has_run = shares_.find(share_, static_cast<int>(threadIdx.x) + k * kThreads, &run_);
    row_ = shares_.per_row.divide(run_);
    return has_run;
  }
  __device__ __forceinline__ RunQuestion<Query> question() const {
    const int n = shares_.h.divide(row_), x = (run_ - row_ * shares_.per_row.value) * kFlags;
    return {query_, run_, {n, row_ - n * shares_.h.value, x}, min(kFlags, shares_.w - x)};
  }
  static __device__ __forceinline__ uint32_t flags_in(Flags all, int k) {
    return static_cast<uint32_t>(all >> (k * kFlags)) & ((1u << kFlags) - 1);
  }
  static __device__ __forceinline__ int count_of(uint32_t v) { return __popc(v); }
  static __device__ __forceinline__ int count_of(uint64_t v) { return __popcll(v); }

  const Query& query_;
  const Shares& shares_;
  int share_;
  int run_, row_;  // of the pass that is on
  bool has_run_;   // in pass 0, of which the question is
  RunQuestion<Query> question_;
  const Run* found_;
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
