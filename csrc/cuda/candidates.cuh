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

// Entries hold a site; the top bit is free for the op, to mark sites that it made active. An op may
// have several parts, one after another: a part's candidates stand at [*begin, *end), and its
// reader puts *end down in *next_begin.
struct CandidateList {
  int32_t* entries;
  int64_t* end;          // the op's counts[0]
  const int32_t* begin;  // null: 0
  int32_t* next_begin;   // null: this is the last part

  __device__ int first() const { return begin != nullptr ? *begin : 0; }
  // Called by the reader, once its inputs are there.
  __device__ int last() const {
    const int value = static_cast<int>(*end);
    if (next_begin != nullptr && blockIdx.x == 0 && threadIdx.x == 0) *next_begin = value;
    return value;
  }
};
constexpr uint32_t kActiveBit = 0x80000000u;
__device__ __forceinline__ int site_in(int32_t entry) {
  return static_cast<int>(static_cast<uint32_t>(entry) & ~kActiveBit);
}

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

// Bit i: byte i is set. The bytes are 0 or 1.
__device__ __forceinline__ uint32_t bits_of(uint64_t bytes) {
  return static_cast<uint32_t>((bytes & 0x0101010101010101ull) * 0x0102040810204080ull >> 56);
}

// The same of two words.
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
  // The first site of a run, as an index, and what the query says of the run.
  template <class Query>
  __device__ uint32_t flags(const Query& query, int run, int* site) const {
    const int row = per_row.divide(run), stream = rows.divide(row);
    const int x = (run - row * per_row.value) * kFlags;
    *site = row * w + x;
    const Position at{stream, row - stream * h, x};
    return flags_of(query, at, min(kFlags, w - x), 0);
  }
};

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

template <class Query>
__global__ void __launch_bounds__(kListThreads)
    list_kernel(const __grid_constant__ Query query, SiteRuns runs, CandidateList list) {
  __shared__ int warps[kListThreads / 32];
  __shared__ int first;
  wait_for_inputs();
  const int run = static_cast<int>(blockIdx.x) * kListThreads + static_cast<int>(threadIdx.x);
  int site = 0, total = 0;
  uint32_t flags = run < runs.count() ? runs.flags(query, run, &site) : 0;
  const int before = sum_before<kListThreads>(__popc(flags), warps, &total);
  if (total == 0) return;
  if (threadIdx.x == 0)
    first =
        static_cast<int>(atomicAdd(reinterpret_cast<Count*>(list.end), static_cast<Count>(total)));
  __syncthreads();
  int32_t* to = list.entries + first + before;
  for (; flags != 0; flags &= flags - 1) *to++ = site + __ffs(static_cast<int>(flags)) - 1;
}

// Appends the candidates of an op whose accumulator is `acc`.
template <class Query>
cudaError_t list_candidates(const Query& query, const FeatureMap& acc, const CandidateList& list,
                            cudaStream_t stream) {
  const SiteRuns runs(acc);
  const int blocks = (runs.count() + kListThreads - 1) / kListThreads;
  return launch(list_kernel<Query>, {blocks, kListThreads}, stream, query, runs, list);
}

}  // namespace deltafx::cuda
