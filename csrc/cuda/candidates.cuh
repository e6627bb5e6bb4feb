// Candidate lists on the device: a kernel appends the candidates of an op to its list, counting
// them in the op's counts[0], which clear_masks has cleared. No count ever leaves the device. Sites
// that a thread finds stay together and in order; nothing depends on the order of the rest.
#pragma once

#include "cuda/device.cuh"
#include "cuda/launch.h"

namespace deltafx::cuda {

constexpr int kListThreads = 256;
constexpr int kFlags = 8;  // neighbouring sites that a thread looks at together

using Count = unsigned long long;
__device__ __forceinline__ void add_to(int64_t* count, int more) {
  atomicAdd(reinterpret_cast<Count*>(count), static_cast<Count>(more));
}

// Each block of a kernel that makes lists says when it is done, in the counts[1] of each reader.
__device__ __forceinline__ void add_done(int64_t* counts) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 700
  asm volatile("red.release.gpu.global.add.u64 [%0], 1;" ::"l"(counts + 1) : "memory");
#endif
}

// An op may have several parts, one after another: a part's candidates stand at [*begin, *end), and
// its reader puts *end down in *next_begin.
struct CandidateList {
  int32_t* entries;      // sites
  int64_t* end;          // the op's counts[0]
  const int32_t* begin;  // null: 0
  int32_t* next_begin;   // null: this is the last part

  // These are called by the reader, once the list is there. Past L1, which may hold what a frame
  // before left at these places, if the list is read before the reader's other inputs are there.
  __device__ int first() const { return begin != nullptr ? __ldcg(begin) : 0; }
  __device__ int entry(int i) const { return __ldcg(entries + i); }
  // Waits for so many blocks that make the list and have begun; by all threads. At the latest until
  // all that comes before the kernel is done, so that a list that nobody makes does no harm.
  __device__ __forceinline__ void wait_until_done(int blocks) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 700
    constexpr int kTries = 1 << 20;
    for (int i = 0; i < kTries; ++i) {
      int64_t done;
      asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(done) : "l"(end + 1) : "memory");
      if (done >= blocks) return;
    }
#endif
    wait_for_inputs();
  }
  __device__ int last() const {
    const int value = static_cast<int>(__ldcg(end));
    if (next_begin != nullptr && blockIdx.x == 0 && threadIdx.x == 0) *next_begin = value;
    return value;
  }
};

// The list of part `part` of an op of `parts`; `memory` has list_ints(sites) ints.
constexpr int kListHeader = 4;  // two of them hold the beginnings of even and odd parts
inline CandidateList list_in(int32_t* memory, int64_t* counts, int part = 0, int parts = 1) {
  return {memory + kListHeader, counts, part > 0 ? memory + part % 2 : nullptr,
          part + 1 < parts ? memory + (part + 1) % 2 : nullptr};
}

// Bytes x to x + 7 of a row of a mask, row = n * h + y; 0 outside of it.
__device__ __forceinline__ uint64_t eight_bytes(const Mask& mask, int row, int x) {
  const int w = static_cast<int>(mask.w);
  if (x <= -8 || x >= w) return 0;
  const uint8_t* from = mask.data + static_cast<int64_t>(row) * w + x;
  const auto address = reinterpret_cast<uintptr_t>(from);
  const auto* words = reinterpret_cast<const uint64_t*>(address & ~uintptr_t{7});
  const unsigned shift = address % 8 * 8;
  uint64_t v = 0;
  if (reinterpret_cast<const uint8_t*>(words) >= mask.data &&
      reinterpret_cast<const uint8_t*>(words + (shift != 0 ? 2 : 1)) <=
          mask.data + mask.n * mask.h * mask.w) {
    v = words[0] >> shift;
    if (shift != 0) v |= words[1] << (64 - shift);
  } else {
#pragma unroll 1
    for (int i = 0; i < 8; ++i)
      if (x + i >= 0 && x + i < w) v |= static_cast<uint64_t>(from[i]) << (8 * i);
  }
  if (x < 0) v = v >> (-8 * x) << (-8 * x);
  if (x + 8 > w) v &= ~uint64_t{0} >> (8 * (x + 8 - w));
  return v;
}

// Bytes 0, 2, 4 and 6 of `low`, and then those of `high`.
__device__ __forceinline__ uint64_t even_bytes(uint64_t low, uint64_t high) {
  const uint32_t a =
      __byte_perm(static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), 0x6420);
  const uint32_t b =
      __byte_perm(static_cast<uint32_t>(high), static_cast<uint32_t>(high >> 32), 0x6420);
  return a | static_cast<uint64_t>(b) << 32;
}

// Bit i: byte i is set. The bytes are 0 or 1.
__device__ __forceinline__ uint32_t bits_of(uint64_t bytes) {
  return static_cast<uint32_t>((bytes & 0x0101010101010101ull) * 0x0102040810204080ull >> 56);
}

// The same of one word, and of two.
__device__ __forceinline__ uint32_t bits_of(uint32_t bytes) {
  return __dp4a(bytes, 0x08040201u, 0u);
}
__device__ __forceinline__ uint32_t bits_of(uint2 bytes) {
  return __dp4a(bytes.y, 0x80402010u, __dp4a(bytes.x, 0x08040201u, 0u));
}

// What makes an output site a candidate, where that is the site itself.
struct SiteQuery {
  Mask mask;
  __device__ uint32_t flags(const Position& at, int count) const {
    const uint64_t bytes = eight_bytes(mask, at.n * static_cast<int>(mask.h) + at.y, at.x);
    return bits_of(bytes) & ((1u << count) - 1);
  }
};

// Which of the `count` sites from `at` on, in a row, a query finds; a query answers for all of them
// or, where it has no flags(), for one.
template <class Query>
__device__ __forceinline__ auto flags_of(const Query& query, const Position& at, int count, int)
    -> decltype(query.flags(at, count)) {
  return query.flags(at, count);
}
template <class Query>
__device__ __forceinline__ uint32_t flags_of(const Query& query, Position at, int count, long) {
  uint32_t flags = 0;
  for (int i = 0; i < count; ++i, ++at.x) flags |= (query(at) ? 1u : 0u) << i;
  return flags;
}

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

// What a query says of a run of sites, in two steps: where its masks are read is worked out before
// they are there.
template <class Query>
class RunQuestion {
  using Answers = RunAnswers<Query>;

 public:
  __device__ __forceinline__ RunQuestion() {}
  // The run's number, its first site, and how many sites it has.
  __device__ __forceinline__ RunQuestion(const Query& query, int run, const Position& first,
                                         int count)
      : query_(&query), run_(run), first_(first), count_(count) {
    work_out(run_, first_.n, first_.y, first_.x);
    if constexpr (Answers::kHas) {
      if (!query.has_places()) return;
      place_ = query.place(first);
      work_out(place_.rows, place_.columns, place_.shift,
               static_cast<int>(reinterpret_cast<uintptr_t>(place_.from) >> 33));
    }
  }

  // Bit i: its site i is one.
  __device__ __forceinline__ uint32_t flags() const {
    if constexpr (Answers::kHas) {
      if (query_->is_pointwise()) return bits_of(query_->eight_sites(run_));
      return query_->has_places() ? query_->flags_at(place_) & ((1u << count_) - 1)
                                  : query_->other_flags(first_, count_);
    } else {
      return flags_of(*query_, first_, count_, 0);
    }
  }

 private:
  const Query* query_;
  int run_;
  Position first_;
  int count_;
  typename Answers::Place place_;
};

// The sites [n, h, w] in runs of kFlags of a row.
struct SiteRuns {
  int h, w, size;
  Divisor per_row, rows;
  SiteRuns() = default;
  explicit SiteRuns(const FeatureMap& map)
      : h(static_cast<int>(map.h)),
        w(static_cast<int>(map.w)),
        size(static_cast<int>(map.n * map.h) * ((w + kFlags - 1) / kFlags)),
        per_row((w + kFlags - 1) / kFlags),
        rows(h) {}
  __host__ __device__ int count() const { return size; }
  // The first site of a run, as an index and by its coordinates, and how many sites the run has.
  __device__ int first(int run, Position* at, int* sites) const {
    const int row = per_row.divide(run), stream = rows.divide(row);
    const int x = (run - row * per_row.value) * kFlags;
    *at = {stream, row - stream * h, x};
    *sites = min(kFlags, w - x);
    return row * w + x;
  }
};

// Of the kernel that lists them.
inline int list_blocks(const SiteRuns& runs) {
  return (runs.count() + kListThreads - 1) / kListThreads;
}

// The sum over the threads before this one; *total: over all threads of the block.
template <int kThreads>
__device__ __forceinline__ int sum_before(int value, int (&warps)[kThreads / 32], int* total) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int below = __shfl_up_sync(kAllLanes, sum, step);
    if (lane >= step) sum += below;
  }
  if (lane == 31) warps[warp] = sum;
  __syncthreads();
  int before = sum - value, all = 0;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) {
    if (i < warp) before += warps[i];
    all += warps[i];
  }
  *total = all;
  return before;
}

// A list that is made along with another over the same sites: of what that holds, and of the sites
// where `mask` is set, at a multiple of `stride`, 1 or 2.
struct FurtherList {
  Mask mask;  // no data: none
  int stride;
  CandidateList list;

  __device__ uint32_t flags(const Position& at, int count) const {
    if (mask.data == nullptr) return 0;
    const int row = at.n * static_cast<int>(mask.h) + at.y * stride, x = at.x * stride;
    uint64_t bytes = eight_bytes(mask, row, x);
    if (stride == 2) bytes = even_bytes(bytes, eight_bytes(mask, row, x + kFlags));
    return bits_of(bytes) & ((1u << count) - 1);
  }
};
template <int kCount>
struct FurtherLists {
  FurtherList lists[kCount];
};
template <>
struct FurtherLists<0> {};

// Of a list that is read before all else that its readers wait for: operators besides the one whose
// counts it ends in that have the same candidates.
struct ListReaders {
  static constexpr int kMost = 2;
  bool any;                // false: nobody reads it before the kernel that makes it is done
  int64_t* counts[kMost];  // null: none

  __device__ void add(int found) const {
    const int i = static_cast<int>(threadIdx.x) / 32 - 1;
    if (threadIdx.x % 32 == 0 && i >= 0 && i < kMost && counts[i] != nullptr)
      add_to(counts[i], found);
  }
  // Tells them that this block is done; by all threads, behind a barrier.
  __device__ void tell(const CandidateList& list) const {
    const int i = static_cast<int>(threadIdx.x) / 32 - 1;
    if (!any || threadIdx.x % 32 != 0 || i >= kMost) return;
    if (i < 0)
      add_done(list.end);
    else if (counts[i] != nullptr)
      add_done(counts[i]);
  }
};

// In each of the lists a block's sites stand together.
template <class Query, int kFurther>
__global__ void __launch_bounds__(kListThreads)
    list_kernel(const __grid_constant__ Query query, SiteRuns runs, CandidateList list,
                const __grid_constant__ FurtherLists<kFurther> further,
                const __grid_constant__ ListReaders readers) {
  constexpr int kLists = 1 + kFurther;
  constexpr int kFlagsShift = 16;
  struct Run {
    int first;      // site
    uint32_t bits;  // which of its sites are candidates; how many those of the runs before are
  };
  __shared__ int warps[kLists][kListThreads / 32];
  __shared__ Run found[kLists][kListThreads];
  __shared__ int begin[kLists];
  const int tid = static_cast<int>(threadIdx.x);
  const int run = static_cast<int>(blockIdx.x) * kListThreads + tid;
  Position at;
  int sites;
  const int site = runs.first(run, &at, &sites);
  const RunQuestion<Query> question(query, run, at, sites);
  wait_for_inputs();
  uint32_t flags[kLists] = {};
  if (run < runs.count()) {
    flags[0] = question.flags();
    if constexpr (kFurther > 0) {
#pragma unroll
      for (int i = 0; i < kFurther; ++i)
        flags[1 + i] = flags[0] | further.lists[i].flags(at, sites);
    }
  }
  // Runs in the upper half of a number, sites in the lower.
  int total[kLists], any = 0;
#pragma unroll
  for (int i = 0; i < kLists; ++i) {
    const int own = (flags[i] != 0 ? 1 << 16 : 0) | __popc(flags[i]);
    const int before = sum_before<kListThreads>(own, warps[i], &total[i]);
    if (flags[i] != 0) found[i][before >> 16] = {site, flags[i] << kFlagsShift | (before & 0xffff)};
    any |= total[i];
  }
  const auto list_number = [&](int i) -> const CandidateList& {
    if constexpr (kFurther > 0) {
      if (i > 0) return further.lists[i - 1].list;
    }
    return list;
  };
  const auto tell = [&] {
    readers.tell(list);
    if constexpr (kFurther > 0) {
#pragma unroll
      for (int i = 1; i < kLists; ++i)
        if (tid == 0) add_done(list_number(i).end);
    }
  };
  if (any == 0) return tell();
#pragma unroll
  for (int i = 0; i < kLists; ++i)
    if (tid == 32 * i && total[i] > 0)
      begin[i] = static_cast<int>(atomicAdd(reinterpret_cast<Count*>(list_number(i).end),
                                            static_cast<Count>(total[i] & 0xffff)));
  readers.add(total[0] & 0xffff);
  __syncthreads();
  // A thread for a site: one that put down a run would take as long as all else here.
  const int bit = tid % kFlags;
#pragma unroll
  for (int i = 0; i < kLists; ++i) {
#pragma unroll 1
    for (int j = tid / kFlags; j < total[i] >> 16; j += kListThreads / kFlags) {
      const Run of = found[i][j];
      const uint32_t candidates = of.bits >> kFlagsShift;
      if ((candidates >> bit & 1) == 0) continue;
      const int before =
          static_cast<int>(of.bits & 0xffff) + __popc(candidates & ((1u << bit) - 1));
      list_number(i).entries[begin[i] + before] = of.first + bit;
    }
  }
  if (readers.any) __syncthreads();
  tell();
}

// Appends the candidates of an op whose accumulator is `acc`, and those of further lists.
template <class Query, int kFurther = 0>
cudaError_t list_candidates(const Query& query, const FeatureMap& acc, const CandidateList& list,
                            cudaStream_t stream, const FurtherLists<kFurther>& further = {},
                            const ListReaders& readers = {}) {
  const SiteRuns runs(acc);
  const int blocks = list_blocks(runs);
  return launch(list_kernel<Query, kFurther>, {blocks, kListThreads}, stream, query, runs, list,
                further, readers);
}

}  // namespace deltafx::cuda
