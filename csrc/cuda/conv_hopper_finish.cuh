// The end of the Hopper convolution: from 16 sums of a thread to the accumulator.
#pragma once

#include "cuda/conv_gemm.h"
#include "cuda/update.cuh"

namespace deltafx::cuda {

template <class T>
__device__ __forceinline__ uint32_t pack_two(float a, float b) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 v = __floats2half2_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&v);
  } else {
    const __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&v);
  }
}
template <class T>
__device__ __forceinline__ float2 unpack_two(uint32_t v) {
  if constexpr (std::is_same_v<T, __half>)
    return __half22float2(*reinterpret_cast<const __half2*>(&v));
  else
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&v));
}

// What of a convolution's parameters a block reads again and again, in shared memory: of its
// columns.
template <int kColumns>
struct ColumnConstants {
  float bias[kColumns], scale[kColumns];

  // They are there with the copies that the thread commits next.
  __device__ void load(const GemmParams& p, int first_column) {
    const int i = static_cast<int>(threadIdx.x), c = first_column + i;
    if (i >= kColumns || c >= p.out.acc.c) return;
    load(p.bias != nullptr ? p.bias + c : nullptr, bias + i);
    load(p.out.truncation.policy != Policy::none ? p.out.truncation.inv_scale + c : nullptr,
         scale + i);
  }

 private:
  static __device__ __forceinline__ void load(const float* from, float* to) {
    if (from == nullptr)
      *to = 0.f;
    else
      asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(
                       static_cast<uint32_t>(__cvta_generic_to_shared(to))),
                   "l"(from)
                   : "memory");
  }
};

// Sixteen channels of a site, [c, c + 8) and [c + 32, c + 40): what a thread finishes at a time.
// kMayFilter: whether lists may be filtered.
template <class T, bool kMayFilter>
struct SiteUnit {
  int site;  // -1: none
  uint4 old[2], residual[2];
  uint8_t active;  // of a filtered list: whether the site is a candidate

  // Starts reading what the sums will be compared with and added to.
  __device__ __forceinline__ void fetch(const GemmParams& p, int own_site, int c) {
    site = own_site;
    const auto* acc = at(p.out.acc, c);
    const auto* more = at(p.residual, c);
    active = 1;
    if (kMayFilter && p.filtered && site >= 0) active = p.x_mask.data[site];
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      if (site < 0 || c + 32 * q >= static_cast<int>(p.out.acc.c)) continue;
      if (p.out.truncation.policy != Policy::none) old[q] = read_once(acc + 32 * q);
      if (p.residual.data != nullptr) residual[q] = read_once(more + 32 * q);
    }
  }

  // Asks L2 for what a fetch will read of a whole group.
  static __device__ __forceinline__ void prefetch(const GemmParams& p, int site, int c) {
    if (site < 0) return;
    const auto ask = [&](const FeatureMap& map) {
      asm volatile("prefetch.global.L2 [%0];" ::"l"(
          static_cast<const T*>(map.data) + static_cast<int64_t>(site) * static_cast<int>(map.ld) +
          c));
    };
    if (p.out.truncation.policy != Policy::none) ask(p.out.acc);
    if (p.residual.data != nullptr) ask(p.residual);
  }

  // Bias, residual, activation, update rule. Called by whole warps; true if the group was written.
  // bias, scale: from channel c on. kTogether: of the two eights of channels, how many go through
  // each step before the next, so that they do not wait for each other; both take more registers.
  template <int kTogether>
  __device__ __forceinline__ bool finish(const GemmParams& p, const FastActivation& act,
                                         float threshold, int c, const float* bias,
                                         const float* scale, float (&y)[2 * kVector]) {
    const int channels = static_cast<int>(p.out.acc.c);
    const Policy policy = p.out.truncation.policy;
    const bool adds = p.residual.data != nullptr;
    float total = 0.f;
    bool beyond = false;
    uint4 packed[2];
#pragma unroll
    for (int q0 = 0; q0 < 2; q0 += kTogether) {
      float v[kTogether][kVector], w[kTogether][kVector];
      // f(k, q): eight number k of those that go together is q of all.
      const auto eights = [&](const auto& f) {
#pragma unroll
        for (int k = 0; k < kTogether; ++k) f(k, q0 + k);
      };
      const auto each = [&](const auto& change) {
        eights([&](int k, int) {
#pragma unroll
          for (int i = 0; i < kVector; ++i) change(v[k][i], w[k][i]);
        });
      };
      const auto inside = [&](int q) { return c + 32 * q < channels; };
      eights([&](int k, int q) {
        load_vector(bias + 32 * q, kVector, true, w[k]);
#pragma unroll
        for (int i = 0; i < kVector; ++i) v[k][i] = y[q * kVector + i] + w[k][i];
      });
      if (adds) {
        eights([&](int k, int q) { unpack(residual[q], w[k]); });
        if (!p.residual_after_act) each([](float& a, float b) { a += b; });
      }
      if (act.is_clamp)
        each([&](float& a, float) { a = act.clamp(a); });
      else
        eights([&](int k, int q) {
          if (inside(q)) activate_any(p.act, c + 32 * q, kVector, v[k]);
        });
      if (adds && p.residual_after_act) each([](float& a, float b) { a += b; });
      eights([&](int k, int q) {
        packed[q] = {pack_two<T>(v[k][0], v[k][1]), pack_two<T>(v[k][2], v[k][3]),
                     pack_two<T>(v[k][4], v[k][5]), pack_two<T>(v[k][6], v[k][7])};
      });
      if (policy == Policy::none) continue;
      eights([&](int k, int q) { unpack(packed[q], v[k]), unpack(old[q], w[k]); });
      if (threshold == 0.f) {
        eights([&](int k, int q) {
#pragma unroll
          for (int i = 0; i < kVector; ++i) beyond |= inside(q) && !(v[k][i] == w[k][i]);
        });
        continue;
      }
      each([](float& a, float b) { a -= b; });
      eights([&](int k, int q) { load_vector(scale + 32 * q, kVector, true, w[k]); });
      each([](float& a, float b) { a *= b; });
      eights([&](int k, int q) {
        if (policy == Policy::rms)
          total += inside(q) ? sum_of_squares(v[k]) : 0.f;
        else
          beyond |= inside(q) && !(largest(v[k]) <= threshold);
      });
    }
    const int group = c / static_cast<int>(kTruncationGroup) * static_cast<int>(kTruncationGroup);
    bool changed = true;
    if (policy == Policy::rms && threshold != 0.f) {
      total = sum_over_group<4>(total);
      const int size = min(channels - group, static_cast<int>(kTruncationGroup));
      changed = !(total <= threshold * threshold * static_cast<float>(size));
    } else if (policy != Policy::none) {
      changed = any_in_group<4>(beyond);
    }
    if (!changed || site < 0 || (kMayFilter && active == 0) || group >= channels) return false;
    T* acc = at(p.out.acc, c);
#pragma unroll
    for (int q = 0; q < 2; ++q)
      if (c + 32 * q < channels) *reinterpret_cast<uint4*>(acc + 32 * q) = packed[q];
    return true;
  }

 private:
  __device__ __forceinline__ T* at(const FeatureMap& map, int c) const {
    return static_cast<T*>(map.data) + static_cast<int64_t>(site) * static_cast<int>(map.ld) + c;
  }
  // 16 bytes that nobody else on this multiprocessor will read, past L1.
  static __device__ __forceinline__ uint4 read_once(const T* from) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
    return v;
  }
  static __device__ __forceinline__ float sum_of_squares(const float (&v)[kVector]) {
    float sums[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] = fmaf(v[i], v[i], v[i + 4] * v[i + 4]);
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
  // NaN, if there is one.
  static __device__ __forceinline__ float largest(const float (&v)[kVector]) {
    float most[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) most[i] = max_of(fabsf(v[i]), fabsf(v[i + 4]));
    return max_of(max_of(most[0], most[1]), max_of(most[2], most[3]));
  }
  static __device__ __forceinline__ void unpack(const uint4& from, float (&v)[kVector]) {
    const uint32_t words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 two = unpack_two<T>(words[i]);
      v[2 * i] = two.x, v[2 * i + 1] = two.y;
    }
  }
};

}  // namespace deltafx::cuda
