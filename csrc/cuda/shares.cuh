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

  // The index of run `j` of a share; false: it has no such run.
  __device__ __forceinline__ bool find(int share, int j, int* run) const {
    int of_turn = share + static_cast<int>(__umulhi(static_cast<unsigned>(j) * 0x9e3779b9u,
                                                    static_cast<unsigned>(count)));
    if (of_turn >= count) of_turn -= count;
    *run = j * count + of_turn;
    return *run < runs;
  }
};

// Whether a query answers for whole runs: is_pointwise() and eight_sites(), where a run is eight
// bytes of its masks; has_places(), place() and flags_at(), where it is a few words of them.
template <class Query, class = void>
struct RunAnswers {
  static constexpr bool kHas = false;
  struct Place {};
};
template <class Query>
struct RunAnswers<Query, std::void_t<typename Query::Place>> {
  static constexpr bool kHas = true;
  using Place = typename Query::Place;
};

// The candidates in the share of a block of kThreads. They are listed by their runs, for a thread
// that would put down one site after the other takes longer than all else here.
template <int kThreads, class Query>
class OwnCandidates {
  static constexpr bool kAnswers = RunAnswers<Query>::kHas;
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
  // Nothing here depends on the kernel before this one.
  __device__ __forceinline__ OwnCandidates(const Query& query, const Shares& shares, int share)
      : query_(query), shares_(shares), share_(share) {
    turn_to(0);
    work_out(has_run_, run_, row_, n_);
    if constexpr (kAnswers) {
      if (!query.has_places()) return;
      place_ = query.place(first_site());
      work_out(place_.rows, place_.columns, place_.shift,
               static_cast<int>(reinterpret_cast<uintptr_t>(place_.from) >> 33));
    }
  }

  // Finds them; called by all threads. Needs a barrier before anything is done with them.
  __device__ __forceinline__ void find() {
    __shared__ int warps[kThreads / 32];
    __shared__ Run found[Shares::kRuns];
    found_ = found;
    const int passes = (shares_.most + kThreads - 1) / kThreads;
    Flags all = 0;
    bool in_words = false;
    if constexpr (kAnswers) in_words = query_.is_pointwise();
    if (in_words) {
      if constexpr (kAnswers) all = passes == 1 ? words<1>() : words<kPasses>();
    } else {
#pragma unroll 1
      for (int k = 0; k < passes; ++k) {
        if (k > 0) turn_to(k);
        if (has_run_ != 0) all |= static_cast<Flags>(flags(k)) << (k * kFlags);
      }
      if (passes > 1) turn_to(0);
    }
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
  // To the thread's run of pass k.
  __device__ __forceinline__ void turn_to(int k) {
    has_run_ = shares_.find(share_, static_cast<int>(threadIdx.x) + k * kThreads, &run_) ? 1 : 0;
    row_ = shares_.per_row.divide(run_);
    n_ = shares_.h.divide(row_);
  }
  __device__ __forceinline__ Position first_site() const {
    return {n_, row_ - n_ * shares_.h.value, (run_ - row_ * shares_.per_row.value) * kFlags};
  }
  // Of the run of pass k.
  __device__ __forceinline__ uint32_t flags(int k) const {
    const Position at = first_site();
    const int count = min(kFlags, shares_.w - at.x);
    if constexpr (kAnswers)
      if (query_.has_places())
        return query_.flags_at(k == 0 ? place_ : query_.place(at)) & ((1u << count) - 1);
    return flags_of(query_, at, count, 0);
  }
  template <int kUsed>
  __device__ __forceinline__ Flags words() const {
    uint64_t bytes[kUsed];
#pragma unroll
    for (int k = 0; k < kUsed; ++k) {
      int run = run_;
      const bool has_run =
          k == 0 ? has_run_ != 0
                 : shares_.find(share_, static_cast<int>(threadIdx.x) + k * kThreads, &run);
      bytes[k] = has_run ? query_.eight_sites(run) : 0;
    }
    Flags all = 0;
#pragma unroll
    for (int k = 0; k < kUsed; ++k) all |= static_cast<Flags>(bits_of(bytes[k])) << (k * kFlags);
    return all;
  }
  static __device__ __forceinline__ uint32_t flags_in(Flags all, int k) {
    return static_cast<uint32_t>(all >> (k * kFlags)) & ((1u << kFlags) - 1);
  }
  static __device__ __forceinline__ int count_of(uint32_t v) { return __popc(v); }
  static __device__ __forceinline__ int count_of(uint64_t v) { return __popcll(v); }

  const Query& query_;
  const Shares& shares_;
  int share_;
  int has_run_, run_, row_, n_;              // of the pass that is on
  typename RunAnswers<Query>::Place place_;  // of pass 0
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
