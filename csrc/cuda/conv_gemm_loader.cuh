// Fills the stages of the convolution kernel: the sites' windows (A) and the weights (B).
#pragma once

#include "cuda/activation.cuh"
#include "cuda/conv_gemm.h"
#include "cuda/conv_gemm_traits.cuh"

namespace deltafx::cuda {

// 16 bytes into shared memory; zeros if not `valid`.
__device__ __forceinline__ void copy_chunk(uint32_t to, const void* from, bool valid) {
  const int bytes = valid ? kChunkBytes : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// A thread copies one chunk column of every kCopyRows-th row, step after step of depth.
template <class Traits>
class GemmLoader {
  using T = typename Traits::T;
  static constexpr int kElements = Traits::kChunkElements;
  static constexpr int kOwnRows = Traits::kRows / Traits::kCopyRows;
  static constexpr int kOwnColumns = Traits::kColumns / Traits::kCopyRows;

 public:
  __device__ GemmLoader(const GemmParams& p, const int* sites, int first_column, int first_step,
                        uint32_t stages)
      : p_(p), chunk_(threadIdx.x % 8), row_(threadIdx.x / 8), stages_(stages) {
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      const int site = sites[row_ + i * Traits::kCopyRows];
      const Position at = position_of(site < 0 ? 0 : site, static_cast<int>(p.out.acc.h),
                                      static_cast<int>(p.out.acc.w));
      y_[i] = site < 0 ? kNowhere : p.y.base(at.y);
      x_[i] = p.x_axis.base(at.x);
      stream_[i] = at.n * static_cast<int>(p.x.h * p.x.w);
    }
    depth_ = first_step * Traits::kDepth + chunk_ * kElements;
    const int cin = static_cast<int>(p.x.c), tap = depth_ / cin;
    channel_ = depth_ % cin;
    tap_y_ = tap / max(p.x_axis.phase.taps, 1);
    tap_x_ = tap % max(p.x_axis.phase.taps, 1);
    weight_ = static_cast<const T*>(p.weight) +
              static_cast<int64_t>(first_column + row_) * p.packed_depth + depth_;
  }

  // The next step of depth into a stage.
  __device__ void load(int stage) {
    const uint32_t tile = stages_ + stage * Traits::kStageBytes;
    const uint32_t to = tile + row_ * kRowBytes + ((chunk_ ^ (row_ & 7)) * kChunkBytes);
    if constexpr (Traits::kGather == Gather::chunks)
      gather_chunks(to);
    else
      gather_elements(to);
    const uint32_t weights = to + Traits::kRows * kRowBytes;
#pragma unroll
    for (int i = 0; i < kOwnColumns; ++i)
      copy_chunk(weights + i * Traits::kCopyRows * kRowBytes,
                 weight_ + static_cast<int64_t>(i) * Traits::kCopyRows * p_.packed_depth, true);
    weight_ += Traits::kDepth;
    depth_ += Traits::kDepth;
  }

 private:
  static constexpr int kNowhere = -(1 << 30);

  // The element of the input that row i reads at a tap, or null.
  __device__ const T* source(int i, int tap_y, int tap_x, int channel) const {
    const int iy = y_[i] + tap_y * p_.y.phase.step, ix = x_[i] + tap_x * p_.x_axis.phase.step;
    const bool inside = iy >= 0 && iy < static_cast<int>(p_.x.h) && ix >= 0 &&
                        ix < static_cast<int>(p_.x.w);
    if (!inside) return nullptr;
    const int64_t site = stream_[i] + iy * static_cast<int>(p_.x.w) + ix;
    return static_cast<const T*>(p_.x.data) + site * p_.x.ld + channel;
  }

  __device__ void gather_chunks(uint32_t to) {
    const bool valid = depth_ < p_.depth;
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      const T* from = valid ? source(i, tap_y_, tap_x_, channel_) : nullptr;
      copy_chunk(to + i * Traits::kCopyRows * kRowBytes, from != nullptr ? from : p_.x.data,
                 from != nullptr);
    }
    channel_ += Traits::kDepth;
    while (channel_ >= static_cast<int>(p_.x.c)) {
      channel_ -= static_cast<int>(p_.x.c);
      if (++tap_x_ == p_.x_axis.phase.taps) {
        tap_x_ = 0;
        ++tap_y_;
      }
    }
  }

  __device__ void gather_elements(uint32_t to) {
    const int cin = static_cast<int>(p_.x.c), taps_x = p_.x_axis.phase.taps;
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      float v[kVector] = {};
      bool inside[kElements];
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const int k = depth_ + e, tap = k / cin, c = k % cin;
        const T* from = k < p_.depth ? source(i, tap / taps_x, tap % taps_x, c) : nullptr;
        inside[e] = from != nullptr;
        if (!inside[e]) continue;
        v[e] = to_float(*from);
        if (p_.pre_scale != nullptr) v[e] = v[e] * p_.pre_scale[c] + p_.pre_shift[c];
      }
      if (p_.pre_scale != nullptr) activate(p_.pre_act, 0, kVector, v);
      union {
        T elements[kElements];
        uint4 chunk;
      } packed;
#pragma unroll
      for (int e = 0; e < kElements; ++e) packed.elements[e] = from_float<T>(inside[e] ? v[e] : 0.f);
      const uint32_t at = to + i * Traits::kCopyRows * kRowBytes;
      asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(packed.chunk.x),
                   "r"(packed.chunk.y), "r"(packed.chunk.z), "r"(packed.chunk.w)
                   : "memory");
    }
  }

  const GemmParams& p_;
  int chunk_, row_;
  uint32_t stages_;
  int y_[kOwnRows], x_[kOwnRows], stream_[kOwnRows];
  int depth_, channel_, tap_y_, tap_x_;
  const T* weight_;
};

}  // namespace deltafx::cuda
