// The third step of the update rule: compare with the accumulator, write, say whether it changed.
#pragma once

#include "cuda/activation.cuh"

namespace deltafx::cuda {

// Over the kLanes threads that hold a truncation group.
template <int kLanes = kGroupLanes>
__device__ __forceinline__ float sum_over_group(float v) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) v += __shfl_xor_sync(kAllLanes, v, step);
  return v;
}
template <int kLanes = kGroupLanes>
__device__ __forceinline__ bool any_in_group(bool v) {
  const unsigned lane = threadIdx.x % 32, first = lane / kLanes * kLanes;
  return __ballot_sync(kAllLanes, v) >> first & ((1u << kLanes) - 1);
}

// When channels [c0, c0 + count) of a site and the rest of their group count as changed. One object
// serves all the sites whose channels a thread handles; count <= 0 for a thread without any.
struct GroupRule {
  Policy policy;
  float threshold;
  float size;  // channels of the group
  float scale[kVector];
  int count;

  __device__ GroupRule(const Output& out, int c0, int channels_here)
      : policy(out.truncation.policy), threshold(0.f), count(channels_here) {
    const int group = c0 / static_cast<int>(kTruncationGroup) * static_cast<int>(kTruncationGroup);
    const int left = static_cast<int>(out.acc.c) - group;
    size = static_cast<float>(left < kTruncationGroup ? left : static_cast<int>(kTruncationGroup));
    if (policy == Policy::none) return;
    threshold = *out.truncation.threshold;
    load_floats(out.truncation.inv_scale + c0, count, scale);
  }

  // Called by whole warps, the threads of a group in order; y is rounded as it would be stored, and
  // both are 0 from `count` on.
  // Written as !(change <= t), so that a NaN counts as a change.
  template <int kLanes = kGroupLanes>
  __device__ bool changed(const float (&y)[kVector], const float (&old)[kVector]) const {
    if (policy == Policy::none) return count > 0;
    bool beyond = false;
    if (threshold == 0.f) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) beyond |= !(y[i] == old[i]);
      return any_in_group<kLanes>(beyond);
    }
    float total = 0.f;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float d = (y[i] - old[i]) * scale[i];
      total += d * d;
      beyond |= !(fabsf(d) <= threshold);
    }
    if (policy == Policy::maximum) return any_in_group<kLanes>(beyond);
    return !(sum_over_group<kLanes>(total) <= threshold * threshold * size);
  }
};

// Rounds as the accumulator would, and clears what lies beyond the channels.
template <class T>
__device__ __forceinline__ void round_to(float (&y)[kVector], int count) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) y[i] = to_float(from_float<T>(y[i]));
  if (count >= kVector) return;
#pragma unroll
  for (int i = 0; i < kVector; ++i) y[i] = i < count ? y[i] : 0.f;
}

// Compares channels [c0, c0 + count) of site `site`, after the activation, with the accumulator and
// writes them if their group changed. Called by whole warps. True if the group was written.
template <class T>
__device__ __forceinline__ bool update_group(const Output& out, bool aligned, int site, int c0,
                                             int count, float (&y)[kVector]) {
  T* acc = static_cast<T*>(out.acc.data) + static_cast<int64_t>(site) * out.acc.ld + c0;
  const GroupRule rule(out, c0, count);
  float old[kVector] = {};
  if (rule.policy != Policy::none && count > 0) load_vector(acc, count, aligned, old);
  round_to<T>(y, count);
  const bool changed = rule.changed(y, old);
  if (changed && count > 0) store_vector(acc, count, aligned, y);
  return changed && rule.size > 0.f;
}

}  // namespace deltafx::cuda
