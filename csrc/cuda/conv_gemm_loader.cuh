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
      // The input at tap 0; outside of it for a window that begins in the padding.
      from_[i] = static_cast<const T*>(p.x.data) +
                 ((at.n * p.x.h + p.y.base(at.y)) * p.x.w + x_[i]) * p.x.ld;
    }
    depth_ = first_step * Traits::kDepth + chunk_ * kElements;
    const int channels = packed_channels(static_cast<int>(p.x.c)), tap = depth_ / channels;
    channel_ = depth_ % channels;
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

  // Whether row i has an input site at a tap.
  __device__ bool inside(int i, int tap_y, int tap_x) const {
    const int iy = y_[i] + tap_y * p_.y.phase.step, ix = x_[i] + tap_x * p_.x_axis.phase.step;
    return static_cast<unsigned>(iy) < static_cast<unsigned>(p_.x.h) &&
           static_cast<unsigned>(ix) < static_cast<unsigned>(p_.x.w);
  }
  // How far a tap's site lies from tap 0's, in elements.
  __device__ int64_t distance(int tap_y, int tap_x) const {
    return (static_cast<int64_t>(tap_y * p_.y.phase.step) * p_.x.w +
            tap_x * p_.x_axis.phase.step) * p_.x.ld;
  }

  __device__ void gather_chunks(uint32_t to) {
    const bool valid = depth_ < p_.depth;
    const int64_t offset = distance(tap_y_, tap_x_) + channel_;
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      const bool copied = valid && inside(i, tap_y_, tap_x_);
      copy_chunk(to + i * Traits::kCopyRows * kRowBytes,
                 copied ? static_cast<const void*>(from_[i] + offset) : p_.x.data, copied);
    }
    channel_ += Traits::kDepth;
    while (channel_ >= static_cast<int>(p_.x.c)) {
      channel_ -= static_cast<int>(p_.x.c);
      next_tap(tap_y_, tap_x_);
    }
  }

  __device__ void next_tap(int& tap_y, int& tap_x) const {
    if (++tap_x == p_.x_axis.phase.taps) {
      tap_x = 0;
      ++tap_y;
    }
  }

  // Chunks that span taps, in the packed order of channels; the channels that only fill up are 0.
  __device__ void gather_elements(uint32_t to) {
    const int cin = static_cast<int>(p_.x.c), channels = packed_channels(cin);
    float v[kOwnRows][kVector] = {};
    unsigned read[kOwnRows] = {};
    int tap_y = tap_y_, tap_x = tap_x_, channel = channel_;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      if (depth_ + e < p_.depth && channel < cin) {
        const int64_t offset = distance(tap_y, tap_x) + channel;
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i) {
          if (!inside(i, tap_y, tap_x)) continue;
          v[i][e] = to_float(from_[i][offset]);
          if (p_.pre_scale == nullptr) continue;
          v[i][e] = v[i][e] * p_.pre_scale[channel] + p_.pre_shift[channel];
          read[i] |= 1u << e;
        }
      }
      if (++channel == channels) {
        channel = 0;
        next_tap(tap_y, tap_x);
      }
    }
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      if (p_.pre_scale != nullptr) {
        // The padding is zero after the prologue.
        activate(p_.pre_act, 0, kVector, v[i]);
#pragma unroll
        for (int e = 0; e < kElements; ++e) v[i][e] = read[i] >> e & 1 ? v[i][e] : 0.f;
      }
      union {
        T elements[kElements];
        uint4 chunk;
      } packed;
#pragma unroll
      for (int e = 0; e < kElements; ++e) packed.elements[e] = from_float<T>(v[i][e]);
      const uint32_t at = to + i * Traits::kCopyRows * kRowBytes;
      asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(packed.chunk.x),
                   "r"(packed.chunk.y), "r"(packed.chunk.z), "r"(packed.chunk.w)
                   : "memory");
    }
    channel_ += Traits::kDepth;
    while (channel_ >= channels) {
      channel_ -= channels;
      next_tap(tap_y_, tap_x_);
    }
  }

  const GemmParams& p_;
  int chunk_, row_;
  uint32_t stages_;
  int y_[kOwnRows], x_[kOwnRows];
  const T* from_[kOwnRows];
  int depth_, channel_, tap_y_, tap_x_;
  const T* weight_;
};

}  // namespace deltafx::cuda
