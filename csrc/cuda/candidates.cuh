// Candidate lists on the device. The sites of the output are cut into segments; a block lists the
// candidates of each, in order, at the segment's place. A reader adds up the segments' counts, so
// nothing has to be cleared beforehand, no count ever leaves the device, and the order of the list
// does not depend on timing.
#pragma once

#include "cuda/device.cuh"
#include "cuda/launch.h"

namespace deltafx::cuda {

constexpr int kMostSegments = 1024;
constexpr int kListThreads = 256;

// Entries hold a site; the top bit is free for the op, to mark sites that it made active.
struct CandidateList {
  int32_t* entries;
  int32_t* counts;  // per segment
  int segments, segment_size;
};
constexpr uint32_t kActiveBit = 0x80000000u;

// The part of a list for [n, h, w] output sites; `memory` has list_ints(sites) ints.
inline int64_t list_segment_size(int64_t sites) {
  const int64_t rounds =
      (sites + int64_t{kListThreads} * kMostSegments - 1) / (int64_t{kListThreads} * kMostSegments);
  return kListThreads * (rounds < 1 ? 1 : rounds);
}
inline CandidateList list_in(int32_t* memory, int64_t sites) {
  const int64_t size = list_segment_size(sites);
  return {memory + kMostSegments, memory, static_cast<int>((sites + size - 1) / size),
          static_cast<int>(size)};
}

// Whether any of `count` bytes from `bytes` on, step apart, is set. Up to eight neighbours are read
// as two words; `end` is where the mask ends, beyond which no word may reach.
__device__ __forceinline__ bool any_set(const uint8_t* bytes, int count, int step,
                                        const uint8_t* begin, const uint8_t* end) {
  const auto address = reinterpret_cast<uintptr_t>(bytes);
  const uint8_t* low = bytes - address % 8;
  if (step == 1 && count > 2 && count <= 8 && low >= begin && low + 16 <= end) {
    const unsigned shift = address % 8 * 8;
    const auto* words = reinterpret_cast<const unsigned long long*>(low);
    unsigned long long v = words[0] >> shift;
    if (shift != 0) v |= words[1] << (64 - shift);
    return (v & ~0ull >> (64 - count * 8)) != 0;
  }
  bool found = false;
  for (int i = 0; i < count; ++i) found |= bytes[i * step] != 0;
  return found;
}

// What makes an output site a candidate, where that is the site itself.
struct SiteQuery {
  Mask mask;
  __device__ bool operator()(const Position& at) const {
    return mask.data[(static_cast<int64_t>(at.n) * mask.h + at.y) * mask.w + at.x] != 0;
  }
};

template <class Query>
__global__ void __launch_bounds__(kListThreads)
    list_kernel(Query query, int n, int h, int w, CandidateList list, int64_t* op_counts) {
  __shared__ int totals[kListThreads / 32];
  wait_for_inputs();
  if (blockIdx.x == 0 && threadIdx.x == 0 && op_counts != nullptr) op_counts[0] = op_counts[1] = 0;
  const int sites = n * h * w, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * list.segment_size;
  int size = 0;
  for (int offset = 0; offset < list.segment_size; offset += kListThreads) {
    const int64_t site = first + offset + threadIdx.x;
    const bool found = site < sites && query(position_of(static_cast<int>(site), h, w));
    const unsigned ballot = __ballot_sync(kAllLanes, found);
    if (lane == 0) totals[warp] = __popc(ballot);
    __syncthreads();
    int before = size;
#pragma unroll
    for (int i = 0; i < kListThreads / 32; ++i) {
      if (i < warp) before += totals[i];
      size += totals[i];
    }
    if (found)
      list.entries[first + before + __popc(ballot & ((1u << lane) - 1))] = static_cast<int>(site);
    __syncthreads();
  }
  if (threadIdx.x == 0) list.counts[blockIdx.x] = size;
}

// Lists the candidates of an op whose accumulator is `acc`. op_counts is cleared; null: left alone
// (a further part of the same op).
template <class Query>
cudaError_t list_candidates(const Query& query, const FeatureMap& acc, const CandidateList& list,
                            int64_t* op_counts, cudaStream_t stream) {
  return launch(list_kernel<Query>, {list.segments, kListThreads}, stream, query,
                static_cast<int>(acc.n), static_cast<int>(acc.h), static_cast<int>(acc.w), list,
                op_counts);
}

// A block's view of a list. Every thread of the block constructs it, after wait_for_inputs().
template <int kThreads>
class ListReader {
 public:
  struct Shared {
    int ends[kMostSegments];  // candidates up to and including a segment
    int warps[kThreads / 32];
  };

  __device__ ListReader(const CandidateList& list, Shared& shared)
      : list_(list), ends_(shared.ends) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int base = 0;
    for (int first = 0; first < list.segments; first += kThreads) {
      const int i = first + threadIdx.x;
      int sum = i < list.segments ? list.counts[i] : 0;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int below = __shfl_up_sync(kAllLanes, sum, step);
        if (lane >= step) sum += below;
      }
      if (lane == 31) shared.warps[warp] = sum;
      __syncthreads();
      int before = base;
#pragma unroll
      for (int k = 0; k < kThreads / 32; ++k) {
        if (k < warp) before += shared.warps[k];
        base += shared.warps[k];
      }
      if (i < list.segments) shared.ends[i] = before + sum;
      __syncthreads();
    }
    size_ = base;
  }

  __device__ int size() const { return size_; }

  // Where candidate i < size() stands in list.entries.
  __device__ int64_t entry(int i) const {
    int low = 0, high = list_.segments - 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (ends_[middle] > i)
        high = middle;
      else
        low = middle + 1;
    }
    const int before = low == 0 ? 0 : ends_[low - 1];
    return static_cast<int64_t>(low) * list_.segment_size + (i - before);
  }

 private:
  const CandidateList& list_;
  const int* ends_;
  int size_;
};

}  // namespace deltafx::cuda
