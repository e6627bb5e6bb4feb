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
  int most;     // runs of a share
  int runs, w;  // of the map
  Divisor per_row, h;

  Shares() = default;
  // wanted: how many there should be; more, where a block could not look at all of its share.
  Shares(const FeatureMap& map, int wanted)
      : w(static_cast<int>(map.w)), per_row((w + kFlags - 1) / kFlags), h(static_cast<int>(map.h)) {
    runs = static_cast<int>(map.n * map.h) * per_row.value;
    count = std::max({1, std::min(wanted, runs), (runs + kRuns - 1) / kRuns});
    most = (runs + count - 1) / count;
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

// The candidates in the share of a block of kThreads.
template <int kThreads, class Query>
class OwnCandidates {
  static constexpr int kPasses = Shares::kRuns / kThreads;  // a thread has so many runs at most
  using Flags = std::conditional_t<kPasses * kFlags <= 32, uint32_t, uint64_t>;
  static_assert(kPasses * kFlags <= 64, "a thread's flags are one word");

 public:
  __device__ __forceinline__ OwnCandidates(const Query& query, const Shares& shares, int share)
      : query_(query), shares_(shares), share_(share) {}

  // Called before find; nothing here depends on the kernel before this one.
  __device__ __forceinline__ void prepare() {
    const Turn turn = turn_of(0);
    has_run_ = turn.has_run;
    first_ = turn.first(shares_);
    question_ = question(turn);
  }

  // Finds them; called by all threads.
  __device__ __forceinline__ void find() {
    __shared__ int warps[kThreads / 32];
    all_ = 0;
    bool has_run = has_run_;
#pragma unroll 1
    for (int k = 0; k < passes(); ++k) {  // the query's code only once, for it is long
      if (k > 0) {
        const Turn turn = turn_of(k);
        has_run = turn.has_run;
        question_ = question(turn);
      }
      if (has_run) all_ |= static_cast<Flags>(question_.flags()) << (k * kFlags);
    }
    before_ = sum_before<kThreads>(count_of(all_), warps, &size_);
  }
  __device__ __forceinline__ int size() const { return size_; }

  // Lists the sites of number `from` to from + kRoom, one after another from those before on;
  // called by all threads. Needs a barrier before they are read.
  template <int kRoom>
  __device__ __forceinline__ void list(int from, int (&sites)[kRoom]) {
    if (from > 0) __syncthreads();
    if (all_ == 0) return;
    int at = before_ - from;
#pragma unroll 1
    for (int k = 0; k < passes(); ++k) {
      const uint32_t flags = static_cast<uint32_t>(all_ >> (k * kFlags));
      const int first = k == 0 ? first_ : turn_of(k).first(shares_);
#pragma unroll
      for (int bit = 0; bit < kFlags; ++bit) {
        const bool found = (flags >> bit & 1) != 0;
        if (found && static_cast<unsigned>(at) < kRoom) sites[at] = first + bit;
        at += found ? 1 : 0;
      }
    }
  }

 private:
  // The thread's run of a pass, and the map's row y + n * h that it is in.
  struct Turn {
    int run, row;
    bool has_run;
    __device__ __forceinline__ int x(const Shares& shares) const {
      return (run - row * shares.per_row.value) * kFlags;
    }
    __device__ __forceinline__ int first(const Shares& shares) const {
      return row * shares.w + x(shares);
    }
  };
  __device__ __forceinline__ Turn turn_of(int k) const {
    Turn turn;
    turn.has_run = shares_.find(share_, static_cast<int>(threadIdx.x) + k * kThreads, &turn.run);
    turn.row = shares_.per_row.divide(turn.run);
    return turn;
  }
  __device__ __forceinline__ RunQuestion<Query> question(const Turn& turn) const {
    const int n = shares_.h.divide(turn.row), x = turn.x(shares_);
    return {query_, turn.run, {n, turn.row - n * shares_.h.value, x}, min(kFlags, shares_.w - x)};
  }
  __device__ __forceinline__ int passes() const { return (shares_.most + kThreads - 1) / kThreads; }
  static __device__ __forceinline__ int count_of(uint32_t v) { return __popc(v); }
  static __device__ __forceinline__ int count_of(uint64_t v) { return __popcll(v); }

  const Query& query_;
  const Shares& shares_;
  int share_;
  bool has_run_;  // in pass 0, of which the next two are
  int first_;     // the run's first site
  RunQuestion<Query> question_;
  Flags all_;  // of all passes, one after another
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
