// The candidates of a small map, found by a block for itself and listed in shared memory: instead
// of a list in global memory, which is another launch.
#pragma once

#include "cuda/candidates.cuh"

namespace deltafx::cuda {

constexpr int kOwnRuns = 1024;  // runs of kFlags sites at most
constexpr int kOwnListBytes = kOwnRuns * kFlags * static_cast<int>(sizeof(uint16_t));
constexpr int kOwnMaskBytes = 40 * 1024;  // of the inputs' masks, together

// Windows take longer than single sites, so that a list pays earlier.
inline bool can_list_itself(const FeatureMap& map, const Mask& x, const Mask& residual,
                            bool pointwise) {
  const int64_t bytes = x.sites() + (residual.data ? residual.sites() : 0);
  return SiteRuns(map).count() <= (pointwise ? kOwnRuns : kOwnRuns / 4) &&
         bytes + 96 <= kOwnMaskBytes;
}

// Copies a mask to `to`, at the place in 16 bytes where it is in memory, with slack around it, and
// advances `to` beyond it. True if the thread saw an active site.
template <int kThreads>
__device__ __forceinline__ bool copy_mask(Mask& mask, char*& to) {
  if (mask.data == nullptr) return false;
  const int bytes = static_cast<int>(mask.n * mask.h * mask.w), tid = static_cast<int>(threadIdx.x);
  const auto shift = static_cast<int>(reinterpret_cast<uintptr_t>(mask.data) % 16);
  const uint8_t* from = mask.data;
  unsigned any = 0;
  auto* copy = reinterpret_cast<uint8_t*>(to) + 16 + shift;
  const int head = min(bytes, (16 - shift) % 16), vectors = (bytes - head) / 16;
#pragma unroll 4
  for (int i = tid; i < vectors; i += kThreads) {
    const uint4 v = reinterpret_cast<const uint4*>(from + head)[i];
    reinterpret_cast<uint4*>(copy + head)[i] = v;
    any |= v.x | v.y | v.z | v.w;
  }
  if (tid < head) any |= copy[tid] = from[tid];
  const int tail = head + vectors * 16 + tid;
  if (tid < 16 && tail < bytes) any |= copy[tail] = from[tail];
  to += 16 + (shift + bytes + 15) / 16 * 16;
  mask.data = copy;
  return any != 0;
}

// A query of masks that copy_mask made.
template <class Query>
struct Slack {
  const Query& query;
  __device__ uint32_t flags(const Position& at, int count) const {
    return query.template flags<true>(at, count);
  }
};

// Lists the candidates; returns their number, and writes it down. `scratch`: kOwnMaskBytes
// of shared memory at a multiple of 16, free again afterwards.
template <int kThreads, class Query>
__device__ __forceinline__ int list_own(Query query, const SiteRuns& runs, const Output& out,
                                        char* scratch, uint16_t* list) {
  __shared__ int warps[kThreads / 32];
  constexpr int kRunsOfThread = kOwnRuns / kThreads;
  static_assert(kRunsOfThread * kFlags <= 64, "a thread's flags are one word");
  const int tid = static_cast<int>(threadIdx.x);
  uint64_t flags = 0;
  if (query.is_pointwise()) {
    uint64_t bytes[kRunsOfThread];
#pragma unroll
    for (int k = 0; k < kRunsOfThread; ++k)
      bytes[k] = tid + k * kThreads < runs.count() ? query.eight_sites(tid + k * kThreads) : 0;
#pragma unroll
    for (int k = 0; k < kRunsOfThread; ++k)
      flags |= static_cast<uint64_t>(bits_of(bytes[k])) << (k * kFlags);
  } else {
    bool any = copy_mask<kThreads>(query.x, scratch);
    any |= copy_mask<kThreads>(query.residual, scratch);
    if (!__syncthreads_or(any)) return 0;
    int site;
#pragma unroll 1
    for (int k = 0; k < kRunsOfThread; ++k) {
      const int run = tid + k * kThreads;
      if (run >= runs.count()) break;
      flags |= static_cast<uint64_t>(runs.flags(Slack<Query>{query}, run, &site)) << (k * kFlags);
    }
  }
  int total;
  int at = sum_before<kThreads>(__popcll(flags), warps, &total);
#pragma unroll 1
  while (flags != 0) {
    const int bit = __ffsll(static_cast<long long>(flags)) - 1, run = tid + bit / kFlags * kThreads;
    const int row = runs.per_row.divide(run), x = (run - row * runs.per_row.value) * kFlags;
    list[at++] = static_cast<uint16_t>(row * runs.w + x + bit % kFlags);
    flags &= flags - 1;
  }
  if (blockIdx.x == 0 && tid == 0) out.counts[0] = total;
  __syncthreads();
  return total;
}

}  // namespace deltafx::cuda
