// The third step of the update rule: compare with the accumulator, write, say whether it changed.
#pragma once

#include "cuda/activation.cuh"

namespace deltafx::cuda {

// Over the kGroupLanes threads that hold a truncation group.
__device__ __forceinline__ float sum_over_group(float v) {
#pragma unroll
  for (int step = kGroupLanes / 2; step > 0; step /= 2) v += __shfl_xor_sync(kAllLanes, v, step);
  return v;
}
__device__ __forceinline__ bool any_in_group(bool v) {
  const unsigned lane = threadIdx.x % 32, first = lane / kGroupLanes * kGroupLanes;
  return __ballot_sync(kAllLanes, v) >> first & ((1u << kGroupLanes) - 1);
}

// Channels [c0, c0 + count) of site `site`, after the activation; count <= 0 for a thread without
// any. Called by whole warps, the threads of a group in order. True if the group was written.
// Written as !(change <= t), so that a NaN counts as a change.
template <class T>
__device__ __forceinline__ bool update_group(const Output& out, bool aligned, int site, int c0,
                                             int count, float (&y)[kVector]) {
  T* acc = static_cast<T*>(out.acc.data) + static_cast<int64_t>(site) * out.acc.ld + c0;
  const bool valid = count > 0;
#pragma unroll
  for (int i = 0; i < kVector; ++i) y[i] = to_float(from_float<T>(y[i]));
  if (out.truncation.policy == Policy::none) {
    if (valid) store_vector(acc, count, aligned, y);
    return valid;
  }
  const float t = *out.truncation.threshold;
  float old[kVector];
  if (valid) load_vector(acc, count, aligned, old);
  bool changed = false;
  if (t == 0.f) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) changed |= valid && i < count && !(y[i] == old[i]);
    changed = any_in_group(changed);
  } else {
    const bool rms = out.truncation.policy == Policy::rms;
    float total = 0.f;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (!valid || i >= count) continue;
      const float d = (y[i] - old[i]) * __ldg(out.truncation.inv_scale + c0 + i);
      total += d * d;
      changed |= !rms && !(fabsf(d) <= t);
    }
    if (rms) {
      const int left = static_cast<int>(out.acc.c) - c0 / static_cast<int>(kTruncationGroup) *
                                                         static_cast<int>(kTruncationGroup);
      const int size = left < kTruncationGroup ? left : static_cast<int>(kTruncationGroup);
      changed = !(sum_over_group(total) <= t * t * static_cast<float>(size)) && size > 0;
    } else {
      changed = any_in_group(changed);
    }
  }
  if (changed && valid) store_vector(acc, count, aligned, y);
  return changed;
}

}  // namespace deltafx::cuda
